//! What workers' journals say about processes that died, and what the broker makes of it.

use std::time::Duration;

use protocol::{
    ErrorReply, RequestDigest,
    request::ClipEncode,
    worker::{Busy, Death, Ready},
};

use super::{SECOND, poison};
use crate::testing::{TestBroker, encode};

#[test]
fn what_a_journal_tells_counts_once() {
    let (mut farm, key) = struck_once();
    // The broker saw the death of epoch 1 itself; that of epoch 0 happened before it started.
    back(&mut farm, "gpu-0", &[death(1, &[busy(key)])]);
    farm.client_says("c2", &poison("r2"));
    farm.assert_commands(&["gpu-0 <- work r2"]);
    farm.client_leaves("c2");
    let other = RequestDigest::of(b"other");
    let deaths =
        [death(0, &[alone(key), busy(other)]), death(1, &[busy(key)]), death(7, &[busy(key)])];
    say_again(&mut farm, "gpu-0", &deaths);
    farm.shown();
    farm.client_says("c3", &poison("r3"));
    farm.assert_commands(&["c3 <- error r3 worker_lost"]);
    assert_eq!(farm.counters().quarantined, 1);
    say_again(&mut farm, "gpu-0", &deaths);
    assert_eq!(farm.counters().quarantined, 1);
}

#[test]
fn a_broker_that_restarts_learns_from_the_journals() {
    let key = struck_once().1;
    let mut farm = TestBroker::new();
    back(&mut farm, "gpu-0", &[death(8, &[busy(key)]), death(9, &[busy(key)])]);
    farm.client_says("c1", &poison("r1"));
    farm.assert_commands(&["gpu-0 <- work r1"]);
    let work = farm.last_work.clone().unwrap();
    assert!(work.alone, "the third try decides");
    farm.worker_dies("gpu-0");
    farm.assert_commands(&["c1 <- error r1 worker_lost"]);
    assert_eq!(farm.counters().quarantined, 1);

    let mut farm = TestBroker::new();
    let deaths = [death(8, &[busy(key)]), death(9, &[busy(key)]), death(10, &[alone(key)])];
    back(&mut farm, "gpu-0", &deaths);
    farm.client_says("c1", &poison("r1"));
    farm.assert_commands(&["c1 <- error r1 worker_lost"]);
    assert_eq!(farm.counters().quarantined, 1);
}

#[test]
fn deaths_are_forgotten_as_if_the_broker_had_seen_them() {
    let key = struck_once().1;
    let mut farm = TestBroker::new();
    let ago = |epoch, ago_s| Death { ago_s, ..death(epoch, &[alone(key)]) };
    back(&mut farm, "gpu-0", &[ago(1, 601), ago(2, 590), ago(3, 580)]);
    farm.client_says("c1", &poison("r1"));
    farm.assert_commands(&["gpu-0 <- work r1"]);
    farm.client_leaves("c1");
    back(&mut farm, "gpu-1", &[ago(1, 560)]);
    farm.shown();
    farm.client_says("c2", &poison("r2"));
    farm.assert_commands(&["c2 <- error r2 worker_lost"]);
    assert_eq!(farm.last_reply::<ErrorReply>().retry_after_ms, Some(40_000));
}

#[test]
fn what_only_waited_at_a_dead_worker_is_no_suspect() {
    let mut farm = TestBroker::new();
    let mut poison_key = None;
    for worker in ["gpu-0", "gpu-1"] {
        farm.ready(worker, &[]);
        farm.client_says("c1", &poison("r1"));
        poison_key = farm.last_work.as_ref().unwrap().key;
        farm.client_says("c1", &innocent("r2"));
        farm.worker_dies(worker);
        farm.client_leaves("c1");
    }
    let key = poison_key.unwrap();
    back(&mut farm, "gpu-0", &[death(1, &[busy(key)])]);
    back(&mut farm, "gpu-1", &[death(1, &[busy(key)])]);
    farm.shown();
    farm.client_says("c2", &poison("r3"));
    farm.client_says("c2", &innocent("r4"));
    let works = farm.shown();
    assert_eq!(works.len(), 2, "each has a worker: {works:?}");
    assert!(!farm.last_work.as_ref().unwrap().alone, "it is like any other");
}

