//! Registering models: who is asked, who waits, what is remembered, and what is refused.

use std::time::Duration;

use protocol::{
    ErrorCode, ErrorReply, Failure, Family, ModelDigest,
    reply::{ListModelsReply, ModelInfo, RegisterModelReply},
    request::{Cancel, ListModels, ModelFile, RegisterModel},
    worker::Alive,
};

use crate::{
    BlobEvent, Limits, ModelSpec, Notice, Registration,
    testing::{TestBroker, encode, model},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn every_worker_is_asked_and_the_client_is_answered_once() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.assert_commands(&["gpu-0 <- register xl", "gpu-1 <- register xl"]);
    farm.registered("gpu-1", Ok(model("xl")));
    farm.assert_commands(&["store <- remember 1"]);
    farm.registered("gpu-0", Ok(model("xl")));
    farm.assert_commands(&["c1 <- register_model_reply r1"]);

    let reply: RegisterModelReply = farm.last_reply();
    assert_eq!((reply.model, names(&reply.workers)), (model("xl"), vec!["gpu-0", "gpu-1"]));
    assert_eq!(reply.failed, []);
    farm.client_says("c1", &encode_with("e1", "xl"));
    farm.assert_commands(&["gpu-0 <- work e1"]);
    farm.client_says("c1", &ListModels { id: "l".parse().unwrap() });
    let listed: ListModelsReply = farm.last_reply();
    assert_eq!(names(&listed.models[1].workers), ["gpu-0", "gpu-1"]);
}

#[test]
fn workers_that_cannot_are_listed_and_when_all_cannot_the_first_error_is_the_answer() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Err(refusal("outside the allowed directories")));
    farm.registered("gpu-1", Ok(model("xl")));
    let reply: RegisterModelReply = farm.last_reply();
    assert_eq!(names(&reply.workers), ["gpu-1"]);
    assert_eq!(reply.failed[0].worker.as_str(), "gpu-0");
    assert_eq!(reply.failed[0].failure, refusal("outside the allowed directories"));

    farm.client_says("c1", &register("r2", "turbo"));
    farm.registered("gpu-1", Err(refusal("first")));
    farm.registered("gpu-0", Err(refusal("second")));
    let error: ErrorReply = farm.last_reply();
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Forbidden, "first"));
}

#[test]
fn a_worker_that_reads_other_weights_is_listed_as_failed_and_not_used() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-1", Ok(model("xl")));
    farm.registered("gpu-0", Ok(other("xl")));
    let reply: RegisterModelReply = farm.last_reply();
    assert_eq!(names(&reply.workers), ["gpu-1"]);
    let message = &reply.failed[0].failure.message;
    assert!(message.contains("`gpu-0` read digest") && message.contains("same files"), "{message}");
    farm.shown();

    for request in ["e1", "e2", "e3"] {
        farm.client_says("c1", &encode_with(request, "xl"));
    }
    farm.assert_commands(&["gpu-1 <- work e1", "gpu-1 <- work e2"]);
    let mut again = farm.announcement("gpu-0", &[]);
    again.models.push(other("xl"));
    farm.worker_says("gpu-0", &again);
    farm.assert_commands(&[]);
    assert!(matches!(farm.notices.last(), Some(Notice::ModelConflict { .. })));
}

#[test]
fn a_worker_whose_model_was_rejected_is_not_used_for_it_when_it_lists_it() {
    let mut farm = farm(&["gpu-0"]);
    let mut first = farm.announcement("gpu-0", &[]);
    first.models.push(model("xl"));
    farm.worker_says("gpu-0", &first);
    farm.ready("gpu-1", &[]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Err(refusal("outside the allowed directories")));
    farm.registered("gpu-1", Ok(other("xl")));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::Forbidden);
    let mut second = farm.announcement("gpu-1", &[]);
    second.models.push(other("xl"));
    farm.worker_says("gpu-1", &second);
    farm.worker_says("gpu-0", &first);
    farm.shown();

    for request in ["e1", "e2", "e3"] {
        farm.client_says("c1", &encode_with(request, "xl"));
    }
    farm.assert_commands(&["gpu-0 <- work e1", "gpu-0 <- work e2"]);
    farm.worker_dies("gpu-0");
    farm.worker_says("gpu-1", &second);
    farm.assert_commands(&[]);
}

