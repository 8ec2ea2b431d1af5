//! Memory of a worker at the true size of CLIP-L.

use fixtures::Size;
use luna_client::{Dtype, EncodeRequest, Family};
use luna_e2e::{Cluster, models};

/// Parameters of CLIP-L, from its sizes (Radford et al. 2021); its projection is not loaded.
const PARAMETERS: u64 = 123_060_480;

#[tokio::test]
async fn a_worker_stays_under_1_3_times_its_weights_in_f32() {
    let model = models::spec("full", Size::Full, Family::Sd15, Dtype::Float16);
    let mut cluster = Cluster::new().model(&model).weights_dtype(Dtype::Float16).start().await;
    let limit = PARAMETERS * 4 * 13 / 10;
    let loading = cluster.worker(0).resident_bytes_peak();
    assert!(loading < limit, "{loading} bytes while loading, the limit is {limit}");

    let client = cluster.client().await;
    let adapter = models::seeded_lora(Size::Full, 1, 16);
    let adapter = client.upload_lora(adapter, |_| {}).await.expect("the LoRA is accepted").adapter;
    for _ in 0..3 {
        let request = EncodeRequest::new("full").prompt("a (red:1.3) cat").lora(adapter, 0.8);
        client.encode(request).await.expect("the farm answers");
    }
    let encoding = cluster.worker(0).resident_bytes_peak();
    assert!(encoding < limit, "{encoding} bytes with a LoRA, the limit is {limit}");
}
