//! Uploads: steps in order, limits, what ends one, and what the store makes of it.

use std::time::Duration;

use protocol::{
    BlobDigest, ErrorCode, ErrorReply, Failure,
    reply::{HasLoraReply, UploadLoraReply},
    request::{EvictLora, HasLora, UploadFormat, UploadOp},
};

use super::steps::{begin, chunk, step};
use crate::{
    BlobEvent, BlobName, BlobOutcome, Limits,
    testing::{TestBroker, foreign_ticket, id, ids},
};

#[test]
fn a_file_is_uploaded_in_chunks_and_becomes_an_adapter() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let upload = begin(&mut farm, "c1", 5);
    farm.assert_commands(&["store <- begin 5", "c1 <- upload_lora_reply begin"]);

    chunk(&mut farm, "c1", &upload, 0, b"abc");
    chunk(&mut farm, "c1", &upload, 3, b"de");
    farm.assert_commands(&["store <- append 3", "store <- append 2"]);
    farm.store_works();
    assert_eq!(farm.last_reply::<UploadLoraReply>().received, 5);
    farm.shown();

    step(&mut farm, "c1", "commit", UploadOp::Commit { upload });
    farm.store_works();
    farm.assert_commands(&[
        "store <- commit",
        "c1 <- upload_lora_reply commit",
        "gpu-0 <- prefetch 1",
    ]);
    let reply: UploadLoraReply = farm.last_reply();
    assert_eq!((reply.adapter, reply.upload), (Some(id("uploaded")), None));
    assert!(reply.report.is_some());
    farm.encode("c1", "r1", &["uploaded"]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
}

#[test]
fn what_the_farm_holds_already_is_not_sent_again() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    let canonical = BlobDigest::from_bytes(*id("anime").as_bytes());
    let raw = BlobDigest::of(b"anime.safetensors");
    for (format, digest) in [(UploadFormat::Canonical, canonical), (UploadFormat::Lora, raw)] {
        let op = UploadOp::Begin { size: 9, format, digest: Some(digest), label: None };
        step(&mut farm, "c1", "b", op);
        let reply: UploadLoraReply = farm.last_reply();
        assert_eq!((reply.adapter, reply.upload, reply.received), (Some(id("anime")), None, 9));
    }
    farm.assert_commands(&["c1 <- upload_lora_reply b", "c1 <- upload_lora_reply b"]);
}

#[test]
fn a_chunk_at_a_wrong_place_is_refused_and_the_upload_goes_on() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    for (offset, bytes, message) in [
        (2, &b"c"[..], "the chunk starts at offset 2: expected 3"),
        (u64::MAX, b"c", "the chunk starts at offset 18446744073709551615: expected 3"),
        (3, b"def", "the chunk ends at byte 6: the upload was announced with 5 bytes"),
        (3, b"", "the chunk is empty"),
    ] {
        chunk(&mut farm, "c1", &upload, offset, bytes);
        let error: ErrorReply = farm.last_reply();
        assert_eq!((error.code, error.message.as_str()), (ErrorCode::InvalidRequest, message));
    }
    chunk(&mut farm, "c1", &upload, 3, &vec![0; (1 << 20) + 1]);
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
    let op = UploadOp::Chunk { upload: upload.clone(), offset: 3 };
    step(&mut farm, "c1", "none", op);
    assert_eq!(
        farm.last_reply::<ErrorReply>().message,
        "the chunk has 0 attachments: expected exactly one"
    );

    chunk(&mut farm, "c1", &upload, 3, b"de");
    farm.store_works();
    assert_eq!(farm.last_reply::<UploadLoraReply>().received, 5);
}

#[test]
fn a_truncated_upload_is_refused_with_both_sizes() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    step(&mut farm, "c1", "commit", UploadOp::Commit { upload });
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    assert_eq!(
        error.message,
        "the upload is truncated: it was announced with 5 bytes and 3 bytes came"
    );
}