#[test]
fn a_name_that_is_served_is_success_with_the_same_digest_and_refused_with_another() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "sd15"));
    farm.registered("gpu-0", Ok(model("sd15")));
    assert_eq!(farm.last_reply::<RegisterModelReply>().model, model("sd15"));
    farm.client_says("c1", &register("r2", "sd15"));
    farm.registered("gpu-0", Ok(other("sd15")));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    assert!(error.message.contains("another name"), "{}", error.message);
    farm.client_says("c1", &encode("e1", &[]));
    assert_eq!(farm.shown().last().unwrap(), "gpu-0 <- work e1");
}

#[test]
fn clients_that_register_the_same_wait_for_the_same_answers_each_for_its_own_time() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    farm.client_says("c1", &RegisterModel { budget_ms: Some(1000), ..register("r1", "xl") });
    farm.client_says("c2", &RegisterModel { budget_ms: Some(5000), ..register("r2", "xl") });
    farm.client_says("c3", &register("r3", "xl"));
    farm.assert_commands(&["gpu-0 <- register xl", "gpu-1 <- register xl"]);
    beat(&mut farm, SECOND);
    farm.assert_commands(&["c1 <- error r1 deadline_exceeded"]);
    farm.registered("gpu-0", Ok(model("xl")));
    beat(&mut farm, 4 * SECOND);
    farm.assert_commands(&["store <- remember 1", "c2 <- register_model_reply r2"]);
    let reply: RegisterModelReply = farm.last_reply();
    assert_eq!(names(&reply.workers), ["gpu-0"]);
    assert_eq!(reply.failed[0].failure.code, ErrorCode::DeadlineExceeded);
    farm.registered("gpu-1", Ok(model("xl")));
    farm.assert_commands(&["c3 <- register_model_reply r3"]);
}

#[test]
fn one_name_is_registered_with_one_set_of_files_at_a_time() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    let files = vec![ModelFile::Path("/models/other.safetensors".to_owned())];
    farm.client_says("c2", &RegisterModel { files, ..register("r2", "xl") });
    farm.assert_commands(&["gpu-0 <- register xl", "c2 <- error r2 overloaded"]);
}

#[test]
fn a_worker_that_leaves_while_it_is_asked_has_failed() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.worker_dies("gpu-0");
    farm.registered("gpu-1", Ok(model("xl")));
    let reply: RegisterModelReply = farm.last_reply();
    assert_eq!(reply.failed[0].failure.code, ErrorCode::WorkerLost);

    farm.client_says("c1", &register("r2", "turbo"));
    farm.disconnect("gpu-1");
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::WorkerLost);
    farm.client_says("c1", &register("r3", "turbo"));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::Overloaded, "nobody is left to ask");
}

#[test]
fn draining_workers_are_not_asked_until_they_take_work_again() {
    let mut farm = farm(&["gpu-0", "gpu-1"]);
    let beat = |farm: &TestBroker, draining| Alive { draining, ..farm.heartbeat("gpu-1", &[]) };
    let draining = beat(&farm, true);
    farm.worker_says("gpu-1", &draining);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Ok(model("xl")));
    farm.shown();
    let serving = beat(&farm, false);
    farm.worker_says("gpu-1", &serving);
    farm.assert_commands(&["gpu-1 <- register xl"]);
}

#[test]
fn workers_that_come_later_are_asked_for_what_is_registered() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Ok(model("xl")));
    farm.shown();
    farm.ready("gpu-1", &[]);
    farm.assert_commands(&["gpu-1 <- register xl"]);
    farm.worker_dies("gpu-0");
    farm.client_says("c1", &encode_with("e1", "xl"));
    farm.assert_commands(&[]);
    farm.registered("gpu-1", Ok(model("xl")));
    farm.assert_commands(&["gpu-1 <- work e1"]);
}

