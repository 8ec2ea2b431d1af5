//! Equal requests: computed once, answered each, and answered again from the cache.

use std::time::Duration;

use bytes::Bytes;
use protocol::{
    CacheUse, ErrorCode, ErrorReply, frames,
    reply::ClipEncodeReply,
    request::{Cancel, ClipEncode, EncodeOptions, EvictLora},
    worker::Ready,
};

use crate::{
    Limits,
    testing::{TestBroker, encode, ids, model},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn equal_requests_under_way_are_computed_once_and_answered_each() {
    let mut farm = farm();
    for (client, id) in [("c1", "r1"), ("c2", "r1"), ("c2", "r2")] {
        farm.client_says(client, &same(id));
    }
    farm.assert_commands(&["gpu-0 <- work r1"]);

    farm.answers("gpu-0", "r1");

    farm.assert_commands(&[
        "c1 <- clip_encode_reply r1",
        "c2 <- clip_encode_reply r1",
        "c2 <- clip_encode_reply r2",
    ]);
    let reply: ClipEncodeReply = farm.last_reply();
    assert_eq!((reply.id.as_str(), reply.receipt.cache), ("r2", None));
    assert!(farm.replies.iter().all(|(_, frames)| frames[2] == "cond r1"));
    let counters = farm.counters();
    assert_eq!((counters.accepted, counters.answered, counters.coalesced), (3, 3, 2));
}

#[test]
fn when_the_first_leaves_the_others_are_answered_without_computing_again() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.client_says("c2", &same("r2"));
    farm.shown();
    farm.client_leaves("c1");
    farm.assert_commands(&[]);
    farm.answers("gpu-0", "r1");
    farm.assert_commands(&["c2 <- clip_encode_reply r2"]);
}

#[test]
fn when_the_last_leaves_nothing_is_computed_any_more() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.client_says("c2", &same("r2"));
    farm.shown();
    let cancel = Cancel { id: "x".parse().unwrap(), request: "r1".parse().unwrap() };
    farm.client_says("c1", &cancel);
    farm.assert_commands(&["c1 <- error r1 cancelled", "c1 <- cancel_reply x"]);
    farm.client_leaves("c2");
    farm.assert_commands(&["gpu-0 <- cancel_work r1"]);
    farm.client_says("c3", &same("r3"));
    farm.assert_commands(&["gpu-0 <- work r3"]);
}

#[test]
fn what_waits_goes_on_for_the_others_when_the_first_leaves() {
    let mut farm = farm();
    farm.encode("c0", "a", &[]);
    farm.encode("c0", "b", &[]);
    farm.client_says("c1", &same("r1"));
    farm.client_says("c2", &same("r2"));
    farm.shown();
    farm.client_leaves("c1");
    farm.done("gpu-0", "a");
    farm.assert_commands(&["c0 <- reply to a", "gpu-0 <- work r1"]);
    farm.answers("gpu-0", "r1");
    farm.assert_commands(&["c2 <- clip_encode_reply r2"]);
}

#[test]
fn everyone_has_a_deadline_of_their_own() {
    let mut farm = farm();
    farm.client_says("c1", &ClipEncode { budget_ms: Some(100), ..same("r1") });
    farm.client_says("c2", &ClipEncode { budget_ms: Some(1000), ..same("r2") });
    farm.after(Duration::from_millis(100));
    farm.assert_commands(&["gpu-0 <- work r1", "c1 <- error r1 deadline_exceeded"]);
    // The worker was told of the first deadline, and gives up as well.
    farm.fails("gpu-0", "r1", ErrorCode::DeadlineExceeded);
    farm.assert_commands(&["gpu-0 <- work r1"]);
    assert_eq!(farm.last_work.as_ref().unwrap().budget_ms, 900);
    farm.fails("gpu-0", "r1", ErrorCode::DeadlineExceeded);
    farm.assert_commands(&["c2 <- error r2 deadline_exceeded"]);
}

#[test]
fn an_error_is_everyones_and_is_not_kept() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.client_says("c2", &same("r2"));
    farm.fails("gpu-0", "r1", ErrorCode::LoraMismatch);
    farm.assert_commands(&[
        "gpu-0 <- work r1",
        "c1 <- error r1 lora_mismatch",
        "c2 <- error r2 lora_mismatch",
    ]);
    farm.client_says("c1", &same("r3"));
    farm.assert_commands(&["gpu-0 <- work r3"]);
}

#[test]
fn requests_that_differ_in_anything_are_not_equal() {
    let mut farm = TestBroker::new();
    let announcement = Ready { slots: 100, ..farm.announcement("gpu-0", &["anime"]) };
    farm.ready("gpu-0", &["anime"]);
    farm.worker_says("gpu-0", &Ready { epoch: 1, ..announcement });
    let options = EncodeOptions { clip_skip: Some(-2), ..EncodeOptions::default() };
    let stack = encode("x", &["anime"]).stack;
    let mut stronger = stack.clone();
    stronger[0].strength_patch = 0.5;
    for (number, request) in [
        same("r"),
        ClipEncode { options, ..same("r") },
        ClipEncode { stack, ..same("r") },
        ClipEncode { stack: stronger, ..same("r") },
        ClipEncode { model_digest: Some(model("sd15").digest), ..same("r") },
        ClipEncode { prompts: encode("other", &[]).prompts, ..same("r") },
        ClipEncode { no_cache: true, ..same("r") },
        ClipEncode { no_cache: true, ..same("r") },
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("r{number}");
        farm.client_says("c1", &ClipEncode { id: id.parse().unwrap(), ..request });
        farm.assert_commands(&[&format!("gpu-0 <- work {id}")]);
    }
    // Attachments count, and so do fields that nobody knows yet.
    for (id, attachment) in [("a1", "x"), ("a2", "y"), ("a3", "xy")] {
        let attachments = vec![Bytes::from_static(attachment.as_bytes())];
        farm.client_sends("c1", frames::frames(&same(id), attachments));
        farm.assert_commands(&[&format!("gpu-0 <- work {id}")]);
    }
    let mut header = protocol::header::write(&same("u1"));
    header[0] += 1;
    header.extend_from_slice(b"\xa6future\x01");
    farm.client_sends("c1", frames::frames_of(header.into(), vec![]));
    farm.assert_commands(&["gpu-0 <- work u1"]);
}

