//! An adapter comes from the nearest place that has it, and a place that is full or broken costs time
//! and never an answer.

use std::{fs, path::PathBuf};

use fixtures::Size;
use luna_client::{AdapterId, AdapterSource, Client, EncodeRequest, Encoding, ErrorCode};
use luna_e2e::{Cluster, models};

#[tokio::test]
async fn an_adapter_that_left_the_device_comes_from_main_memory() {
    let cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .broker_flags(&["--fan-out", "0"])
        .worker_flags(&["--adapter-budget-mb", "1", "--host-budget-mb", "64"])
        .start()
        .await;
    let client = cluster.client().await;
    let adapters = large_adapters(&client).await;
    for (adapter, answer) in &adapters {
        assert_eq!(source(answer), AdapterSource::Broker, "{adapter} is new");
    }
    let first = &adapters[0];
    let again = encode(&client, &[first.0]).await;
    assert_eq!(source(&again), AdapterSource::Host);
    assert_eq!(bytes(&again), bytes(&first.1));
    assert_eq!(source(&encode(&client, &[first.0]).await), AdapterSource::Resident);
    let status = client.status().await.expect("the broker answers");
    assert!(status.workers[0].host > 0, "{status:?}");
}

#[tokio::test]
async fn a_worker_that_starts_anew_finds_its_adapters_on_disk() {
    let cache = tempfile::tempdir().expect("a temporary directory can be made");
    let cache_path = cache.path().display().to_string();
    let mut cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .broker_flags(&["--fan-out", "0"])
        .worker_flags(&["--cache", &format!("{cache_path}/{{worker}}")])
        .start()
        .await;
    let client = cluster.client().await;
    let adapter = upload(&client, models::seeded_lora(Size::Tiny, 1, 4)).await;
    let first = encode(&client, &[adapter]).await;
    assert_eq!(source(&first), AdapterSource::Broker);

    cluster.worker(0).kill();
    cluster.restart_worker(0);
    cluster.wait_for_workers(1).await;
    let again = encode(&client, &[adapter]).await;
    assert_eq!(source(&again), AdapterSource::Disk);
    assert_eq!(bytes(&again), bytes(&first));

    // A file that rotted is not believed: the adapter is fetched anew.
    cluster.worker(0).terminate();
    let rotten = files(cache.path()).into_iter().filter(|file| {
        let name = file.to_string_lossy();
        name.contains(&adapter.to_string())
    });
    for file in rotten {
        let mut bytes = fs::read(&file).expect("the cache is readable");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&file, bytes).expect("the cache is writable");
    }
    cluster.restart_worker(0);
    cluster.wait_for_workers(1).await;
    let healed = encode(&client, &[adapter]).await;
    assert_eq!(source(&healed), AdapterSource::Broker);
    assert_eq!(bytes(&healed), bytes(&first));
}

#[tokio::test]
async fn a_stack_that_cannot_fit_is_refused_by_its_size_and_the_worker_goes_on() {
    let cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .broker_flags(&["--fan-out", "0"])
        .worker_flags(&["--adapter-budget-mb", "1"])
        .start()
        .await;
    let client = cluster.client().await;
    let adapters: Vec<AdapterId> =
        large_adapters(&client).await.into_iter().map(|(adapter, _)| adapter).collect();
    let base = bytes(&encode(&client, &[]).await);
    let error = try_encode(&client, &adapters).await.expect_err("it does not fit");
    assert_eq!(error.code(), Some(ErrorCode::TooLarge), "{error}");
    assert!(error.to_string().contains("1048576"), "{error}");
    assert_eq!(bytes(&encode(&client, &[]).await), base);
    assert_eq!(encode(&client, &adapters[..1]).await.receipt.stack[0].applied, 24);
}

/// Three adapters of some 400 KB each, so that a device with room for 1 MiB holds two, and their
/// first answers.
async fn large_adapters(client: &Client) -> Vec<(AdapterId, Encoding)> {
    let mut adapters = Vec::new();
    for seed in 1..=3 {
        let adapter = upload(client, models::seeded_lora(Size::Tiny, seed, 40)).await;
        let answer = encode(client, &[adapter]).await;
        adapters.push((adapter, answer));
    }
    adapters
}

async fn upload(client: &Client, path: PathBuf) -> AdapterId {
    client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter
}

async fn encode(client: &Client, adapters: &[AdapterId]) -> Encoding {
    try_encode(client, adapters).await.expect("the farm answers")
}

async fn try_encode(
    client: &Client,
    adapters: &[AdapterId],
) -> Result<Encoding, luna_client::Error> {
    let request = EncodeRequest::new("tiny").prompt("a (red:1.3) cat").no_cache();
    client.encode(adapters.iter().fold(request, |request, id| request.lora(*id, 0.8))).await
}

fn source(encoding: &Encoding) -> AdapterSource {
    encoding.receipt.stack[0].source
}

fn bytes(encoding: &Encoding) -> Vec<u32> {
    encoding.conditionings[0].cond.data.iter().map(|element| element.to_bits()).collect()
}

/// Every file below `directory`.
fn files(directory: &std::path::Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("the directory is readable");
    let paths = entries.map(|entry| entry.expect("the directory is readable").path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