#[test]
fn a_restarted_broker_asks_again_and_requests_wait_for_it() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::FoundRegistration(registration("xl")));
    farm.ready("gpu-0", &[]);
    farm.client_says("c1", &encode_with("e1", "xl"));
    farm.assert_commands(&["gpu-0 <- register xl"]);
    farm.registered("gpu-0", Ok(model("xl")));
    farm.assert_commands(&["gpu-0 <- work e1"]);
}

#[test]
fn a_registered_model_that_fails_for_now_is_asked_for_again_and_a_lasting_failure_is_told() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::FoundRegistration(registration("xl")));
    farm.ready("gpu-0", &[]);
    farm.registered("gpu-0", Err(Failure::new(ErrorCode::Overloaded, "no memory now")));
    farm.shown();
    beat(&mut farm, 9 * SECOND);
    farm.assert_commands(&[]);
    beat(&mut farm, SECOND);
    farm.assert_commands(&["gpu-0 <- register xl"]);

    farm.registered("gpu-0", Ok(other("xl")));
    assert!(matches!(farm.notices.last(), Some(Notice::RegistrationFailed { .. })));
    let again = farm.announcement("gpu-0", &[]);
    farm.worker_says("gpu-0", &again);
    farm.assert_commands(&[]);
    farm.ready("gpu-0", &[]);
    farm.assert_commands(&["gpu-0 <- register xl"]);
}

#[test]
fn what_no_worker_serves_any_more_may_be_registered_anew() {
    let mut farm = TestBroker::new();
    farm.blob_event(BlobEvent::FoundRegistration(registration("xl")));
    farm.ready("gpu-0", &[]);
    farm.registered("gpu-0", Err(refusal("the file is gone")));
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Ok(other("xl")));
    assert_eq!(farm.last_reply::<RegisterModelReply>().model, other("xl"));
}

#[test]
fn an_answer_that_comes_when_nobody_waits_any_more_counts() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    let cancel = Cancel { id: "x".parse().unwrap(), request: "r1".parse().unwrap() };
    farm.client_says("c1", &cancel);
    farm.assert_commands(&[
        "gpu-0 <- register xl",
        "c1 <- error r1 cancelled",
        "c1 <- cancel_reply x",
    ]);
    farm.registered("gpu-0", Ok(model("xl")));
    farm.registered("gpu-0", Ok(other("xl")));
    farm.assert_commands(&["store <- remember 1"]);
    farm.client_says("c1", &register("r2", "turbo"));
    farm.client_leaves("c1");
    farm.registered("gpu-0", Ok(model("turbo")));
    farm.assert_commands(&["gpu-0 <- register turbo", "store <- remember 2"]);
}

#[test]
fn an_answer_for_another_model_is_none() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Ok(model("turbo")));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::Internal);
}

#[test]
fn requests_that_no_worker_could_fulfil_are_refused_at_once() {
    let mut farm = farm(&["gpu-0"]);
    let path = |path: &str| ModelFile::Path(path.to_owned());
    let with = |files: &[ModelFile]| RegisterModel { files: files.to_vec(), ..register("r", "xl") };
    let blob = protocol::BlobDigest::of(b"nobody has this");
    let long = format!("/{}", "x".repeat(4096));
    for (request, code, part) in [
        (with(&[]), ErrorCode::InvalidRequest, "0 entries: expected 1 to 1"),
        (with(&[path("/a"), path("/b")]), ErrorCode::InvalidRequest, "2 entries"),
        (with(&[path("a")]), ErrorCode::InvalidRequest, "`a` is not absolute"),
        (with(&[path("/a\0b")]), ErrorCode::InvalidRequest, "is not absolute"),
        (with(&[path(&long)]), ErrorCode::TooLarge, "4097 bytes"),
        (with(&[ModelFile::Blob(blob)]), ErrorCode::InvalidRequest, "upload it with format"),
        (
            RegisterModel { budget_ms: Some(600_001), ..with(&[path("/a")]) },
            ErrorCode::TooLarge,
            "600001",
        ),
        (
            RegisterModel { budget_ms: Some(0), ..with(&[path("/a")]) },
            ErrorCode::DeadlineExceeded,
            "0 ms",
        ),
    ] {
        farm.client_says("c1", &request);
        let error: ErrorReply = farm.last_reply();
        assert_eq!(error.code, code);
        assert!(error.message.contains(part), "{}", error.message);
    }
    let files = vec![path("/l"), path("/g")];
    farm.client_says("c1", &RegisterModel { files, family: Family::Sdxl, ..register("r", "xl") });
    assert_eq!(farm.shown().last().unwrap(), "gpu-0 <- register xl");
}

