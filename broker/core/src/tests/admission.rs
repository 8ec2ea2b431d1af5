//! What is let in, what waits, what is refused, and which worker gets it.

use std::time::Duration;

use protocol::{ErrorReply, ModelDigest, request::ClipEncode, worker::Ready};

use crate::{
    BlobEvent, Limits, StoredBlob,
    testing::{TestBroker, blob, encode, id, model},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_holder_of_a_small_adapter_is_preferred_until_it_is_busy() {
    let mut farm = TestBroker::new();
    farm.stored("anime");
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &["anime"]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &["anime"]);
    }
    farm.assert_commands(&["gpu-1 <- work r1", "gpu-0 <- work r2", "gpu-1 <- work r3"]);
}

#[test]
fn the_holder_of_a_large_adapter_is_waited_for() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::Found(StoredBlob { bytes: 100 << 20, ..blob("anime") }));
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &["anime"]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &["anime"]);
    }
    farm.encode("c1", "r4", &[]);
    farm.assert_commands(&["gpu-1 <- work r1", "gpu-1 <- work r2", "gpu-0 <- work r4"]);
    farm.done("gpu-1", "r1");
    farm.assert_commands(&["c1 <- reply to r1", "gpu-1 <- work r3"]);
}

#[test]
fn who_waits_for_a_worker_that_dies_goes_elsewhere_at_once() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::Found(StoredBlob { bytes: 100 << 20, ..blob("anime") }));
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &["anime"]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &["anime"]);
    }
    farm.shown();
    farm.worker_dies("gpu-1");
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r2"]);
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["c1 <- reply to r1", "gpu-0 <- work r3"]);
}

#[test]
fn without_adapters_the_least_loaded_worker_is_given_the_request() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-1 <- work r2", "gpu-0 <- work r3"]);
    farm.done("gpu-0", "r1");
    farm.done("gpu-0", "r3");
    farm.done("gpu-1", "r2");
    farm.shown();
    farm.encode("c1", "r4", &[]);
    farm.assert_commands(&["gpu-1 <- work r4"]);
}

#[test]
fn no_worker_is_given_more_than_it_has_slots_for() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3", "r4"] {
        farm.encode("c1", request, &[]);
    }
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r2"]);
    farm.done("gpu-0", "r2");
    farm.assert_commands(&["c1 <- reply to r2", "gpu-0 <- work r3"]);
}

#[test]
fn an_adapter_that_is_only_resident_is_used_where_it_is() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.ready("gpu-1", &["anime"]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &["anime"]);
    }
    farm.assert_commands(&["gpu-1 <- work r1", "gpu-1 <- work r2"]);
    farm.worker_dies("gpu-1");
    farm.assert_commands(&[
        "c1 <- error r1 unknown_lora",
        "c1 <- error r2 unknown_lora",
        "c1 <- error r3 unknown_lora",
    ]);
}

#[test]
fn an_unknown_adapter_is_named() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &["known"]);
    farm.encode("c1", "r1", &["known", "unknown"]);
    farm.assert_commands(&["c1 <- error r1 unknown_lora"]);
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains(&id("unknown").to_string()), "{}", error.message);
}

#[test]
fn an_unknown_model_is_answered_with_those_that_are_known() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let request = ClipEncode { model: "flux".parse().unwrap(), ..encode("r1", &[]) };
    farm.client_says("c1", &request);
    let error: ErrorReply = farm.last_reply();
    farm.after(SECOND);
    farm.assert_commands(&["c1 <- error r1 unknown_model"]);
    assert_eq!(error.message, "no worker serves model `flux`: the farm serves `sd15`");
}

#[test]
fn another_digest_is_answered_with_both() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let (asked, served) = (ModelDigest::of(b"other"), model("sd15").digest);
    farm.client_says("c1", &ClipEncode { model_digest: Some(served), ..encode("r1", &[]) });
    farm.client_says("c1", &ClipEncode { model_digest: Some(asked), ..encode("r2", &[]) });
    farm.assert_commands(&["gpu-0 <- work r1", "c1 <- error r2 unknown_model"]);
    let error: ErrorReply = farm.last_reply();
    assert!(error.message.contains(&asked.to_string()), "{}", error.message);
    assert!(error.message.contains(&served.to_string()), "{}", error.message);
}

#[test]
fn a_known_model_without_workers_waits_for_one() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.worker_dies("gpu-0");
    farm.encode("c1", "r1", &[]);
    farm.after(10 * SECOND);
    farm.assert_commands(&[]);
    farm.ready("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
}

