//! Workers that die, fall silent, come back, leave, and say what nobody expects.

use std::time::Duration;

use bytes::Bytes;
use protocol::{
    ErrorReply, frames,
    reply::StatusReply,
    request::Status,
    worker::{Alive, Done, Fetch, Inventory, Ready},
};

use crate::{
    BlobOutcome, Notice,
    testing::{TestBroker, id, ids},
};

const MILLISECOND: Duration = Duration::from_millis(1);

#[test]
fn what_a_lost_worker_had_goes_out_again_before_everything_else() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.shown();

    farm.worker_dies("gpu-0");
    farm.ready("gpu-1", &[]);
    farm.assert_commands(&["gpu-1 <- work r1", "gpu-1 <- work r2"]);
    farm.done("gpu-1", "r1");
    farm.assert_commands(&["c1 <- reply to r1", "gpu-1 <- work r3"]);
}

#[test]
fn a_request_that_lost_three_workers_is_given_up() {
    let mut farm = TestBroker::new();
    let workers = ["gpu-0", "gpu-1", "gpu-2"];
    for worker in workers {
        farm.ready(worker, &[]);
    }
    farm.encode("c1", "poison", &[]);
    for worker in workers {
        farm.worker_dies(worker);
    }
    farm.assert_commands(&[
        "gpu-0 <- work poison",
        "gpu-1 <- work poison",
        "gpu-2 <- work poison",
        "c1 <- error poison worker_lost",
    ]);
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains("`gpu-0`, `gpu-1`, `gpu-2`"), "{}", error.message);
    assert!(error.retryable);
}

#[test]
fn a_silent_worker_counts_as_lost_after_two_seconds() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.after(1500 * MILLISECOND);
    farm.alive("gpu-0", &["r1"]);
    farm.after(1999 * MILLISECOND);
    farm.ready("gpu-1", &[]);
    farm.assert_commands(&["gpu-0 <- work r1"]);

    farm.after(MILLISECOND);
    farm.assert_commands(&["gpu-1 <- work r1"]);
    farm.alive("gpu-0", &["r1"]);
    farm.assert_commands(&["gpu-0 <- announce"]);
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["gpu-0 <- announce"]);
    farm.done("gpu-1", "r1");
    farm.assert_commands(&["c1 <- reply to r1"]);
}

#[test]
fn a_paused_worker_that_is_the_only_one_may_try_again() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.after(3000 * MILLISECOND);
    farm.shown();
    let again = farm.announcement("gpu-0", &[]);
    farm.worker_says("gpu-0", &again);
    farm.assert_commands(&["gpu-0 <- work r1"]);
}

#[test]
fn a_worker_that_was_given_up_lets_go_of_what_it_had() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    let stale = farm.dispatch("r1");
    farm.after(2000 * MILLISECOND);
    farm.ready("gpu-1", &[]);
    farm.shown();

    let again = Ready { in_flight: vec![stale], ..farm.announcement("gpu-0", &[]) };
    farm.worker_says("gpu-0", &again);
    farm.assert_commands(&["gpu-0 <- cancel_work r1"]);
}

#[test]
fn a_newer_process_of_the_same_name_takes_over() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &["old"]);
    farm.encode("c1", "r1", &[]);
    let stale = farm.heartbeat("gpu-0", &["r1"]);
    farm.ready("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r1"]);
    farm.worker_says("gpu-0", &stale);
    farm.assert_commands(&["gpu-0 <- announce"]);

    farm.done_by_epoch("gpu-0", "r1", 1);
    farm.assert_commands(&[]);
    farm.done_by_epoch("gpu-0", "r1", 2);
    farm.assert_commands(&["c1 <- reply to r1"]);
    farm.encode("c1", "r2", &["old"]);
    farm.assert_commands(&["c1 <- error r2 unknown_lora"]);
}

#[test]
fn the_same_process_on_a_new_connection_keeps_what_it_holds() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &[]);
    farm.shown();
    let in_flight = vec![farm.dispatch("r2")];

    farm.reconnect("gpu-0");
    let again = Ready { in_flight, ..farm.announcement("gpu-0", &[]) };
    farm.worker_says("gpu-0", &again);

    farm.assert_commands(&["gpu-0 <- work r1"]);
    farm.done("gpu-0", "r2");
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["c1 <- reply to r2", "c1 <- reply to r1"]);
}

#[test]
fn a_worker_that_says_goodbye_or_drains_takes_no_blame() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.disconnect("gpu-0");
    farm.ready("gpu-1", &[]);
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-1 <- work r1"]);

    let draining = Alive { draining: true, ..farm.heartbeat("gpu-1", &["r1"]) };
    farm.worker_says("gpu-1", &draining);
    farm.encode("c1", "r2", &[]);
    farm.assert_commands(&["gpu-1 <- released"]);
    farm.worker_dies("gpu-1");
    farm.ready("gpu-2", &[]);
    farm.assert_commands(&["gpu-2 <- work r1", "gpu-2 <- work r2"]);

    // Two workers were left behind, and the request may still lose one.
    farm.worker_dies("gpu-2");
    farm.ready("gpu-3", &[]);
    farm.assert_commands(&["gpu-3 <- work r1", "gpu-3 <- work r2"]);
    farm.client_says("c1", &Status { id: "s".parse().unwrap() });
    assert_eq!(farm.last_reply::<StatusReply>().counters.workers_lost, 1);
}

