//! Models that are registered while the worker runs.

use std::{fs, path::Path};

use fixtures::{Naming, Size, write_encoder};
use protocol::{
    BlobDigest, Component, Dtype, ErrorCode, Failure, reply::ModelInfo, request::ModelFile,
    worker::NoBlob,
};

use super::broker::{Broker, name};

#[tokio::test]
async fn a_model_in_a_root_is_served_and_others_are_refused_by_what_is_wrong() {
    let mut broker = Broker::new();
    let [other, outside] = [broker.model_file("roots/other", 1), broker.model_file("outside", 2)];
    let root = broker.directory.path().join("roots").display().to_string();
    let budget = ["--model-root", &root, "--model-budget-mb", "15"];
    broker.start_worker(&budget).await;

    let model = broker.register("other", &[path(&other)]).await.unwrap();
    assert_eq!(broker.ready_models, ["other", "tiny"], "it is announced with the others");
    assert_eq!(broker.inventory.models, [name("other"), name("tiny")]);
    let receipt = broker.encode("other", &[]).await.unwrap().receipt;
    assert_eq!(receipt.model_digest, model.digest);
    assert_eq!(broker.register("other", &[path(&other)]).await.unwrap(), model, "again");

    let tiny = broker.directory.path().join("tiny/clip_l.safetensors");
    let ruined = broker.directory.path().join("roots/broken.safetensors");
    fs::write(&ruined, b"not safetensors").unwrap();
    let code = |result: Result<_, Failure>| result.map(|_: ModelInfo| ()).unwrap_err().code;
    assert_eq!(code(broker.register("m", &[path(&tiny)]).await), ErrorCode::Forbidden);
    assert_eq!(code(broker.register("m", &[path(&outside)]).await), ErrorCode::Forbidden);
    let invalid = ErrorCode::InvalidRequest;
    assert_eq!(code(broker.register("m", &[path(&ruined)]).await), invalid);
    assert_eq!(code(broker.register("m", &[path(&ruined), path(&ruined)]).await), invalid);
    assert_eq!(code(broker.register("m", &[path(root.as_ref())]).await), invalid);
    assert_eq!(code(broker.register("tiny", &[path(&other)]).await), invalid, "the name is taken");
    broker.encode("tiny", &[]).await.unwrap();
    broker.stop_worker();
}

#[tokio::test]
async fn a_model_that_was_uploaded_is_fetched_once_and_found_on_disk_after_a_restart() {
    let mut broker = Broker::new();
    let blob = broker.add_model_blob(1);
    let cache = broker.directory.path().join("cache");
    // Nothing else says how many heads so narrow a model has.
    let config = broker.directory.path().join("uploaded/config.json");
    fs::create_dir_all(cache.join("models")).unwrap();
    fs::copy(config, cache.join("models/config.json")).unwrap();
    let flags = ["--cache", cache.to_str().unwrap()];
    broker.start_worker(&flags).await;
    let model = broker.register("up", &[ModelFile::Blob(blob)]).await.unwrap();
    assert_eq!(broker.encode("up", &[]).await.unwrap().receipt.model_digest, model.digest);
    broker.register("twin", &[ModelFile::Blob(blob)]).await.unwrap();
    assert_eq!(broker.fetched, [blob.into()], "the second model has the same file");
    broker.stop_worker();

    broker.start_worker(&flags).await;
    assert_eq!(broker.ready_models, ["tiny"], "it is for the broker to ask again");
    assert_eq!(broker.register("up", &[ModelFile::Blob(blob)]).await.unwrap(), model);
    assert_eq!(broker.fetched.len(), 1);

    let kept = cache.join("models").join(format!("{blob}.safetensors"));
    fs::write(&kept, b"rotten").unwrap();
    assert_eq!(broker.register("up", &[ModelFile::Blob(blob)]).await.unwrap(), model);
    assert_eq!(broker.fetched.len(), 2);
    broker.stop_worker();
}

