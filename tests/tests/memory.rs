//! Memory of a worker at the true size of CLIP-L.

use fixtures::Size;
use luna_client::{Dtype, EncodeRequest, Family, MergedWeights};
use luna_e2e::{Cluster, models};

/// Parameters of CLIP-L, from its sizes (Radford et al. 2021); its projection is not loaded.
const PARAMETERS: u64 = 123_060_480;

#[tokio::test]
async fn a_worker_stays_under_1_3_times_its_weights_in_f32() {
    check(0).await;
}

#[tokio::test]
async fn merged_weights_of_hot_stacks_take_no_more_than_their_budget() {
    check(400).await;
}

/// Loads the model and encodes with a few stacks, each often enough to be worth keeping.
async fn check(merged_budget_mb: u64) {
    let model = models::spec("full", Size::Full, Family::Sd15, Dtype::Float16);
    let mut cluster = Cluster::new()
        .model(&model)
        .weights_dtype(Dtype::Float16)
        .worker_flags(&["--merged-budget-mb", &merged_budget_mb.to_string()])
        .start()
        .await;
    let limit = PARAMETERS * 4 * 13 / 10;
    let loading = cluster.worker(0).resident_bytes_peak();
    assert!(loading < limit, "{loading} bytes while loading, the limit is {limit}");

    let client = cluster.client().await;
    let limit = limit + (merged_budget_mb << 20);
    for seed in 1..=2 {
        let file = models::seeded_lora(Size::Full, seed, 16);
        let uploaded = client.upload_lora(file, |_| {}).await.expect("the LoRA is accepted");
        let request = EncodeRequest::new("full").prompt("a (red:1.3) cat").no_cache();
        let request = request.lora(uploaded.adapter, 0.8);
        for _ in 0..3 {
            client.encode(request.clone()).await.expect("the farm answers");
        }
        let receipt = client.encode(request).await.expect("the farm answers").receipt;
        let kept = if merged_budget_mb == 0 { MergedWeights::Built } else { MergedWeights::Cached };
        assert_eq!(receipt.merged_weights, Some(kept), "LoRA {seed}");
    }
    let encoding = cluster.worker(0).resident_bytes_peak();
    assert!(encoding < limit, "{encoding} bytes with LoRAs, the limit is {limit}");
}
