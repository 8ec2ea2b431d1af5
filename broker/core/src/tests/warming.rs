//! Scenarios of adapters that come to workers before requests need them.

use std::time::Duration;

use protocol::{
    ErrorCode, ErrorReply,
    reply::{StatusReply, WarmReply},
    request::{Status, UploadFormat, UploadLora, UploadOp, Warm},
    worker::{Alive, Inventory},
};

use crate::{
    Limits,
    testing::{TestBroker, id, ids, model},
};

#[test]
fn the_worker_that_is_warmed_is_the_one_that_the_request_goes_to() {
    for adapter in ["anime", "photo", "style", "ink"] {
        let mut farm = farm(&["gpu-0", "gpu-1", "gpu-2"], &[adapter]);
        farm.client_says("c1", &warm("w1", &[adapter], 1));
        let told = farm.shown();
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[1], "c1 <- warm_reply w1");
        let home = told[0].strip_suffix(" <- prefetch 1").unwrap();
        let reply: WarmReply = farm.last_reply();
        assert_eq!(reply.adapters[0].adapter, id(adapter));
        assert!(reply.adapters[0].held.is_empty());
        assert_eq!(reply.adapters[0].fetching[0].as_str(), home);

        farm.encode("c1", "r1", &[adapter]);
        farm.assert_commands(&[&format!("{home} <- work r1")]);
    }
}

#[test]
fn holders_count_and_nobody_is_told_twice() {
    let mut farm = farm(&["gpu-1", "gpu-2"], &["anime"]);
    farm.ready("gpu-0", &["anime"]);
    farm.shown();
    farm.client_says("c1", &warm("w1", &["anime"], 1));
    farm.assert_commands(&["c1 <- warm_reply w1"]);

    farm.client_says("c1", &warm("w2", &["anime"], 9));
    farm.assert_commands(&["gpu-1 <- prefetch 1", "gpu-2 <- prefetch 1", "c1 <- warm_reply w2"]);
    let reply: WarmReply = farm.last_reply();
    assert_eq!(names(&reply.adapters[0].held), ["gpu-0"]);
    assert_eq!(names(&reply.adapters[0].fetching), ["gpu-1", "gpu-2"]);
    farm.client_says("c2", &warm("w3", &["anime"], 9));
    farm.assert_commands(&["c2 <- warm_reply w3"]);
}

#[test]
fn a_client_that_waits_is_answered_when_the_adapters_are_there() {
    let mut farm = farm(&["gpu-0"], &["anime", "photo"]);
    farm.client_says("c1", &patient("w1", &["anime", "photo"], 5000));
    farm.client_says("c1", &patient("w1", &["anime"], 5000));
    farm.assert_commands(&["gpu-0 <- prefetch 2"]);
    holds(&mut farm, "gpu-0", 1, &["anime"], &["photo"]);
    farm.assert_commands(&[]);
    assert_eq!(prefetching(&mut farm), 1);
    holds(&mut farm, "gpu-0", 2, &["anime", "photo"], &[]);
    farm.assert_commands(&["c1 <- warm_reply w1"]);
    let reply: WarmReply = farm.last_reply();
    assert!(reply.adapters.iter().all(|a| a.held.len() == 1 && a.fetching.is_empty()));
}

#[test]
fn a_client_does_not_wait_for_what_a_worker_gave_up_or_took_with_it() {
    let mut farm = farm(&["gpu-0"], &["anime"]);
    farm.client_says("c1", &patient("w1", &["anime"], 5000));
    farm.alive("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- prefetch 1"]);
    farm.after(Limits::default().dispatch_lost);
    farm.alive("gpu-0", &[]);
    farm.assert_commands(&["c1 <- warm_reply w1"]);
    let reply: WarmReply = farm.last_reply();
    assert!(reply.adapters[0].held.is_empty() && reply.adapters[0].fetching.is_empty());

    farm.client_says("c1", &patient("w2", &["anime"], 5000));
    farm.worker_dies("gpu-0");
    farm.assert_commands(&["gpu-0 <- prefetch 1", "c1 <- warm_reply w2"]);
}

#[test]
fn the_wait_ends_with_the_budget_and_with_the_client() {
    let mut farm = farm(&["gpu-0"], &["anime"]);
    farm.client_says("c1", &patient("w1", &["anime"], 1000));
    farm.client_says("c2", &patient("w2", &["anime"], 1000));
    farm.client_leaves("c2");
    farm.after(Duration::from_secs(1));
    farm.assert_commands(&["gpu-0 <- prefetch 1", "c1 <- warm_reply w1"]);
    assert_eq!(farm.last_reply::<WarmReply>().adapters[0].fetching.len(), 1);
    assert!(farm.broker.is_idle());
}

