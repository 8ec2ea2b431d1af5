//! Uploads that break off and go on, that meet, that share the credit and the room of the store.

use std::time::Duration;

use protocol::{
    BlobDigest, ErrorCode, ErrorReply, UploadId,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadOp},
    worker::Fetch,
};

use super::steps::{announce, begin, chunk, step};
use crate::{
    BlobEvent, BlobOutcome, KeptPart, Limits, PartName,
    testing::{TestBroker, id},
};

const CHUNK: usize = 1 << 20;

#[test]
fn an_upload_that_broke_off_goes_on_where_it_ended_whoever_brings_the_rest() {
    let mut farm = TestBroker::new();
    let upload = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.shown();

    farm.client_leaves("c1");
    farm.assert_commands(&["store <- keep"]);
    farm.store_works();
    let again = announced(&mut farm, "c2", 5, 3);
    farm.assert_commands(&["store <- begin 5", "c2 <- upload_lora_reply begin"]);
    assert_eq!(farm.last_reply::<UploadLoraReply>().received, 3);
    assert_ne!(upload, again);

    chunk(&mut farm, "c2", &upload, 3, b"de");
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::InvalidRequest);
    chunk(&mut farm, "c2", &again, 3, b"de");
    farm.store_works();
    step(&mut farm, "c2", "commit", UploadOp::Commit { upload: again });
    farm.store_works();
    let reply: UploadLoraReply = farm.last_reply();
    assert_eq!((reply.adapter, reply.received), (Some(id("uploaded")), 5));
    farm.after(Duration::from_hours(48));
    assert!(!farm.shown().iter().any(|line| line.starts_with("store <- drop")));
}

#[test]
fn the_store_says_how_much_it_has_and_it_may_be_nothing() {
    let mut farm = TestBroker::new();
    let upload = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.client_leaves("c1");
    farm.store_works();
    let again = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &again, 0, b"abcde");
    farm.store_works();
    assert_eq!(farm.last_reply::<UploadLoraReply>().received, 5);
}

#[test]
fn one_file_is_sent_by_one_client_at_a_time() {
    let mut farm = TestBroker::new();
    announce(&mut farm, "c1", 5);
    announce(&mut farm, "c2", 5);
    let reply: UploadLoraReply = farm.last_reply();
    assert_eq!((reply.upload, reply.wait_ms, reply.received), (None, Some(250), 0));
    farm.store_works();
    let upload = farm.last_upload();
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    announce(&mut farm, "c2", 5);
    let reply: UploadLoraReply = farm.last_reply();
    assert_eq!((reply.upload, reply.wait_ms, reply.received), (None, Some(250), 3));

    farm.client_leaves("c1");
    let upload = announced(&mut farm, "c2", 5, 3);
    announce(&mut farm, "c3", 5);
    chunk(&mut farm, "c2", &upload, 3, b"de");
    step(&mut farm, "c2", "commit", UploadOp::Commit { upload });
    announce(&mut farm, "c3", 5);
    assert_eq!(farm.last_reply::<UploadLoraReply>().wait_ms, Some(250), "it is not verified yet");
    farm.store_works();
    assert!(farm.last_reply::<UploadLoraReply>().adapter.is_some());
}

#[test]
fn a_client_that_is_silent_for_long_gives_way() {
    let mut farm = TestBroker::new();
    let upload = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.after(Duration::from_secs(14));
    announce(&mut farm, "c2", 5);
    assert_eq!(farm.last_reply::<UploadLoraReply>().wait_ms, Some(250));
    farm.shown();
    farm.after(Duration::from_secs(1));
    announce(&mut farm, "c2", 5);
    farm.assert_commands(&["store <- keep", "store <- begin 5"]);
    chunk(&mut farm, "c1", &upload, 3, b"de");
    farm.assert_commands(&["c1 <- error chunk-3 invalid_request"]);
}

#[test]
fn a_client_that_leaves_while_the_store_looks_leaves_what_was_there() {
    let mut farm = TestBroker::new();
    announce(&mut farm, "c1", 5);
    farm.client_leaves("c1");
    farm.assert_commands(&["store <- begin 5"]);
    announce(&mut farm, "c2", 5);
    assert_eq!(farm.last_reply::<UploadLoraReply>().wait_ms, Some(250));
    farm.shown();
    farm.store_answers(BlobOutcome::Begun { received: 3 });
    farm.assert_commands(&["store <- keep"]);
    announce(&mut farm, "c2", 5);
    farm.assert_commands(&["store <- begin 5"]);
}

#[test]
fn an_upload_can_be_put_aside_on_purpose() {
    let mut farm = TestBroker::new();
    let upload = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.shown();
    step(&mut farm, "c1", "abort", UploadOp::Abort { upload, keep: true });
    farm.store_works();
    farm.assert_commands(&["store <- keep", "c1 <- upload_lora_reply abort"]);
    assert_eq!(farm.last_reply::<UploadLoraReply>().received, 3);

    let unnamed = begin(&mut farm, "c1", 5);
    farm.shown();
    step(&mut farm, "c1", "abort", UploadOp::Abort { upload: unnamed, keep: true });
    farm.assert_commands(&["store <- abort"]);
}

#[test]
fn what_nobody_goes_on_with_is_kept_for_a_day_and_then_dropped() {
    let mut farm = TestBroker::new();
    let upload = announced(&mut farm, "c1", 5, 0);
    chunk(&mut farm, "c1", &upload, 0, b"abc");
    farm.store_works();
    farm.shown();
    farm.after(Duration::from_mins(5));
    farm.assert_commands(&["store <- keep"]);
    farm.after(Duration::from_hours(23));
    farm.assert_commands(&[]);
    farm.after(Duration::from_hours(1));
    farm.assert_commands(&["store <- drop parts 1"]);

    let idle = Duration::from_hours(23);
    farm.blob_event(BlobEvent::FoundPart(KeptPart { part: part("old"), bytes: 3, idle }));
    farm.after(Duration::from_hours(1));
    farm.assert_commands(&["store <- drop parts 1"]);
}

