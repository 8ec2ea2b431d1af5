//! Who goes first, who is refused and when they may come back, and why a worker is chosen.

use std::time::Duration;

use protocol::{
    ErrorCode, ErrorReply,
    reply::{ExplainReply, Refusal},
    request::{ClipEncode, Explain},
    worker::{Alive, Done},
};

use crate::{
    BlobEvent, Limits, StoredBlob,
    testing::{TestBroker, blob, encode, ids},
};

const MILLISECOND: Duration = Duration::from_millis(1);

#[test]
fn a_client_that_asks_for_little_does_not_stand_behind_one_that_asks_for_much() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for number in 0..20 {
        farm.encode("greedy", &format!("g{number}"), &[]);
    }
    farm.encode("modest", "m0", &[]);
    farm.encode("modest", "m1", &[]);
    farm.shown();
    for (done, next) in [("g0", "g2"), ("g1", "m0"), ("g2", "g3"), ("m0", "m1"), ("g3", "g4")] {
        farm.done("gpu-0", done);
        assert_eq!(farm.shown()[1], format!("gpu-0 <- work {next}"));
    }
}

#[test]
fn time_is_shared_and_not_the_number_of_requests() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let large = |id: &str| {
        let prompts = vec![encode(id, &[]).prompts.remove(0); 28];
        ClipEncode { prompts, ..encode(id, &[]) }
    };
    farm.encode("c0", "a", &[]);
    farm.encode("c0", "b", &[]);
    // 32 ms each against 5 ms each.
    for number in 0..3 {
        farm.client_says("large", &large(&format!("l{number}")));
    }
    for number in 0..12 {
        farm.encode("small", &format!("s{number}"), &[]);
    }
    farm.shown();
    let mut order = Vec::new();
    let mut running = vec!["a".to_owned(), "b".to_owned()];
    for _ in 0..10 {
        let done = running.remove(0);
        farm.done("gpu-0", &done);
        let shown = farm.shown().pop().unwrap();
        let next = shown.strip_prefix("gpu-0 <- work ").unwrap().to_owned();
        order.push(next.clone());
        running.push(next);
    }
    let large = order.iter().filter(|id| id.starts_with('l')).count();
    assert_eq!(large, 2, "{order:?}");
}

#[test]
fn work_for_two_seconds_may_wait_and_more_is_refused_with_good_advice() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "first", &[]);
    farm.after(100 * MILLISECOND);
    farm.done("gpu-0", "first");
    farm.shown();
    // 100 ms each: 2 in hand, and 20 may wait.
    for number in 0..30 {
        farm.encode(&format!("c{number}"), &format!("r{number}"), &[]);
    }
    let shown = farm.shown();
    let refused = shown.iter().filter(|line| line.ends_with("overloaded")).count();
    assert_eq!(refused, 8, "{shown:?}");
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains("work for 2000 ms waits"), "{}", error.message);
    assert_eq!(error.retry_after_ms, Some(100), "then one of them is taken");
    assert_eq!(farm.counters().refused_overload, 8);
}

#[test]
fn one_client_cannot_fill_the_queue() {
    let limits = Limits { queued_max: 30, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    for number in 0..40 {
        farm.encode("greedy", &format!("g{number}"), &[]);
    }
    let refused = farm.shown().len();
    assert_eq!(refused, 19, "it has two thirds and one more");
    assert!(farm.last_reply::<ErrorReply>().message.contains("share"));
    farm.encode("modest", "m", &[]);
    farm.assert_commands(&[]);
}

#[test]
fn what_would_wait_longer_than_its_budget_is_refused_at_once() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "first", &[]);
    farm.after(100 * MILLISECOND);
    farm.done("gpu-0", "first");
    for number in 0..6 {
        farm.encode("c1", &format!("r{number}"), &[]);
    }
    farm.shown();
    let within = |ms| ClipEncode { budget_ms: Some(ms), ..encode("short", &[]) };
    farm.client_says("c1", &within(300));
    farm.assert_commands(&["c1 <- error short overloaded"]);
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains("more than its budget of 300 ms"), "{}", error.message);
    assert!(error.retry_after_ms.is_some_and(|ms| (200..=400).contains(&ms)));
    farm.client_says("c1", &within(700));
    farm.assert_commands(&[]);
}

#[test]
fn times_that_a_worker_tells_are_believed() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.encode("c1", "r1", &[]);
    let dispatch = farm.dispatch("r1");
    let done = Done { epoch: 1, dispatch, compute_ms: Some(250.0), ..Done::default() };
    farm.worker_sends("gpu-0", protocol::frames::frames(&done, vec!["reply to r1".into()]));
    let reply = explained(&mut farm, &[]);
    let score = reply.workers[0].score.unwrap();
    assert!((score.compute_ms - 250.0).abs() < 1e-6, "{score:?}");
}

#[test]
fn explain_shows_every_verdict_and_who_would_be_chosen() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::Found(StoredBlob { bytes: 30_000_000, ..blob("anime") }));
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &["anime"]);
    farm.ready("gpu-2", &[]);
    let draining = Alive { draining: true, ..farm.heartbeat("gpu-2", &[]) };
    farm.worker_says("gpu-2", &draining);
    farm.encode("c1", "r1", &["anime"]);
    farm.assert_commands(&["gpu-2 <- released", "gpu-1 <- work r1"]);

    let reply = explained(&mut farm, &["anime"]);

    assert_eq!(reply.chosen.unwrap().as_str(), "gpu-1");
    let names: Vec<_> = reply.workers.iter().map(|verdict| verdict.worker.as_str()).collect();
    assert_eq!(names, ["gpu-0", "gpu-1", "gpu-2"]);
    let [first, second, third] = &reply.workers[..] else { panic!("three workers") };
    assert!(first.score.unwrap().load_ms > 100.0);
    let score = second.score.unwrap();
    assert!(score.queue_ms > 0.0 && score.load_ms == 0.0 && score.compute_ms > 0.0, "{score:?}");
    let sum = score.queue_ms + score.load_ms + score.model_ms + score.compute_ms;
    assert!((score.total_ms - sum).abs() < 1e-6);
    assert_eq!((third.refused, third.score), (Some(Refusal::Draining), None));

    farm.encode("c1", "r2", &["anime"]);
    farm.assert_commands(&["gpu-1 <- work r2"]);
}

#[test]
fn explain_for_a_model_that_nobody_serves_chooses_nobody() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let request = Explain { model: "flux".parse().unwrap(), ..explain(&[]) };
    farm.client_says("c1", &request);
    let reply: ExplainReply = farm.last_reply();
    assert_eq!((reply.chosen, reply.workers[0].refused), (None, Some(Refusal::NotServed)));
    let adapters = vec![ids(&["a"])[0]; 4097];
    farm.client_says("c1", &Explain { adapters, ..explain(&[]) });
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
}

fn explained(farm: &mut TestBroker, adapters: &[&str]) -> ExplainReply {
    farm.client_says("c1", &explain(adapters));
    farm.shown();
    farm.last_reply()
}

fn explain(adapters: &[&str]) -> Explain {
    Explain {
        id: "why".parse().unwrap(),
        model: "sd15".parse().unwrap(),
        model_digest: None,
        adapters: ids(adapters),
        chunks: 1,
    }
}