#[test]
fn what_cannot_be_warmed_is_refused() {
    let mut farm = farm(&["gpu-0"], &["anime"]);
    let mut refused = |request: Warm| {
        farm.client_says("c1", &request);
        farm.last_reply::<ErrorReply>().code
    };
    assert_eq!(refused(warm("w1", &["anime", "nowhere"], 1)), ErrorCode::UnknownLora);
    assert_eq!(refused(warm("w2", &["anime"], 0)), ErrorCode::InvalidRequest);
    assert_eq!(refused(warm("w3", &["anime"; 257], 1)), ErrorCode::TooLarge);
    let other = Warm { model: Some("flux".parse().unwrap()), ..warm("w4", &["anime"], 1) };
    assert_eq!(refused(other), ErrorCode::UnknownModel);
    farm.worker_dies("gpu-0");
    farm.client_says("c1", &warm("w5", &["anime"], 1));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::Overloaded);
}

#[test]
fn only_workers_of_the_model_are_warmed() {
    let mut farm = farm(&["gpu-0", "gpu-1"], &["anime"]);
    let other =
        protocol::worker::Ready { models: vec![model("sdxl")], ..farm.announcement("gpu-2", &[]) };
    farm.ready("gpu-2", &[]);
    farm.worker_says("gpu-2", &protocol::worker::Ready { epoch: 1, ..other });
    farm.shown();
    let request = Warm { model: Some("sdxl".parse().unwrap()), ..warm("w1", &["anime"], 9) };
    farm.client_says("c1", &request);
    farm.assert_commands(&["gpu-2 <- prefetch 1", "c1 <- warm_reply w1"]);
}

#[test]
fn an_upload_goes_to_as_many_homes_as_are_set_unless_they_are_busy() {
    for (fan_out, expected) in [(0, 0), (1, 1), (2, 2), (9, 2)] {
        let mut farm = TestBroker::starting(Limits { fan_out, ..Limits::default() });
        farm.ready("gpu-0", &[]);
        farm.ready("gpu-1", &[]);
        let shown = uploaded(&mut farm);
        assert_eq!(shown.iter().filter(|line| line.ends_with("prefetch 1")).count(), expected);
    }
    let mut farm = farm(&["gpu-0"], &[]);
    farm.encode("c1", "r1", &[]);
    farm.encode("c1", "r2", &[]);
    let shown = uploaded(&mut farm);
    assert!(!shown.iter().any(|line| line.contains("prefetch")), "it is busy: {shown:?}");
}

#[test]
fn a_worker_whose_inventory_is_another_is_asked_for_all_of_it() {
    let mut farm = farm(&[], &[]);
    farm.ready("gpu-0", &["anime"]);
    farm.shown();
    let inventory = farm.announcement("gpu-0", &["anime"]).inventory;
    let beat = |digest| Alive { resident_digest: digest, ..farm.heartbeat("gpu-0", &[]) };
    let (same, other) = (beat(Some(inventory.digest())), beat(Some(1)));
    farm.worker_says("gpu-0", &same);
    farm.assert_commands(&[]);
    farm.worker_says("gpu-0", &other);
    farm.assert_commands(&["gpu-0 <- announce"]);
}

/// A farm of these workers with these adapters in its store.
fn farm(workers: &[&str], stored: &[&str]) -> TestBroker {
    let mut farm = TestBroker::new();
    for adapter in stored {
        farm.stored(adapter);
    }
    for worker in workers {
        farm.ready(worker, &[]);
    }
    farm.shown();
    farm
}

fn warm(id: &str, adapters: &[&str], workers: u32) -> Warm {
    let adapters = ids(adapters);
    Warm { id: id.parse().unwrap(), adapters, model: None, workers, budget_ms: None }
}

fn patient(id: &str, adapters: &[&str], budget_ms: u32) -> Warm {
    Warm { budget_ms: Some(budget_ms), ..warm(id, adapters, 1) }
}

/// A worker tells what it holds now.
pub(super) fn holds(
    farm: &mut TestBroker,
    worker: &str,
    revision: u64,
    resident: &[&str],
    prefetching: &[&str],
) {
    let models = vec!["sd15".parse().unwrap()];
    let inventory = Inventory { device: ids(resident), models, ..Inventory::default() };
    let alive = Alive {
        revision,
        inventory: Some(inventory),
        prefetching: ids(prefetching),
        ..farm.heartbeat(worker, &[])
    };
    farm.worker_says(worker, &alive);
}

/// What happens when a client uploads a file.
fn uploaded(farm: &mut TestBroker) -> Vec<String> {
    let step = |name: &str, op| UploadLora { id: name.parse().unwrap(), op };
    let begin = UploadOp::Begin { size: 5, format: UploadFormat::Lora, digest: None, label: None };
    farm.client_says("c1", &step("begin", begin));
    farm.store_works();
    let upload = farm.last_upload();
    let chunk = step("chunk", UploadOp::Chunk { upload: upload.clone(), offset: 0 });
    farm.client_sends("c1", protocol::frames::frames(&chunk, vec!["abcde".into()]));
    farm.store_works();
    farm.client_says("c1", &step("commit", UploadOp::Commit { upload }));
    farm.store_works();
    farm.shown()
}

fn prefetching(farm: &mut TestBroker) -> u32 {
    farm.client_says("c9", &Status { id: "s".parse().unwrap() });
    farm.shown();
    farm.last_reply::<StatusReply>().workers[0].prefetching
}

fn names(workers: &[protocol::WorkerName]) -> Vec<&str> {
    workers.iter().map(protocol::WorkerName::as_str).collect()
}