#[test]
fn kept_parts_count_and_are_the_first_to_go() {
    let mut farm = TestBroker::starting(Limits { store_bytes_max: 40, ..Limits::default() });
    farm.stored("a");
    farm.stored("b");
    for name in ["x", "y"] {
        let idle = Duration::ZERO;
        farm.blob_event(BlobEvent::FoundPart(KeptPart { part: part(name), bytes: 8, idle }));
    }
    farm.assert_commands(&[]);
    begin(&mut farm, "c1", 10);
    farm.assert_commands(&[
        "store <- drop parts 1",
        "store <- begin 10",
        "c1 <- upload_lora_reply begin",
    ]);
    begin(&mut farm, "c1", 20);
    assert_eq!(farm.shown()[..2], ["store <- drop parts 1", "store <- delete 1"]);
    let op = |size| UploadOp::Begin { size, format: UploadFormat::Lora, digest: None, label: None };
    step(&mut farm, "c1", "b", op(20));
    farm.assert_commands(&["c1 <- error b overloaded"]);
    step(&mut farm, "c1", "b", op(41));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::TooLarge);
    assert_eq!(
        error.message,
        "the file has 41 bytes and the farm keeps at most 40 of all such files: \
         raise `broker.store_mb_max` of the broker"
    );
}

#[test]
fn a_part_whose_upload_finds_no_room_stays_kept() {
    let mut farm = TestBroker::starting(Limits { store_bytes_max: 10, ..Limits::default() });
    let mine = PartName { size: 5, ..part("anime") };
    farm.blob_event(BlobEvent::FoundPart(KeptPart { part: mine, bytes: 3, idle: Duration::ZERO }));
    begin(&mut farm, "c1", 7);
    farm.shown();
    announce(&mut farm, "c2", 5);
    farm.assert_commands(&["c2 <- error begin overloaded"]);
    assert_eq!(farm.broker.uploads.kept.bytes(false), 3);
}

#[test]
fn what_a_worker_fetches_makes_no_room() {
    let mut farm = TestBroker::starting(Limits { store_bytes_max: 20, ..Limits::default() });
    farm.ready("gpu-0", &[]);
    farm.stored("a");
    farm.stored("b");
    farm.worker_says("gpu-0", &Fetch { blob: id("a").into(), offset: 0, length: 5 });
    farm.worker_says("gpu-0", &Fetch { blob: id("b").into(), offset: 0, length: 5 });
    farm.shown();
    let op = UploadOp::Begin { size: 5, format: UploadFormat::Lora, digest: None, label: None };
    step(&mut farm, "c1", "b", op.clone());
    farm.assert_commands(&["c1 <- error b overloaded"]);
    farm.store_works();
    farm.shown();
    step(&mut farm, "c1", "b", op);
    farm.assert_commands(&["store <- delete 1", "store <- begin 5"]);
}

#[test]
fn clients_share_what_may_be_on_its_way() {
    let limits = Limits { upload_bytes_pending_max: 8 * CHUNK, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    let size = 100 * CHUNK as u64;
    let mut credits = Vec::new();
    for client in 1..=9 {
        begin(&mut farm, &format!("c{client}"), size);
        credits.push(farm.last_reply::<UploadLoraReply>().credit_bytes.unwrap() / CHUNK as u64);
    }
    assert_eq!(credits, [4, 4, 1, 1, 1, 1, 1, 1, 1], "the total, and then one chunk each");

    let upload = begin(&mut farm, "c10", 3);
    assert_eq!(farm.last_reply::<UploadLoraReply>().credit_bytes, Some(3), "no more than the rest");
    chunk(&mut farm, "c10", &upload, 0, b"abc");
    farm.store_works();
    assert_eq!(farm.last_reply::<UploadLoraReply>().credit_bytes, Some(0));
}

#[test]
fn a_client_that_sends_more_than_it_was_granted_is_held_back() {
    let limits = Limits { upload_bytes_pending_max: CHUNK, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    let upload = begin(&mut farm, "c1", 100 * CHUNK as u64);
    farm.shown();
    let bytes = vec![0; CHUNK];
    chunk(&mut farm, "c1", &upload, 0, &bytes);
    chunk(&mut farm, "c1", &upload, CHUNK as u64, &bytes);
    farm.assert_commands(&["store <- append 1048576", "c1 <- error chunk-1048576 overloaded"]);
    announce(&mut farm, "c2", 5);
    farm.assert_commands(&["c2 <- error begin overloaded"]);
    farm.store_works();
    farm.shown();
    chunk(&mut farm, "c1", &upload, CHUNK as u64, &bytes);
    farm.assert_commands(&["store <- append 1048576"]);
}

/// `client` announces the file `anime`, of which the store has `received` bytes.
fn announced(farm: &mut TestBroker, client: &str, size: u64, received: u64) -> UploadId {
    announce(farm, client, size);
    while farm.store.len() > 1 {
        farm.store_answers(BlobOutcome::Done);
    }
    farm.store_answers(BlobOutcome::Begun { received });
    farm.last_upload()
}

/// A part of the file `name` of 100 bytes.
fn part(name: &str) -> PartName {
    PartName { format: UploadFormat::Lora, digest: BlobDigest::of(name.as_bytes()), size: 100 }
}