#[test]
fn after_the_start_requests_wait_until_the_farm_has_come_together() {
    let mut farm = TestBroker::starting(Limits::default());
    farm.encode("c1", "r1", &["anime"]);
    farm.client_says("c1", &ClipEncode { model: "sdxl".parse().unwrap(), ..encode("r2", &[]) });
    farm.client_says("c1", &ClipEncode { model: "flux".parse().unwrap(), ..encode("r3", &[]) });
    farm.after(2 * SECOND);
    farm.assert_commands(&[]);

    farm.ready("gpu-0", &["anime"]);
    farm.assert_commands(&["gpu-0 <- work r1"]);
    farm.after(SECOND / 2);
    let sdxl = Ready { models: vec![model("sdxl")], ..farm.announcement("gpu-1", &[]) };
    farm.worker_says("gpu-1", &sdxl);
    farm.assert_commands(&["gpu-1 <- work r2"]);
    farm.after(SECOND / 2);
    farm.assert_commands(&["c1 <- error r3 unknown_model"]);
}

#[test]
fn when_no_worker_came_at_all_the_client_is_told_to_come_back() {
    let mut farm = TestBroker::starting(Limits::default());
    farm.encode("c1", "r1", &[]);
    farm.after(5 * SECOND);
    farm.assert_commands(&["c1 <- error r1 overloaded"]);
    assert!(farm.last_reply::<ErrorReply>().retry_after_ms.is_some());
}

#[test]
fn a_full_queue_is_answered_at_once() {
    let limits = Limits { queued_max: 2, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.assert_commands(&["c1 <- error r3 overloaded"]);
    let error: ErrorReply = farm.last_reply();
    assert_eq!((error.retryable, error.retry_after_ms), (true, Some(250)));

    let mut farm = TestBroker::starting(Limits { queued_bytes_max: 100, ..Limits::default() });
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &["a"]);
    farm.assert_commands(&["c1 <- error r2 overloaded"]);
}

#[test]
fn the_answer_comes_by_the_deadline_wherever_the_request_is() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        let budget_ms = Some(300);
        farm.client_says("c1", &ClipEncode { budget_ms, ..encode(request, &[]) });
    }
    farm.shown();
    farm.after(Duration::from_millis(299));
    farm.assert_commands(&[]);
    farm.after(Duration::from_millis(1));
    farm.assert_commands(&[
        "gpu-0 <- cancel_work r1",
        "c1 <- error r1 deadline_exceeded",
        "gpu-0 <- cancel_work r2",
        "c1 <- error r2 deadline_exceeded",
        "c1 <- error r3 deadline_exceeded",
    ]);
    let error: ErrorReply = farm.last_reply();
    assert_eq!(
        error.message,
        "the time budget of 300 ms ran out while the request was waiting for a worker"
    );
    farm.done("gpu-0", "r1");
    farm.assert_commands(&[]);
}

#[test]
fn a_budget_of_nothing_is_spent_already() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &ClipEncode { budget_ms: Some(0), ..encode("r1", &[]) });
    farm.assert_commands(&["c1 <- error r1 deadline_exceeded"]);
}

#[test]
fn what_is_left_when_the_process_ends_is_answered() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.shown();
    farm.broker.give_up("the broker stops");
    farm.collect();
    farm.assert_commands(&[
        "gpu-0 <- cancel_work r1",
        "c1 <- error r1 overloaded",
        "gpu-0 <- cancel_work r2",
        "c1 <- error r2 overloaded",
        "c1 <- error r3 overloaded",
    ]);
    assert!(farm.broker.is_idle());
}

#[test]
fn a_draining_broker_finishes_what_it_has_and_takes_nothing_new() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    for request in ["r1", "r2", "r3"] {
        farm.encode("c1", request, &[]);
    }
    farm.shown();
    farm.broker.drain("it is being stopped");

    farm.encode("c1", "r4", &[]);
    farm.assert_commands(&["c1 <- error r4 overloaded"]);
    assert!(farm.last_reply::<ErrorReply>().message.contains("draining: it is being stopped"));
    for request in ["r1", "r2", "r3"] {
        assert!(!farm.broker.is_idle());
        farm.done("gpu-0", request);
    }
    assert!(farm.broker.is_idle() && farm.broker.is_draining());
}

#[test]
fn a_queue_for_one_model_holds_up_no_other() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let sdxl = Ready { models: vec![model("sdxl")], ..farm.announcement("gpu-1", &[]) };
    farm.worker_says("gpu-1", &sdxl);
    for request in ["r1", "r2", "r3", "r4"] {
        farm.encode("c1", request, &[]);
    }
    farm.client_says("c1", &ClipEncode { model: "sdxl".parse().unwrap(), ..encode("r5", &[]) });
    farm.assert_commands(&["gpu-0 <- work r1", "gpu-0 <- work r2", "gpu-1 <- work r5"]);
    farm.done("gpu-0", "r1");
    farm.assert_commands(&["c1 <- reply to r1", "gpu-0 <- work r3"]);
}