#[test]
fn registrations_are_limited_in_number() {
    let limits = Limits {
        registrations_max: 3,
        registrations_open_max: 2,
        registrations_waiting_max: 3,
        ..Limits::default()
    };
    let mut farm = TestBroker::starting(limits);
    farm.ready("gpu-0", &[]);
    for (request, name) in [("r1", "a"), ("r2", "b"), ("r3", "c"), ("r4", "a"), ("r5", "a")] {
        farm.client_says("c1", &register(request, name));
    }
    farm.assert_commands(&[
        "gpu-0 <- register a",
        "gpu-0 <- register b",
        "c1 <- error r3 overloaded",
        "c1 <- error r5 overloaded",
    ]);
    for name in ["x", "y", "z"] {
        farm.blob_event(BlobEvent::FoundRegistration(registration(name)));
    }
    farm.client_leaves("c1");
    farm.client_says("c1", &register("r6", "d"));
    farm.assert_commands(&["c1 <- error r6 too_large"]);
}

#[test]
fn a_broker_that_stops_answers_those_who_wait() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.broker.drain("it stops");
    farm.client_says("c1", &register("r2", "turbo"));
    assert!(!farm.broker.is_idle());
    farm.broker.give_up("it stopped");
    farm.collect();
    farm.assert_commands(&[
        "gpu-0 <- register xl",
        "c1 <- error r2 overloaded",
        "c1 <- error r1 overloaded",
    ]);
    assert!(farm.broker.is_idle());
}

#[test]
fn a_registration_that_is_not_saved_is_told_to_the_operator() {
    let mut farm = farm(&["gpu-0"]);
    farm.client_says("c1", &register("r1", "xl"));
    farm.registered("gpu-0", Ok(model("xl")));
    assert!(farm.last_reply::<RegisterModelReply>().failed.is_empty());
    let ticket = farm.store.remove(0).ticket;
    let failure = Failure::new(ErrorCode::Internal, "no space left on device");
    farm.blob_event(BlobEvent::Done { ticket, result: Err(failure) });
    assert!(matches!(farm.notices.last(), Some(Notice::RegistrationsNotSaved { .. })));
}

/// A farm that has come together, with these workers.
fn farm(workers: &[&str]) -> TestBroker {
    let mut farm = TestBroker::new();
    for worker in workers {
        farm.ready(worker, &[]);
    }
    farm
}

/// Lets time pass while the workers live.
fn beat(farm: &mut TestBroker, time: Duration) {
    for _ in 0..time.as_secs() {
        for worker in ["gpu-0", "gpu-1"] {
            if farm.registers.contains_key(worker) {
                farm.alive(worker, &[]);
            }
        }
        farm.after(SECOND);
    }
}

fn register(id: &str, name: &str) -> RegisterModel {
    let ModelSpec { name, family, files } = registration(name).spec;
    RegisterModel { id: id.parse().unwrap(), name, family, files, budget_ms: None }
}

fn registration(name: &str) -> Registration {
    let files = vec![ModelFile::Path(format!("/models/{name}.safetensors"))];
    let spec = ModelSpec { name: name.parse().unwrap(), family: Family::Sd15, files };
    Registration { spec, digest: model(name).digest }
}

fn encode_with(request: &str, model: &str) -> protocol::request::ClipEncode {
    protocol::request::ClipEncode { model: model.parse().unwrap(), ..encode(request, &[]) }
}

/// The model that `name` does not stand for.
fn other(name: &str) -> ModelInfo {
    ModelInfo { digest: ModelDigest::of(b"other weights"), ..model(name) }
}

fn refusal(message: &str) -> Failure {
    Failure::new(ErrorCode::Forbidden, message)
}

fn names(workers: &[protocol::WorkerName]) -> Vec<&str> {
    workers.iter().map(protocol::WorkerName::as_str).collect()
}