#[test]
fn a_file_that_the_store_refuses_leaves_nothing_behind() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 1);
    chunk(&mut farm, "c1", &upload, 0, b"a");
    farm.store_works();
    farm.shown();
    step(&mut farm, "c1", "commit", UploadOp::Commit { upload: upload.clone() });
    step(&mut farm, "c1", "again", UploadOp::Commit { upload: upload.clone() });
    let ticket = farm.store.remove(0).ticket;
    let failure = Failure::new(ErrorCode::LoraRejected, "the digest is another");
    farm.blob_event(BlobEvent::Done { ticket, result: Err(failure) });
    step(&mut farm, "c1", "late", UploadOp::Commit { upload });
    farm.assert_commands(&[
        "store <- commit",
        "c1 <- error again invalid_request",
        "c1 <- error commit lora_rejected",
        "c1 <- error late invalid_request",
    ]);
}

#[test]
fn a_chunk_that_cannot_be_written_ends_the_upload() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    farm.shown();
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    let ticket = farm.store.remove(0).ticket;
    let failure = Failure::new(ErrorCode::Overloaded, "no space left on device");
    farm.blob_event(BlobEvent::Done { ticket, result: Err(failure) });
    farm.assert_commands(&[
        "store <- append 3",
        "c1 <- error chunk-0 overloaded",
        "store <- abort",
    ]);
    chunk(&mut farm, "c1", &upload, 3, b"de");
    farm.assert_commands(&["c1 <- error chunk-3 invalid_request"]);
}

#[test]
fn an_upload_belongs_to_the_client_that_began_it() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    farm.shown();
    chunk(&mut farm, "c2", &upload, 0, b"abc");
    farm.assert_commands(&["c2 <- error chunk-0 invalid_request"]);
    farm.client_leaves("c1");
    farm.assert_commands(&["store <- abort"]);
    farm.store_works();
    farm.assert_commands(&[]);
    assert!(farm.broker.is_idle());
}

#[test]
fn an_upload_that_nobody_goes_on_with_is_dropped() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    farm.after(Duration::from_secs(299));
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.shown();
    farm.after(Duration::from_secs(299));
    farm.assert_commands(&[]);
    farm.after(Duration::from_secs(1));
    farm.assert_commands(&["store <- abort"]);
}

#[test]
fn an_aborted_upload_is_gone() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    farm.shown();
    step(&mut farm, "c1", "abort", UploadOp::Abort { upload: upload.clone(), keep: false });
    farm.store_works();
    farm.assert_commands(&["store <- abort", "c1 <- upload_lora_reply abort"]);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.assert_commands(&["c1 <- error chunk-0 invalid_request"]);
}

#[test]
fn sizes_labels_and_numbers_are_limited() {
    let mut farm = TestBroker::new();
    let begin_with = |size, label: Option<String>| UploadOp::Begin {
        size,
        format: UploadFormat::Lora,
        digest: None,
        label,
    };
    step(&mut farm, "c1", "b", begin_with(0, None));
    step(&mut farm, "c1", "b", begin_with((2 << 30) + 1, None));
    step(&mut farm, "c1", "b", begin_with(1, Some("x".repeat(129))));
    farm.assert_commands(&[
        "c1 <- error b invalid_request",
        "c1 <- error b too_large",
        "c1 <- error b too_large",
    ]);
    for _ in 0..4 {
        begin(&mut farm, "c1", 1);
    }
    step(&mut farm, "c1", "b", begin_with(1, None));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.message.starts_with("this client has 4 uploads open"), "{}", error.message);
    for client in 2..=16 {
        for _ in 0..4 {
            begin(&mut farm, &format!("c{client}"), 1);
        }
    }
    step(&mut farm, "c17", "b", begin_with(1, None));
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.starts_with("the farm has 64 uploads open"), "{}", error.message);
}

