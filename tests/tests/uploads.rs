//! Uploads against a broker that is killed, a disk that is full, and clients with the same file.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use luna_client::{BlobDigest, ErrorCode};
use luna_e2e::{Cluster, golden::tiny_lora};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

const MIB: usize = 1 << 20;

/// A broker that is killed right after it has answered chunks, the last one included.
#[tokio::test]
async fn an_upload_goes_on_where_it_was_when_the_broker_was_killed() {
    let mut cluster = Cluster::new().workers(0).start().await;
    let (path, bytes) = file(&cluster, 24 * MIB + 12_345);
    let client = cluster.client().await;
    let store = cluster.directory().join("store");
    let mut kills = vec![25, 24, 17, 16, 9, 2, 1]; // Chunks.
    let (mut steps, mut expected, mut killed) = (Vec::new(), None, 0);

    let uploaded = client.upload_model_file(&path, |step| {
        let chunks = usize::try_from(step.sent_bytes).expect("a size").div_ceil(MIB);
        if let Some(before) = expected.take() {
            assert!(step.sent_bytes > before, "what was answered is not sent again");
        }
        steps.push(step.sent_bytes);
        let before = kills.len();
        // A chunk whose answer was lost is not told of.
        kills.retain(|&kill| kill > chunks);
        if kills.len() < before {
            killed += 1;
            cluster.broker().kill();
            assert_eq!(models(&store), [] as [PathBuf; 0], "half a file is never visible");
            cluster.restart_broker();
            expected = Some(step.sent_bytes);
        }
    });
    let uploaded = uploaded.await.expect("it is uploaded in the end");

    assert!(killed > 1, "killed {killed} times");
    assert!(steps.is_sorted());
    assert!(uploaded.sent_bytes <= bytes.len() as u64, "{} bytes were sent", uploaded.sent_bytes);
    assert_eq!(uploaded.blob, BlobDigest::of(&bytes));
    assert_stored(&store, &bytes);

    cluster.broker().kill();
    cluster.restart_broker();
    let again = client.upload_model_file(&path, |_| {}).await.expect("the broker is back");
    assert_eq!((again.blob, again.sent_bytes), (uploaded.blob, 0));
}

/// A broker that is killed again and again, at moments that nothing chooses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_at_any_moment_holds_the_whole_file_or_none() {
    let mut cluster = Cluster::new().workers(0).start().await;
    let (path, bytes) = file(&cluster, 12 * MIB);
    let client = cluster.client().await;
    let store = cluster.directory().join("store");
    let is_over = AtomicBool::new(false);
    let mut random = StdRng::seed_from_u64(7);

    let upload = async {
        let uploaded = client.upload_model_file(&path, |_| {}).await;
        is_over.store(true, Ordering::Relaxed);
        uploaded.expect("it is uploaded in the end")
    };
    let killing = async {
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(random.random_range(5..60))).await;
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            cluster.broker().kill();
            for model in models(&store) {
                assert!(fs::read(&model).expect("it is there") == bytes, "half a file is visible");
            }
            cluster.restart_broker();
        }
    };
    let (uploaded, ()) = tokio::join!(upload, killing);

    assert_eq!(uploaded.blob, BlobDigest::of(&bytes));
    assert!(uploaded.sent_bytes <= bytes.len() as u64, "{} bytes were sent", uploaded.sent_bytes);
    assert_stored(&store, &bytes);
}

#[tokio::test]
async fn an_upload_that_was_cancelled_is_gone_on_with_by_another_client() {
    let cluster = Cluster::new().workers(0).start().await;
    let (path, bytes) = file(&cluster, 16 * MIB);
    let (first, second) = (cluster.client().await, cluster.client().await);
    let (half, mut came) = tokio::sync::mpsc::unbounded_channel();
    tokio::select! {
        ended = first.upload_model_file(&path, |step| {
            if step.sent_bytes >= 8 * MIB as u64 {
                half.send(()).expect("the test waits");
            }
        }) => panic!("{ended:?}"),
        _ = came.recv() => {}
    }
    let uploaded = second.upload_model_file(&path, |_| {}).await.expect("it is gone on with");
    assert!(uploaded.sent_bytes <= 8 * MIB as u64, "{} bytes were sent", uploaded.sent_bytes);
    assert_stored(&cluster.directory().join("store"), &bytes);
}

#[tokio::test]
async fn a_file_that_two_clients_upload_at_once_is_sent_once() {
    let cluster = Cluster::new().workers(0).start().await;
    let (path, bytes) = file(&cluster, 16 * MIB);
    let (first, second) = (cluster.client().await, cluster.client().await);
    let (one, other) = tokio::join!(
        first.upload_model_file(&path, |_| {}),
        second.upload_model_file(&path, |_| {}),
    );
    let (one, other) = (one.expect("it is uploaded"), other.expect("it is uploaded"));
    assert_eq!(one.blob, other.blob);
    assert_eq!(one.sent_bytes + other.sent_bytes, bytes.len() as u64);
    assert_stored(&cluster.directory().join("store"), &bytes);
}

#[tokio::test]
async fn a_full_disk_is_a_typed_error_and_the_broker_goes_on() {
    let cluster = Cluster::new().workers(0).start().await;
    let client = cluster.client().await;
    let uploads = cluster.directory().join("store/uploads");
    std::os::unix::fs::symlink("/dev/full", uploads.join("new")).expect("the store is writable");

    let lora = tiny_lora("sd15", "kohya");
    let error = client.upload_lora(&lora, |_| {}).await.expect_err("nothing can be written");
    assert_eq!(error.code(), Some(ErrorCode::StoreFull), "{error}");
    assert!(error.is_retryable() && error.retry_after().is_some());
    assert!(error.to_string().contains("make room"), "{error}");
    assert_eq!(client.list_loras().await.expect("the broker answers"), []);
    let status = client.status().await.expect("the broker answers");
    assert!(status.reasons.iter().any(|reason| reason.contains("No space left")), "{status:?}");

    client.upload_lora(&lora, |_| {}).await.expect("there is room again");
    let status = client.status().await.expect("the broker answers");
    assert!(!status.reasons.iter().any(|reason| reason.contains("No space left")), "{status:?}");
    assert_eq!(fs::read_dir(uploads).expect("it is there").count(), 0);
}

/// A file of bytes that do not repeat.
fn file(cluster: &Cluster, length: usize) -> (PathBuf, Vec<u8>) {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(length as u64).fill(&mut bytes[..]);
    let path = cluster.directory().join("model.safetensors");
    fs::write(&path, &bytes).expect("the directory is writable");
    (path, bytes)
}

/// The files of models that the store holds under their final names.
fn models(store: &Path) -> Vec<PathBuf> {
    let entries = |path: &Path| fs::read_dir(path).expect("it is there").map(Result::unwrap);
    let mut found = Vec::new();
    for directory in entries(&store.join("models")) {
        for file in entries(&directory.path()) {
            found.extend(Some(file.path()).filter(|path| path.extension().is_none()));
        }
    }
    found
}

/// Asserts that the store holds this file and nothing of its upload.
fn assert_stored(store: &Path, bytes: &[u8]) {
    let found = models(store);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(fs::read(&found[0]).expect("it is there") == bytes, "the bytes are others");
    assert_eq!(fs::read_dir(store.join("uploads")).expect("it is there").count(), 0);
}