#[test]
fn a_dispatch_that_never_arrived_goes_out_again_after_600_ms() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.after(600 * MILLISECOND);
    farm.alive("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
    let lost = farm.dispatch("r1");
    farm.after(MILLISECOND);
    farm.alive("gpu-0", &[]);
    // What counts as lost may only be late: the worker lets go of it when it arrives.
    farm.assert_commands(&["gpu-0 <- cancel_work r1", "gpu-0 <- work r1"]);
    assert_ne!(farm.dispatch("r1"), lost, "a dispatch is never sent twice");
}

#[test]
fn whoever_the_broker_does_not_know_is_asked_to_announce_itself() {
    let mut farm = TestBroker::new();
    let alive = Alive { epoch: 7, in_flight: vec![1], ..Alive::default() };
    farm.worker_says("gpu-0", &alive);
    farm.assert_commands(&["gpu-0 <- announce"]);
    farm.ready("gpu-0", &[]);
    farm.alive("gpu-0", &[]);
    farm.assert_commands(&[]);
}

#[test]
fn a_missed_revision_is_asked_for() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let changed = Alive {
        revision: 2,
        inventory: Some(Inventory { device: ids(&["anime"]), ..Inventory::default() }),
        ..farm.heartbeat("gpu-0", &[])
    };
    farm.worker_says("gpu-0", &changed);
    farm.encode("c1", "r1", &["anime"]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
    let missed = Alive { revision: 4, ..farm.heartbeat("gpu-0", &["r1"]) };
    farm.worker_says("gpu-0", &missed);
    farm.assert_commands(&["gpu-0 <- announce"]);
}

#[test]
fn dispatches_of_an_earlier_broker_are_nobodys() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let in_flight = vec![1, 2, 3];
    let again = Ready { in_flight, ..farm.announcement("gpu-0", &[]) };
    farm.worker_says("gpu-0", &again);
    farm.encode("c1", "r1", &[]);
    let done = Done { epoch: 1, dispatch: 2, ..Done::default() };
    farm.worker_sends("gpu-0", frames::frames(&done, vec!["wrong".into()]));
    let called_off = "gpu-0 <- cancel_work (unknown)";
    farm.assert_commands(&[called_off, called_off, called_off, "gpu-0 <- work r1"]);
}

#[test]
fn garbage_of_a_worker_is_noticed_and_does_no_harm() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.notices.clear();
    let magic = Bytes::from_static(frames::MAGIC);
    farm.worker_sends("gpu-0", vec![]);
    farm.worker_sends("gpu-0", vec![magic.clone(), "x".into()]);
    farm.worker_sends("gpu-0", vec![magic.clone(), Bytes::from_static(b"\x81\xa4kind\xa4done")]);
    farm.worker_sends("gpu-0", vec![magic, Bytes::from_static(b"\x81\xa4kind\xa5dance")]);
    assert_eq!(farm.notices.len(), 4);
    assert!(farm.notices.iter().all(|n| matches!(n, Notice::WorkerGarbage { .. })));
    farm.encode("c1", "r1", &[]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
}

#[test]
fn an_answer_without_a_reply_is_the_workers_fault() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    let dispatch = farm.dispatch("r1");
    farm.worker_says("gpu-0", &Done { epoch: 1, dispatch, ..Done::default() });
    farm.assert_commands(&["gpu-0 <- work r1", "c1 <- error r1 internal"]);
}

#[test]
fn a_worker_fetches_what_it_lacks_in_bounded_chunks() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.stored("anime");
    let fetch = |name: &str, length| Fetch { blob: id(name).into(), offset: 4, length };

    farm.worker_says("gpu-0", &fetch("anime", u32::MAX));
    farm.assert_commands(&["store <- read 4+1048576"]);
    farm.store_answers(BlobOutcome::Read { size: 10, bytes: "456789".into() });
    farm.assert_commands(&["gpu-0 <- blob"]);
    farm.worker_says("gpu-0", &fetch("nowhere", 1));
    farm.assert_commands(&["gpu-0 <- no_blob: the blob store does not hold it"]);
}

#[test]
fn a_worker_may_have_a_bounded_number_of_fetches_open() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.stored("anime");
    for _ in 0..257 {
        farm.worker_says("gpu-0", &Fetch { blob: id("anime").into(), offset: 0, length: 1 });
    }
    let shown = farm.shown();
    assert_eq!(shown.len(), 64, "the store is given 64 at once, and one fetch is not answered");
    farm.store_works();
    assert_eq!(farm.shown().iter().filter(|line| *line == "gpu-0 <- blob").count(), 256);
}

#[test]
fn a_second_attempt_says_so() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.worker_dies("gpu-0");
    farm.after(100 * MILLISECOND);
    farm.ready("gpu-1", &[]);
    let work = farm.last_work.clone().unwrap();
    assert_eq!((work.attempt, work.queued_ms, work.budget_ms), (2, 100, 29_900));
}