#[test]
fn a_store_that_does_not_answer_keeps_nobody_waiting() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 100);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.shown();
    farm.after(Duration::from_mins(1));
    farm.assert_commands(&["c1 <- error chunk-0 deadline_exceeded", "store <- abort"]);
    farm.store_works();
    farm.assert_commands(&[]);
    farm.blob_event(BlobEvent::Done { ticket: foreign_ticket(), result: Ok(BlobOutcome::Done) });
    farm.assert_commands(&[]);
}

#[test]
fn commands_that_nobody_waits_for_any_more_still_count() {
    let limits = Limits { store_waiting_max: 2, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    farm.store_works();
    let op = || UploadOp::Begin { size: 1, format: UploadFormat::Lora, digest: None, label: None };
    for client in ["c1", "c2"] {
        step(&mut farm, client, "b", op());
        farm.client_leaves(client);
    }
    farm.assert_commands(&["store <- begin 1", "store <- begin 1"]);
    step(&mut farm, "c3", "b", op());
    farm.assert_commands(&["c3 <- error b overloaded"]);
    farm.store_works();
    farm.assert_commands(&["store <- abort", "store <- abort"]);
    step(&mut farm, "c3", "b", op());
    farm.assert_commands(&["store <- begin 1"]);
}

#[test]
fn what_waits_for_the_store_when_the_process_ends_is_answered() {
    let mut farm = TestBroker::new();
    let upload = begin(&mut farm, "c1", 5);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.shown();
    farm.broker.give_up("the broker stopped");
    farm.collect();
    farm.assert_commands(&["c1 <- error chunk-0 overloaded"]);
    farm.store_works();
    farm.assert_commands(&[]);
}

#[test]
fn commits_and_deletions_of_one_adapter_count_in_the_order_of_the_store() {
    for (evict_first, is_there) in [(true, true), (false, false)] {
        let mut farm = TestBroker::new();
        farm.stored("uploaded");
        let upload = begin(&mut farm, "c1", 1);
        chunk(&mut farm, "c1", &upload, 0, b"a");
        farm.store_works();
        let id = || "evict".parse().unwrap();
        let evict = EvictLora { id: id(), adapters: ids(&["uploaded"]), delete: true };
        if evict_first {
            farm.client_says("c2", &evict);
        }
        step(&mut farm, "c1", "commit", UploadOp::Commit { upload });
        if !evict_first {
            farm.client_says("c2", &evict);
        }
        farm.store_works();
        farm.client_says("c1", &HasLora { id: id(), adapters: ids(&["uploaded"]) });
        assert_eq!(!farm.last_reply::<HasLoraReply>().present.is_empty(), is_there);
    }
}

#[test]
fn a_full_store_lets_go_of_what_was_not_used_for_longest() {
    let mut farm = TestBroker::starting(Limits { store_bytes_max: 30, ..Limits::default() });
    farm.ready("gpu-0", &[]);
    for name in ["a", "b", "c"] {
        farm.stored(name);
    }
    farm.encode("c1", "r1", &["b"]);
    farm.client_says("c1", &HasLora { id: "h".parse().unwrap(), adapters: ids(&["a"]) });
    farm.shown();
    let upload = begin(&mut farm, "c1", 1);
    chunk(&mut farm, "c1", &upload, 0, b"a");
    step(&mut farm, "c1", "commit", UploadOp::Commit { upload });
    farm.store_works();
    assert!(farm.shown().contains(&"store <- delete 1".to_owned()));

    let adapters = ids(&["a", "b", "c", "uploaded"]);
    farm.client_says("c1", &HasLora { id: "h".parse().unwrap(), adapters });
    assert_eq!(farm.last_reply::<HasLoraReply>().missing, ids(&["c"]));
}

#[test]
fn a_blob_that_rotted_is_forgotten() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.stored("anime");
    let reason = "its bytes have another digest".to_owned();
    farm.blob_event(BlobEvent::Removed { blob: BlobName::Adapter(id("anime")), reason });
    farm.encode("c1", "r1", &["anime"]);
    farm.assert_commands(&["c1 <- error r1 unknown_lora"]);
}
