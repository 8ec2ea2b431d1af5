//! Requests and their answers: one each, to the one who asked, in the form asked.

use bytes::Bytes;
use protocol::{
    ErrorReply, ModelName, frames,
    reply::{
        CancelReply, EvictLoraReply, HasLoraReply, ListLorasReply, ListModelsReply, StatusReply,
    },
    request::{Cancel, ClipEncode, EvictLora, HasLora, Heartbeat, ListLoras, ListModels, Status},
    worker::Alive,
};

use crate::{
    BlobEvent,
    testing::{TestBroker, encode, id, ids, model},
};

#[test]
fn an_encode_goes_to_a_worker_and_its_reply_comes_back_unread() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let vectors = Bytes::from_static(b"vectors");
    farm.client_sends("c1", frames::frames(&encode("r1", &[]), vec![vectors]));
    farm.assert_commands(&["gpu-0 <- work r1"]);

    farm.done("gpu-0", "r1");

    farm.assert_commands(&["c1 <- reply to r1"]);
    let (_, frames) = farm.replies.last().unwrap();
    assert_eq!(frames[2], "cond", "attachments come along");
}

#[test]
fn the_delimiter_of_a_req_socket_is_mirrored() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for header in [frames::frames(&encode("r1", &[]), vec![]), vec!["garbage".into()]] {
        farm.client_sends("c1", frames::delimit(header, true));
    }
    farm.client_sends("c1", frames::delimit(frames::frames(&Heartbeat {}, vec![]), true));
    farm.done("gpu-0", "r1");

    farm.assert_commands(&[
        "gpu-0 <- work r1",
        "c1 <- (delimited) error ? invalid_request",
        "c1 <- (delimited) heartbeat",
        "c1 <- (delimited) reply to r1",
    ]);
}

#[test]
fn garbage_is_answered_without_an_id_and_an_unknown_kind_with_it() {
    let mut farm = TestBroker::new();
    let magic = || Bytes::from_static(frames::MAGIC);
    // {"kind": "dance", "id": "7"} and {"kind": "status"} and {"kind": "dance"}
    let dance = Bytes::from_static(b"\x82\xa4kind\xa5dance\xa2id\xa17");
    let no_id = Bytes::from_static(b"\x81\xa4kind\xa6status");
    let neither = Bytes::from_static(b"\x81\xa4kind\xa5dance");

    farm.client_sends("c1", vec![]);
    farm.client_sends("c1", vec!["HTTP/1.1".into()]);
    farm.client_sends("c1", vec![magic(), "\u{fffd}".into()]);
    farm.client_sends("c1", vec![magic(), dance]);
    farm.client_sends("c1", vec![magic(), no_id]);
    farm.client_sends("c1", vec![magic(), neither]);
    farm.client_sends("c1", vec![magic(); 73]);
    farm.client_sends("c1", vec![magic(), vec![0x80; (1 << 20) + 1].into()]);

    farm.assert_commands(&[
        "c1 <- error ? invalid_request",
        "c1 <- error ? invalid_request",
        "c1 <- error ? invalid_request",
        "c1 <- error 7 unsupported",
        "c1 <- error ? invalid_request",
        "c1 <- error ? unsupported",
        "c1 <- error ? too_large",
        "c1 <- error ? too_large",
    ]);
}

#[test]
fn a_request_whose_fields_are_wrong_is_answered_with_its_id() {
    let mut farm = TestBroker::new();
    let header = Bytes::from_static(b"\x82\xa4kind\xabclip_encode\xa2id\xa17");
    farm.client_sends("c1", vec![Bytes::from_static(frames::MAGIC), header]);
    farm.assert_commands(&["c1 <- error 7 invalid_request"]);
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains("model"), "{}", error.message);
}

#[test]
fn an_id_that_is_in_use_is_answered_once() {
    let mut farm = TestBroker::new();
    farm.encode("c1", "r0", &[]);
    farm.shown();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r1", &[]);
    let anew = ClipEncode { no_cache: true, ..encode("r1", &[]) };
    farm.client_says("c2", &anew);
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r1"]);

    farm.done("gpu-0", "r1");

    farm.assert_commands(&["c2 <- reply to r1"]);
    farm.client_says("c2", &anew);
    farm.assert_commands(&["gpu-0 <- work r1"]);
}

#[test]
fn a_cancelled_request_is_answered_and_taken_back() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r2"]);
    let cancel = |id: &str, request: &str| Cancel {
        id: id.parse().unwrap(),
        request: request.parse().unwrap(),
    };

    farm.client_says("c1", &cancel("x1", "r3"));
    farm.assert_commands(&["c1 <- error r3 cancelled", "c1 <- cancel_reply x1"]);
    farm.client_says("c1", &cancel("x2", "r1"));
    farm.assert_commands(&[
        "gpu-0 <- cancel_work r1",
        "c1 <- error r1 cancelled",
        "c1 <- cancel_reply x2",
    ]);
    assert!(farm.last_reply::<CancelReply>().cancelled);
    farm.client_says("c2", &cancel("x3", "r2"));
    assert!(!farm.last_reply::<CancelReply>().cancelled, "it is another client's request");

    farm.shown();
    farm.done("gpu-0", "r1");
    farm.assert_commands(&[]);
}

#[test]
fn a_cancelled_dispatch_takes_its_slot_until_the_worker_let_go_of_it() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &[]);
    farm.client_says("c1", &Cancel { id: "x".parse().unwrap(), request: "r1".parse().unwrap() });
    farm.shown();

    farm.encode("c1", "r3", &[]);
    farm.assert_commands(&[]);
    farm.alive("gpu-0", &["r1", "r2"]);
    farm.assert_commands(&[]);
    farm.alive("gpu-0", &["r2"]);
    farm.assert_commands(&["gpu-0 <- work r3"]);
}