#[test]
fn an_answer_is_given_again_at_once_and_says_so() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.answers("gpu-0", "r1");
    farm.shown();

    farm.client_says("c2", &ClipEncode { budget_ms: Some(7), ..same("r2") });

    farm.assert_commands(&["c2 <- clip_encode_reply r2"]);
    let reply: ClipEncodeReply = farm.last_reply();
    assert_eq!((reply.id.as_str(), reply.receipt.cache), ("r2", Some(CacheUse::Hit)));
    assert_eq!(farm.replies.last().unwrap().1[2], "cond r1");
    let counters = farm.counters();
    assert_eq!((counters.accepted, counters.answered, counters.cache_hits), (2, 2, 1));
}

#[test]
fn whoever_wants_it_computed_anew_gets_it_and_leaves_nothing_behind() {
    let mut farm = farm();
    let anew = |id: &str| ClipEncode { no_cache: true, ..same(id) };
    farm.client_says("c1", &anew("r1"));
    farm.answers("gpu-0", "r1");
    farm.client_says("c1", &same("r2"));
    farm.answers("gpu-0", "r2");
    farm.client_says("c1", &anew("r3"));
    farm.assert_commands(&[
        "gpu-0 <- work r1",
        "c1 <- clip_encode_reply r1",
        "gpu-0 <- work r2",
        "c1 <- clip_encode_reply r2",
        "gpu-0 <- work r3",
    ]);
}

#[test]
fn answers_are_forgotten_after_a_minute() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.answers("gpu-0", "r1");
    farm.shown();
    for seconds in 1..60 {
        farm.after(SECOND);
        farm.alive("gpu-0", &[]);
        farm.client_says("c1", &same(&format!("h{seconds}")));
        farm.assert_commands(&[&format!("c1 <- clip_encode_reply h{seconds}")]);
    }
    farm.after(SECOND);
    farm.client_says("c1", &same("r2"));
    farm.assert_commands(&["gpu-0 <- work r2"]);
}

#[test]
fn an_answer_counts_only_while_its_model_is_served() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.answers("gpu-0", "r1");
    farm.shown();
    let mut other = model("sd15");
    other.digest = protocol::ModelDigest::of(b"retrained");
    let announcement = farm.announcement("gpu-0", &[]);
    farm.worker_says("gpu-0", &Ready { epoch: 9, models: vec![other], ..announcement });
    farm.client_says("c1", &same("r2"));
    farm.assert_commands(&["gpu-0 <- work r2"]);
}

#[test]
fn answers_made_with_a_deleted_adapter_are_dropped() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    farm.ready("gpu-0", &["anime"]);
    let with = |id: &str| ClipEncode { stack: encode("x", &["anime"]).stack, ..same(id) };
    farm.client_says("c1", &with("r1"));
    farm.answers("gpu-0", "r1");
    farm.shown();
    let evict = EvictLora { id: "e".parse().unwrap(), adapters: ids(&["anime"]), delete: true };
    farm.client_says("c1", &evict);
    farm.store_works();
    farm.shown();
    farm.client_says("c1", &with("r2"));
    farm.assert_commands(&["gpu-0 <- work r2"]);
}

#[test]
fn the_cache_is_bounded_by_bytes_and_can_be_switched_off() {
    let limits = Limits { answers_bytes_max: 16 << 10, ..Limits::default() };
    for (limits, kept) in
        [(limits.clone(), true), (Limits { answers_bytes_max: 0, ..limits }, false)]
    {
        let mut farm = TestBroker::starting(limits);
        farm.ready("gpu-0", &[]);
        for number in 0..100 {
            let id = format!("r{number}");
            farm.encode("c1", &id, &[]);
            farm.answers("gpu-0", &id);
        }
        farm.shown();
        for (number, kept) in [(0, false), (99, kept)] {
            let id = format!("r{number}");
            farm.encode("c1", &id, &[]);
            let reply = format!("c1 <- clip_encode_reply {id}");
            let work = format!("gpu-0 <- work {id}");
            farm.assert_commands(&[if kept { &reply } else { &work }]);
        }
    }
}

#[test]
fn followers_are_bounded() {
    let mut farm = TestBroker::starting(Limits { queued_max: 2, ..Limits::default() });
    farm.ready("gpu-0", &[]);
    for id in ["r1", "r2", "r3", "r4"] {
        farm.client_says("c1", &same(id));
    }
    farm.assert_commands(&["gpu-0 <- work r1", "c1 <- error r4 overloaded"]);
}

#[test]
fn a_reply_that_cannot_be_changed_is_an_error_for_the_others() {
    let mut farm = farm();
    farm.client_says("c1", &same("r1"));
    farm.client_says("c2", &same("r2"));
    farm.shown();
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["c1 <- reply to r1", "c2 <- error r2 internal"]);
    assert!(farm.last_reply::<ErrorReply>().message.contains("no `id`"));
}

fn farm() -> TestBroker {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm
}

/// Requests of other ids that ask the same.
fn same(id: &str) -> ClipEncode {
    ClipEncode { id: id.parse().unwrap(), ..encode("same", &[]) }
}
