//! Scenarios of workers and brokers that take nothing new.

use protocol::{
    ErrorCode, ErrorReply,
    reply::{DrainReply, StatusReply},
    request::{Drain, Status},
    worker::Alive,
};

use super::warming::holds;
use crate::testing::TestBroker;

#[test]
fn a_worker_that_leaves_hands_over_what_it_alone_has() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    farm.stored("shared");
    farm.ready("gpu-0", &["anime", "shared", "unstored"]);
    farm.ready("gpu-1", &["shared"]);
    farm.encode("c1", "r1", &["anime"]);
    farm.done("gpu-0", "r1");
    farm.shown();

    stops(&mut farm, "gpu-0");
    farm.assert_commands(&["gpu-1 <- prefetch 1"]);
    stops(&mut farm, "gpu-0");
    farm.assert_commands(&[]);
    holds(&mut farm, "gpu-1", 1, &["shared", "anime"], &[]);
    farm.assert_commands(&["gpu-0 <- released"]);
    stops(&mut farm, "gpu-0");
    farm.assert_commands(&["gpu-0 <- released"]);
    farm.disconnect("gpu-0");
    farm.encode("c1", "r2", &["anime"]);
    farm.assert_commands(&["gpu-1 <- work r2"]);
}

#[test]
fn a_worker_that_has_nothing_to_hand_over_may_leave_at_once() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &["unstored"]);
    stops(&mut farm, "gpu-0");
    farm.assert_commands(&["gpu-0 <- released"]);
}

#[test]
fn a_worker_does_not_wait_for_one_that_leaves_as_well() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    farm.ready("gpu-0", &["anime"]);
    farm.ready("gpu-1", &[]);
    farm.shown();
    stops(&mut farm, "gpu-0");
    farm.assert_commands(&["gpu-1 <- prefetch 1"]);
    stops(&mut farm, "gpu-1");
    farm.assert_commands(&["gpu-1 <- released", "gpu-0 <- released", "gpu-1 <- released"]);
}

#[test]
fn what_was_not_used_for_long_is_not_handed_over() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    farm.ready("gpu-1", &[]);
    farm.ready("gpu-0", &["anime"]);
    for _ in 0..620 {
        farm.after(std::time::Duration::from_secs(1));
        farm.alive("gpu-0", &[]);
        farm.alive("gpu-1", &[]);
    }
    farm.shown();
    stops(&mut farm, "gpu-0");
    farm.assert_commands(&["gpu-0 <- released"]);
}

#[test]
fn an_operator_drains_a_worker_and_takes_it_back() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &[]);
    farm.shown();
    farm.client_says("op", &drain(Some("gpu-0"), Some("a new driver")));
    farm.assert_commands(&["gpu-0 <- drain_worker", "gpu-0 <- released", "op <- drain_reply d"]);
    let reply: DrainReply = farm.last_reply();
    assert!(reply.draining && reply.in_flight == 0);
    // What it said before the order arrived changes nothing.
    farm.alive("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &[]);
    farm.assert_commands(&["gpu-0 <- released", "gpu-1 <- work r1", "gpu-1 <- work r2"]);
    assert_eq!(worker(&mut farm, 0), (true, Some("a new driver".to_owned())));

    // The process comes back on another connection, and the order stands.
    farm.reconnect("gpu-0");
    let again = farm.announcement("gpu-0", &[]);
    farm.worker_says("gpu-0", &again);
    assert_eq!(farm.shown(), ["gpu-0 <- drain_worker", "gpu-0 <- released"]);
    farm.encode("c1", "r3", &[]);
    farm.assert_commands(&[]);
    farm.client_says("op", &Drain { undo: true, ..drain(Some("gpu-0"), None) });
    farm.assert_commands(&["gpu-0 <- drain_worker", "op <- drain_reply d", "gpu-0 <- work r3"]);
    assert_eq!(worker(&mut farm, 0), (false, None));
}

#[test]
fn a_restarted_worker_serves_again() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("op", &drain(Some("gpu-0"), None));
    assert_eq!(worker(&mut farm, 0), (true, Some("an operator drains it".to_owned())));
    farm.disconnect("gpu-0");
    farm.ready("gpu-0", &[]);
    assert_eq!(worker(&mut farm, 0), (false, None));
}

#[test]
fn the_reason_is_told_to_those_who_wait() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("op", &drain(Some("gpu-0"), Some("a new driver")));
    farm.encode("c1", "r1", &[]);
    let status = status(&mut farm);
    assert!(!status.ready);
    assert!(status.reasons.contains(&"worker `gpu-0` (a new driver) drains".to_owned()));
    for _ in 0..31 {
        farm.after(std::time::Duration::from_secs(1));
        farm.alive("gpu-0", &[]);
    }
    let error: ErrorReply = reply_of(&farm, "c1");
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
    assert!(error.message.contains("drains: `gpu-0` (a new driver)"), "{}", error.message);
}

#[test]
fn an_operator_drains_the_broker_and_takes_it_back_unless_it_stops() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("op", &drain(None, Some("an upgrade")));
    farm.encode("c1", "r1", &[]);
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.message.contains("the broker is draining: an upgrade"), "{}", error.message);
    farm.shown();

    farm.client_says("op", &Drain { undo: true, ..drain(None, None) });
    farm.encode("c1", "r2", &[]);
    farm.assert_commands(&["op <- drain_reply d", "gpu-0 <- work r2"]);
    farm.broker.drain("SIGTERM received");
    farm.client_says("op", &Drain { undo: true, ..drain(None, None) });
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::InvalidRequest);
}

#[test]
fn what_cannot_be_drained_is_refused() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("op", &drain(Some("gpu-7"), None));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    assert_eq!(error.message, "there is no worker `gpu-7`: the farm has `gpu-0`");
    farm.client_says("op", &drain(Some("gpu-0"), Some(&"x".repeat(257))));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
}

fn drain(worker: Option<&str>, reason: Option<&str>) -> Drain {
    Drain {
        id: "d".parse().unwrap(),
        worker: worker.map(|name| name.parse().unwrap()),
        reason: reason.map(str::to_owned),
        undo: false,
    }
}

/// A worker that was told to stop says so.
fn stops(farm: &mut TestBroker, worker: &str) {
    let drain_reason = Some("the process was told to stop".to_owned());
    let alive = Alive { draining: true, drain_reason, ..farm.heartbeat(worker, &[]) };
    farm.worker_says(worker, &alive);
}

fn status(farm: &mut TestBroker) -> StatusReply {
    farm.client_says("asking", &Status { id: "s".parse().unwrap() });
    farm.shown();
    farm.last_reply()
}

/// Whether a worker drains, and why.
fn worker(farm: &mut TestBroker, index: usize) -> (bool, Option<String>) {
    let worker = status(farm).workers.swap_remove(index);
    (worker.draining, worker.drain_reason)
}

fn reply_of<H: protocol::Header>(farm: &TestBroker, client: &str) -> H {
    let (_, frames) = farm.replies.iter().rev().find(|(name, _)| name == client).unwrap();
    protocol::Envelope::open(frames.clone()).unwrap().read().unwrap()
}
