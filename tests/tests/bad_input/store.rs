//! Adapters that the disk changed behind the broker's back.

use std::path::PathBuf;

use luna_client::{AdapterId, ErrorCode};
use luna_e2e::Cluster;

use crate::support::{Farm, base_request, bits, flipped};

#[tokio::test]
async fn an_adapter_that_rots_on_the_disk_is_never_applied() {
    let mut farm = Farm::start().await;
    let adapter = farm.good_lora().await;
    let request = base_request().lora(adapter, 1.0);
    let with_lora = bits(&farm.client.encode(request.clone()).await.expect("it is applied"));
    let path = blob_path(&farm.cluster, &adapter);
    let blob = std::fs::read(&path).expect("the store keeps blobs under their names");

    // Neither process remembers the adapter, and the last byte on the disk is another.
    farm.cluster.broker().kill();
    std::fs::write(&path, flipped(&blob, blob.len() * 8 - 8)).expect("the store is writable");
    farm.cluster.restart_broker();
    farm.cluster.wait_for_workers(1).await;
    farm.client.evict_lora(&[adapter], false).await.expect("the broker answers");

    let words = [&*adapter.to_string(), "upload it again"];
    farm.assert_refuses(request.clone(), ErrorCode::UnknownLora, &words).await;
    assert_eq!(farm.good_lora().await, adapter);
    let again = bits(&farm.client.encode(request).await.expect("it is applied"));
    assert_eq!(again, with_lora);
    farm.assert_serves().await;
}

/// Where the blob store keeps the canonical bytes of an adapter.
pub(crate) fn blob_path(cluster: &Cluster, adapter: &AdapterId) -> PathBuf {
    let name = adapter.to_string();
    cluster.directory().join("store/blobs").join(&name[..2]).join(name)
}