#[test]
fn a_journal_acquits_what_was_convicted_wrongly() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &poison("r1"));
    for _ in 0..2 {
        farm.worker_dies("gpu-0");
        farm.ready("gpu-0", &[]);
    }
    farm.worker_dies("gpu-0");
    farm.shown();
    farm.client_says("c1", &poison("r2"));
    farm.assert_commands(&["c1 <- error r2 worker_lost"]);
    // Somebody had killed the last one before it began.
    back(&mut farm, "gpu-0", &[death(3, &[])]);
    farm.client_says("c1", &poison("r3"));
    farm.assert_commands(&["gpu-0 <- work r3"]);
}

#[test]
fn what_was_answered_since_stays_cleared() {
    let (mut farm, key) = struck_once();
    farm.ready("gpu-1", &[]);
    farm.client_says("c2", &poison("r2"));
    farm.answers("gpu-1", "r2");
    farm.worker_dies("gpu-1");
    farm.shown();
    // It had been busy with it, and yet the request is innocent: two more deaths are needed.
    back(&mut farm, "gpu-0", &[death(1, &[busy(key)])]);
    farm.client_says("c3", &ClipEncode { no_cache: true, ..poison("r3") });
    farm.worker_dies("gpu-0");
    farm.ready("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- work r3", "gpu-0 <- work r3"]);
    assert!(!farm.last_work.as_ref().unwrap().alone);
}

#[test]
fn what_a_worker_ran_for_an_earlier_broker_counts() {
    let key = struck_once().1;
    let mut farm = TestBroker::new();
    // The broker never gave it to this process, but the journal knows.
    farm.ready("gpu-0", &[]);
    farm.worker_dies("gpu-0");
    back(&mut farm, "gpu-0", &[death(1, &[busy(key)]), death(5, &[busy(key)])]);
    farm.shown();
    farm.client_says("c1", &poison("r1"));
    assert!(farm.last_work.as_ref().unwrap().alone);
}

#[test]
fn a_newer_process_tells_before_its_predecessor_is_missed() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &poison("r1"));
    for epoch in 1..=4 {
        // The old connection is still open.
        back(&mut farm, "gpu-0", &[death(epoch, &[])]);
        assert!(!farm.last_work.as_ref().unwrap().alone);
    }
    farm.assert_commands(&["gpu-0 <- work r1"; 5]);
}

#[test]
fn after_a_death_one_worker_at_a_time_has_the_request() {
    let mut farm = TestBroker::new();
    for worker in ["gpu-0", "gpu-1", "gpu-2"] {
        farm.ready(worker, &[]);
    }
    let solo = |id| ClipEncode { no_cache: true, ..poison(id) };
    farm.client_says("c1", &solo("r1"));
    farm.client_says("c2", &solo("r2"));
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-1 <- work r2"]);
    farm.worker_dies("gpu-0");
    farm.assert_commands(&[]);
    farm.worker_dies("gpu-1");
    assert_eq!(farm.shown().len(), 1, "one of them is tried alone");
    farm.worker_dies("gpu-2");
    farm.after(SECOND);
    farm.ready("gpu-0", &[]);
    let mut ended = farm.shown();
    ended.sort();
    assert_eq!(ended, ["c1 <- error r1 worker_lost", "c2 <- error r2 worker_lost"]);
}

/// A farm whose first worker died with the poison in hand, and the poison's key.
fn struck_once() -> (TestBroker, RequestDigest) {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &poison("r1"));
    let key = farm.last_work.as_ref().unwrap().key.unwrap();
    farm.worker_dies("gpu-0");
    farm.client_leaves("c1");
    farm.after(Duration::from_millis(1));
    farm.shown();
    (farm, key)
}

/// A new process of `worker` announces itself with this journal.
fn back(farm: &mut TestBroker, worker: &str, deaths: &[Death]) {
    farm.begin_process(worker);
    say_again(farm, worker, deaths);
}

fn say_again(farm: &mut TestBroker, worker: &str, deaths: &[Death]) {
    let ready = Ready { died_with: deaths.to_vec(), ..farm.announcement(worker, &[]) };
    farm.worker_says(worker, &ready);
}

fn death(epoch: u64, busy_with: &[Busy]) -> Death {
    Death { epoch, ago_s: 0, busy_with: busy_with.to_vec() }
}

fn busy(key: RequestDigest) -> Busy {
    Busy { key, alone: false }
}

fn alone(key: RequestDigest) -> Busy {
    Busy { key, alone: true }
}

fn innocent(id: &str) -> ClipEncode {
    ClipEncode { id: id.parse().unwrap(), ..encode("innocent", &[]) }
}
