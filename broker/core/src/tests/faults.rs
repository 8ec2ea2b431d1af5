//! Requests that workers die of, workers that keep failing, and the budget for trying again.

mod journals;

use std::time::Duration;

use protocol::{
    ErrorCode, ErrorReply,
    request::{Cancel, ClipEncode},
};

use crate::{
    Limits,
    testing::{TestBroker, encode},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_same_poison_is_refused_whoever_sends_it() {
    let mut farm = TestBroker::new();
    for worker in ["gpu-0", "gpu-1", "gpu-2", "gpu-3"] {
        farm.ready(worker, &[]);
    }
    farm.client_says("c1", &poison("r1"));
    for worker in ["gpu-0", "gpu-1", "gpu-2"] {
        farm.worker_dies(worker);
    }
    farm.assert_commands(&[
        "gpu-0 <- work r1",
        "gpu-1 <- work r1",
        "gpu-2 <- work r1",
        "c1 <- error r1 worker_lost",
    ]);

    farm.client_says("c2", &ClipEncode { no_cache: true, ..poison("r2") });
    farm.assert_commands(&["c2 <- error r2 worker_lost"]);
    assert_eq!(farm.last_reply::<ErrorReply>().retry_after_ms, Some(600_000));
    farm.encode("c2", "innocent", &[]);
    farm.assert_commands(&["gpu-3 <- work innocent"]);
    assert_eq!(farm.counters().quarantined, 1);

    farm.after(Limits::default().quarantine);
    farm.ready("gpu-3", &[]);
    farm.shown();
    farm.client_says("c2", &poison("r3"));
    farm.assert_commands(&["gpu-3 <- work r3"]);
}

#[test]
fn strikes_outlive_the_request_and_an_answer_clears_them() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &poison("r1"));
    farm.worker_dies("gpu-0");
    farm.client_leaves("c1");
    farm.ready("gpu-1", &[]);
    farm.client_says("c2", &poison("r2"));
    farm.answers("gpu-1", "r2");
    farm.shown();
    // It was in hand when a worker died, and is innocent. Now three more die.
    let anew = ClipEncode { no_cache: true, ..poison("r3") };
    farm.client_says("c2", &anew);
    for (dies, comes) in [("gpu-1", "gpu-2"), ("gpu-2", "gpu-3")] {
        farm.worker_dies(dies);
        farm.ready(comes, &[]);
    }
    farm.assert_commands(&["gpu-1 <- work r3", "gpu-2 <- work r3", "gpu-3 <- work r3"]);
    farm.worker_dies("gpu-3");
    farm.assert_commands(&["c2 <- error r3 worker_lost"]);
}

#[test]
fn the_last_try_has_a_worker_to_itself() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &poison("r1"));
    farm.encode("c1", "innocent", &[]);
    for _ in 0..2 {
        farm.worker_dies("gpu-0");
        farm.ready("gpu-0", &[]);
    }
    farm.shown();
    // Both are suspects now, and one of them has the worker.
    farm.encode("c1", "next", &[]);
    farm.assert_commands(&[]);
    farm.worker_dies("gpu-0");
    farm.assert_commands(&["c1 <- error r1 worker_lost"]);

    farm.ready("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- work innocent"]);
    farm.done("gpu-0", "innocent");
    farm.assert_commands(&["c1 <- reply to innocent", "gpu-0 <- work next"]);
    assert_eq!(farm.counters().quarantined, 1);
}

#[test]
fn a_busy_worker_is_emptied_for_a_suspect() {
    let mut farm = TestBroker::new();
    for worker in ["gpu-0", "gpu-1"] {
        farm.ready(worker, &[]);
        farm.client_says("c1", &poison("r1"));
        farm.worker_dies(worker);
        farm.client_leaves("c1");
    }
    farm.ready("gpu-2", &[]);
    farm.encode("c2", "a", &[]);
    farm.shown();
    farm.client_says("c2", &poison("r2"));
    farm.encode("c2", "b", &[]);
    farm.assert_commands(&[]);
    farm.done("gpu-2", "a");
    farm.assert_commands(&["c2 <- reply to a", "gpu-2 <- work r2"]);
    // Its client gives up, and it may kill the worker all the same.
    farm.client_says("c2", &cancel("r2"));
    farm.assert_commands(&[
        "gpu-2 <- cancel_work r2",
        "c2 <- error r2 cancelled",
        "c2 <- cancel_reply cancel",
    ]);
    farm.worker_dies("gpu-2");
    farm.ready("gpu-3", &[]);
    farm.assert_commands(&["gpu-3 <- work b"]);
    farm.client_says("c3", &poison("r3"));
    farm.assert_commands(&["c3 <- error r3 worker_lost"]);
}

#[test]
fn a_worker_that_keeps_failing_is_left_out_and_probed() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &[]);
    fails_until_ejected(&mut farm);
    assert_eq!(farm.counters().ejected, 1);
    for request in ["a", "b", "c"] {
        farm.encode("c1", request, &[]);
    }
    farm.assert_commands(&["gpu-1 <- work a", "gpu-1 <- work b"]);

    farm.after(SECOND);
    farm.assert_commands(&["gpu-0 <- work c"]);
    farm.encode("c1", "d", &[]);
    farm.assert_commands(&[]);
    farm.done("gpu-0", "c");
    farm.assert_commands(&["c1 <- reply to c", "gpu-0 <- work d"]);
}

#[test]
fn the_only_worker_is_never_left_out() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for number in 0..10 {
        let request = format!("r{number}");
        farm.encode("c1", &request, &[]);
        farm.fails("gpu-0", &request, ErrorCode::Internal);
    }
    assert_eq!(farm.counters().ejected, 0);
}

#[test]
fn errors_that_are_the_requests_fault_are_not_held_against_the_worker() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &[]);
    for number in 0..20 {
        let request = format!("r{number}");
        farm.encode("c1", &request, &[]);
        let worker = if farm.shown()[0].starts_with("gpu-0") { "gpu-0" } else { "gpu-1" };
        match worker {
            "gpu-0" => farm.fails(worker, &request, ErrorCode::LoraMismatch),
            _ => farm.done(worker, &request),
        }
        farm.shown();
    }
    assert_eq!(farm.counters().ejected, 0);
}

#[test]
fn requests_are_not_tried_again_for_ever() {
    let limits = Limits { losses_max: usize::MAX, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    farm.client_says("c1", &poison("r1"));
    let mut deaths = 0;
    while farm.replies.iter().all(|(client, _)| client != "c1") {
        farm.ready("gpu-0", &[]);
        farm.worker_dies("gpu-0");
        deaths += 1;
        assert!(deaths < 1000, "it is tried again for ever");
    }
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::Overloaded);
    assert!(error.retry_after_ms.is_some_and(|ms| ms <= 334));
}

/// `gpu-1` answers, `gpu-0` does not.
fn fails_until_ejected(farm: &mut TestBroker) {
    for number in 0..20 {
        let request = format!("f{number}");
        farm.encode("c1", &request, &[]);
        if farm.shown()[0].starts_with("gpu-0") {
            farm.fails("gpu-0", &request, ErrorCode::Internal);
        } else {
            farm.done("gpu-1", &request);
        }
        farm.shown();
    }
}

fn cancel(request: &str) -> Cancel {
    Cancel { id: "cancel".parse().unwrap(), request: request.parse().unwrap() }
}

fn poison(id: &str) -> ClipEncode {
    ClipEncode { id: id.parse().unwrap(), ..encode("poison", &[]) }
}