#[test]
fn what_a_client_that_left_had_asked_is_dropped() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.encode("c2", "r4", &[]);
    farm.shown();

    farm.client_leaves("c1");

    farm.assert_commands(&["gpu-0 <- cancel_work r1", "gpu-0 <- cancel_work r2"]);
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["gpu-0 <- work r4"]);
}

#[test]
fn a_held_adapter_is_stored_or_resident() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &["resident"]);
    farm.stored("stored");
    farm.client_says(
        "c1",
        &HasLora { id: "h".parse().unwrap(), adapters: ids(&["nowhere", "stored", "resident"]) },
    );

    let reply: HasLoraReply = farm.last_reply();
    assert_eq!(reply.present, ids(&["stored", "resident"]));
    assert_eq!(reply.missing, ids(&["nowhere"]));

    farm.client_says("c1", &ListLoras { id: "l".parse().unwrap() });
    let reply: ListLorasReply = farm.last_reply();
    let mut shown: Vec<_> =
        reply.loras.iter().map(|lora| (lora.adapter, lora.stored, lora.workers.len())).collect();
    shown.sort_by_key(|&(_, stored, _)| stored);
    assert_eq!(shown, [(id("resident"), false, 1), (id("stored"), true, 0)]);
}

#[test]
fn evicting_tells_the_holders_and_deleting_forgets_the_blob() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &["a", "b"]);
    farm.ready("gpu-1", &["b"]);
    farm.stored("a");
    let evict = |id: &str, names: &[&str], delete| EvictLora {
        id: id.parse().unwrap(),
        adapters: ids(names),
        delete,
    };

    farm.client_says("c1", &evict("e1", &["a", "b", "c"], false));
    farm.assert_commands(&["gpu-0 <- evict 2", "gpu-1 <- evict 1", "c1 <- evict_lora_reply e1"]);
    let reply: EvictLoraReply = farm.last_reply();
    assert_eq!((reply.evicted, reply.unknown), (ids(&["a", "b"]), ids(&["c"])));

    farm.client_says("c1", &evict("e2", &["a"], true));
    farm.assert_commands(&["gpu-0 <- evict 1", "store <- delete 1"]);
    farm.store_works();
    farm.assert_commands(&["c1 <- evict_lora_reply e2"]);
    farm.worker_dies("gpu-0");
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &["a"]);
    farm.assert_commands(&["c1 <- error r1 unknown_lora"]);
}

#[test]
fn a_blob_that_could_not_be_deleted_is_still_there() {
    let mut farm = TestBroker::new();
    farm.stored("a");
    let evict = EvictLora { id: "e".parse().unwrap(), adapters: ids(&["a"]), delete: true };
    farm.client_says("c1", &evict);
    let ticket = farm.store.remove(0).ticket;
    let failure = protocol::Failure::new(protocol::ErrorCode::Internal, "the disk is read-only");
    farm.blob_event(BlobEvent::Done { ticket, result: Err(failure) });
    farm.assert_commands(&["store <- delete 1", "c1 <- error e internal"]);
    farm.client_says("c1", &HasLora { id: "h".parse().unwrap(), adapters: ids(&["a"]) });
    assert_eq!(farm.last_reply::<HasLoraReply>().present, ids(&["a"]));
}

#[test]
fn the_status_says_why_the_farm_is_not_ready() {
    let mut farm = TestBroker::new();
    let status = |farm: &mut TestBroker| -> StatusReply {
        farm.client_says("c1", &Status { id: "s".parse().unwrap() });
        farm.last_reply()
    };
    assert_eq!(status(&mut farm).reasons, ["no worker has announced itself"]);

    farm.ready("gpu-0", &["a"]);
    let ready = status(&mut farm);
    assert!(ready.ready && ready.reasons.is_empty());
    assert_eq!(ready.workers[0].models, ["sd15".parse::<ModelName>().unwrap()]);
    assert_eq!((ready.workers[0].resident, ready.workers[0].in_flight), (1, 0));
    assert_eq!(ready.uptime_ms, 5000);

    let draining = Alive { draining: true, ..farm.heartbeat("gpu-0", &[]) };
    farm.worker_says("gpu-0", &draining);
    assert_eq!(status(&mut farm).reasons, ["every worker is draining or serves no model"]);

    farm.alive("gpu-0", &[]);
    farm.blob_event(BlobEvent::Health { trouble: Some("no space left".to_owned()) });
    assert_eq!(status(&mut farm).reasons, ["the blob store does not work: no space left"]);
    farm.blob_event(BlobEvent::Health { trouble: None });
    assert!(status(&mut farm).ready);
}

#[test]
fn models_are_listed_with_the_workers_that_serve_them() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-1", &[]);
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &ListModels { id: "m".parse().unwrap() });

    let reply: ListModelsReply = farm.last_reply();
    assert_eq!(reply.models.len(), 1);
    assert_eq!(reply.models[0].model, model("sd15"));
    let workers: Vec<_> = reply.models[0].workers.iter().map(ToString::to_string).collect();
    assert_eq!(workers, ["gpu-0", "gpu-1"]);
}

#[test]
fn counters_add_up() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &["nowhere"]);
    farm.encode("c1", "r3", &[]);
    farm.done("gpu-0", "r1");
    farm.after(std::time::Duration::from_secs(40));
    farm.client_says("c1", &Status { id: "s".parse().unwrap() });

    let counters = farm.last_reply::<StatusReply>().counters;
    assert_eq!((counters.accepted, counters.answered, counters.failed), (2, 1, 1));
    assert_eq!((counters.requeued, counters.workers_lost), (1, 1));
}