#[tokio::test]
async fn without_a_cache_uploaded_files_go_with_the_worker() {
    let mut broker = Broker::new();
    let blob = broker.add_model_blob(1);
    for starts in 1..=2 {
        broker.start_worker(&[]).await;
        for _ in 0..2 {
            let refused = broker.register("up", &[ModelFile::Blob(blob)]).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::InvalidRequest, "it does not say how many heads");
            assert!(refused.message.contains("config.json"), "{refused}");
        }
        broker.stop_worker();
        assert_eq!(broker.fetched.len(), starts, "once for every start");
    }
}

#[tokio::test]
async fn a_registration_that_is_asked_twice_is_done_once_and_survives_a_reconnect() {
    let mut broker = Broker::new();
    let blob = broker.add_model_blob(1);
    broker.start_worker(&[]).await;
    let files = [ModelFile::Blob(blob)];
    broker.holds_chunks = true;
    let first = broker.ask("up", &files);
    broker.fetch_under_way().await;
    let second = broker.ask("up", &files);
    let other = broker.ask("up", &[ModelFile::Blob(BlobDigest::of(b"other"))]);
    let (ticket, refused) = broker.registered().await;
    assert_eq!((ticket, refused.unwrap_err().code), (other, ErrorCode::Overloaded));

    // The broker does not hold it after all: both hear of it, and may ask again.
    broker.send(&NoBlob { blob, reason: "not here".to_owned() }, vec![]);
    for ticket in [first, second] {
        let (answered, failed) = broker.registered().await;
        assert_eq!((answered, failed.unwrap_err().code), (ticket, ErrorCode::Overloaded));
    }
    broker.ask("up", &files);
    broker.fetch_under_way().await;
    broker.restart().await;
    broker.holds_chunks = false;
    let third = broker.ask("up", &files);
    let (answered, served) = broker.registered().await;
    assert_eq!(answered, third, "nobody waits for the answer on the old connection");
    assert_eq!(served.unwrap_err().code, ErrorCode::InvalidRequest, "all of it was read");
    assert_eq!(broker.fetched, [blob.into()]);
    broker.stop_worker();
}

#[tokio::test]
async fn a_worker_that_leaves_says_that_it_will_not_serve_what_it_was_asked_for() {
    let mut broker = Broker::new();
    let blob = broker.add_model_blob(1);
    broker.start_worker(&[]).await;
    broker.holds_chunks = true;
    let ticket = broker.ask("up", &[ModelFile::Blob(blob)]);
    broker.fetch_under_way().await;
    broker.stop_worker();
    let (answered, refused) = broker.registered().await;
    let refused = refused.unwrap_err();
    assert_eq!((answered, refused.code), (ticket, ErrorCode::Overloaded));
    assert!(refused.message.contains("draining"), "{refused}");
}

#[tokio::test]
async fn a_model_over_the_budget_is_refused_and_the_others_are_served_on() {
    let mut broker = Broker::new();
    let root = broker.directory.path().join("roots");
    let tiny = root.join("l/model.safetensors");
    let large = root.join("g/model.safetensors");
    write_encoder(&tiny, Size::Tiny, Component::ClipL, Dtype::Float32, Naming::Hf).unwrap();
    write_encoder(&large, Size::Tiny, Component::ClipG, Dtype::Float32, Naming::Hf).unwrap();
    let flags = ["--model-root", root.to_str().unwrap(), "--model-budget-mb", "7"];
    broker.start_worker(&flags).await;
    let refused = broker.register("large", &[path(&tiny), path(&large)]).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::TooLarge, "{refused}");
    assert!(refused.message.contains("model_budget_mb"), "{refused}");
    broker.encode("tiny", &[]).await.unwrap();
    broker.stop_worker();
}

fn path(path: &Path) -> ModelFile {
    ModelFile::Path(path.to_str().unwrap().to_owned())
}
