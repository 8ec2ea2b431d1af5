//! A whole worker on a real socket and a real disk, with the broker played by the test.

mod broker;
mod registering;

use std::{collections::BTreeSet, fs};

use protocol::{
    AdapterSource, ErrorCode,
    worker::{CancelWork, Evict},
};

use self::broker::{Broker, name};
use super::*;

#[tokio::test]
async fn an_adapter_is_fetched_once_and_then_used_where_it_is() {
    let mut broker = Broker::new();
    broker.start_worker(&[]).await;
    let adapter = broker.add_adapter(1);
    assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    assert_eq!(broker.source(adapter).await, AdapterSource::Resident);
    assert_eq!(broker.fetched, [adapter]);

    broker.wait_for(|inventory| inventory.device == [adapter]).await;
    broker.send(&Evict { adapters: vec![adapter] }, vec![]);
    broker.wait_for(|inventory| inventory.device.is_empty()).await;
    assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    broker.stop_worker();
}

#[tokio::test]
async fn adapters_survive_a_restart_on_disk_and_rotten_ones_are_fetched_again() {
    let mut broker = Broker::new();
    let cache = broker.directory.path().join("cache");
    let flags = ["--cache", cache.to_str().unwrap()];
    broker.start_worker(&flags).await;
    let adapters = [broker.add_adapter(1), broker.add_adapter(2)];
    for adapter in adapters {
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    }
    broker.stop_worker();
    let rotten = cache.join("blobs").join(adapters[1].to_string());
    let mut bytes = fs::read(&rotten).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&rotten, bytes).unwrap();

    broker.start_worker(&flags).await;
    let on_disk: BTreeSet<_> = broker.inventory.disk.iter().copied().collect();
    assert_eq!(on_disk, BTreeSet::from(adapters));
    assert_eq!(broker.source(adapters[0]).await, AdapterSource::Disk);
    assert_eq!(broker.source(adapters[1]).await, AdapterSource::Broker, "it is not believed");
    assert_eq!(broker.fetched, [adapters[0], adapters[1], adapters[1]]);
    broker.wait_for(|inventory| inventory.device.len() == 2 && inventory.disk.is_empty()).await;
    broker.stop_worker();
}

#[tokio::test]
async fn a_disk_that_refuses_harms_no_request() {
    let mut broker = Broker::new();
    let cache = broker.directory.path().join("cache");
    broker.start_worker(&["--cache", cache.to_str().unwrap()]).await;
    fs::remove_dir_all(cache.join("blobs")).unwrap();
    for seed in 1..=2 {
        let adapter = broker.add_adapter(seed);
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
        broker.send(&Evict { adapters: vec![adapter] }, vec![]);
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    }
    broker.stop_worker();
}

#[tokio::test]
async fn models_beyond_the_budget_are_loaded_when_they_are_needed() {
    let mut broker = Broker::new();
    let other = broker.add_model("other");
    // One model of 6 MB (49,408 tokens of 32 numbers in f32) fits, two do not.
    broker.start_worker(&["--model-budget-mb", "10"]).await;
    assert_eq!(broker.inventory.models, [name("tiny")]);
    assert_eq!(broker.ready_models, ["other", "tiny"]);

    let base = broker.encode("tiny", &[]).await.unwrap();
    let again = broker.encode("other", &[]).await.unwrap();
    assert_eq!(again.receipt.model_digest, base.receipt.model_digest, "they are the same weights");
    broker.wait_for(|inventory| inventory.models == [name("other")]).await;
    broker.encode("tiny", &[]).await.unwrap();

    fs::remove_file(&other).unwrap();
    let gone = broker.encode("other", &[]).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::UnknownModel);
    assert!(gone.message.contains("cannot be loaded again"), "{}", gone.message);
    broker.stop_worker();
}

#[tokio::test]
async fn several_lanes_take_several_requests_and_a_cancelled_one_is_not_answered() {
    let mut broker = Broker::new();
    broker.start_worker(&["--lanes", "3"]).await;
    assert_eq!(broker.slots, 4, "one more than lanes");
    let adapter = broker.add_adapter(1);
    let dispatches: Vec<_> = (0..6).map(|_| broker.dispatch("tiny", &[adapter])).collect();
    broker.send(&CancelWork { dispatch: dispatches[5] }, vec![]);
    let mut answered = BTreeSet::new();
    while answered.len() < 5 {
        let (dispatch, reply) = broker.answer().await;
        reply.unwrap();
        assert!(answered.insert(dispatch), "answered twice");
    }
    assert!(answered.iter().eq(&dispatches[..5]));
    assert_eq!(broker.fetched, [adapter], "six requests, one fetch");
    broker.stop_worker();
}

#[tokio::test]
async fn an_adapter_that_nobody_has_fails_its_request_alone() {
    let mut broker = Broker::new();
    broker.start_worker(&[]).await;
    let nowhere = AdapterId::of(b"nowhere");
    let error = broker.encode("tiny", &[nowhere]).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::UnknownLora);
    broker.encode("tiny", &[]).await.unwrap();
    broker.stop_worker();
}
