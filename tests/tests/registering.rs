//! Models that are registered while the farm runs: by path, by upload, remembered, and refused by
//! what is wrong with them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use luna_client::{
    BlobDigest, Client, EncodeRequest, ErrorCode, Family, ModelStatus, RegisterModel,
    RegisterModelReply, WorkerName,
};
use luna_e2e::{Cluster, ClusterPlan, binary::luna, models};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

#[tokio::test]
async fn a_model_by_path_is_served_by_all_and_is_the_same_as_one_of_the_command_line() {
    let disk = Disk::new();
    let cluster = disk.plan().workers(2).start().await;
    let client = cluster.client().await;
    let same = register(&client, "same", &disk.model("same", 0)).await.unwrap();
    assert_eq!(names(&same.workers), ["cpu-0", "cpu-1"]);
    assert_eq!(same.failed, []);
    assert_eq!(same.model.digest, status_of(&client, "tiny").await.model.digest);
    assert_eq!(bytes(&client, "same").await, bytes(&client, "tiny").await);

    let other = register(&client, "other", &disk.model("other", 1)).await.unwrap();
    assert_ne!(bytes(&client, "other").await, bytes(&client, "tiny").await);
    let again = register(&client, "other", &disk.model("other", 1)).await.unwrap();
    assert_eq!(again.model, other.model);
    let status = status_of(&client, "other").await;
    assert_eq!((names(&status.workers), status.model), (names(&same.workers), other.model));
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_with_its_reason_and_the_farm_goes_on() {
    let disk = Disk::new();
    let cluster = disk.plan().start().await;
    let client = cluster.client().await;
    let base = bytes(&client, "tiny").await;
    let good = disk.model("good", 1);
    let outside = disk.path("outside.safetensors");
    fs::copy(&good, &outside).expect("the temporary directory is writable");
    let link = disk.path("models/link.safetensors");
    std::os::unix::fs::symlink(&outside, &link).expect("the temporary directory is writable");
    let broken = disk.path("models/broken.safetensors");
    fs::write(&broken, b"no safetensors").expect("the temporary directory is writable");
    let missing = disk.path("models/missing.safetensors");

    let (forbidden, invalid) = (ErrorCode::Forbidden, ErrorCode::InvalidRequest);
    for (name, path, code, words) in [
        ("m", &outside, forbidden, "--model-root"),
        ("m", &link, forbidden, "--model-root"),
        ("m", &missing, invalid, "there is no file"),
        ("m", &broken, invalid, "announces a header"),
        ("tiny", &good, invalid, "give them another name"),
    ] {
        let error = register(&client, name, path).await.expect_err("it is refused");
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(error.to_string().contains(words), "{words} is missing in: {error}");
    }
    let family = RegisterModel::new("m", Family::Sdxl).path(text(&good));
    let error = client.register_model(family, |_, _| {}).await.expect_err("it has no clip_g");
    assert_eq!(error.code(), Some(invalid), "{error}");
    assert!(error.to_string().contains("clip_g"), "{error}");

    assert_eq!(bytes(&client, "tiny").await, base);
    register(&client, "m", &good).await.unwrap();
    bytes(&client, "m").await;
}

#[tokio::test]
async fn a_farm_without_roots_takes_no_paths() {
    let disk = Disk::new();
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let error = register(&client, "m", &disk.model("good", 1)).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Forbidden), "{error}");
}

#[tokio::test]
async fn an_uploaded_model_is_sent_once_and_remembered_by_broker_and_workers() {
    let disk = Disk::new();
    let mut cluster = disk.plan().workers(2).start().await;
    let client = cluster.client().await;
    let file = disk.model("uploaded", 1);
    let model = || RegisterModel::new("up", Family::Sd15).upload(&file);
    let mut sent = 0;
    let first = client.register_model(model(), |_, step| sent = step.sent_bytes).await.unwrap();
    assert_eq!(names(&first.workers), ["cpu-0", "cpu-1"], "{:?}", first.failed);
    assert_eq!(sent, fs::metadata(&file).expect("the model is there").len());
    assert_eq!(client.upload_model_file(&file, |_| {}).await.unwrap().sent_bytes, 0);
    let answer = bytes(&client, "up").await;
    fs::remove_file(&file).expect("the temporary directory is writable");

    cluster.worker(0).kill();
    cluster.worker(1).kill();
    cluster.wait_for_workers(0).await;
    cluster.restart_worker(0);
    assert_eq!(bytes(&client, "up").await, answer, "the broker asked the new worker");

    cluster.broker().kill();
    cluster.worker(0).kill();
    cluster.restart_broker();
    cluster.restart_worker(0);
    assert_eq!(bytes(&cluster.client().await, "up").await, answer, "the broker remembers");
}

#[tokio::test]
async fn more_models_than_the_budget_holds_take_turns_in_memory() {
    let disk = Disk::new();
    // Each takes 6 MB: 49,408 tokens of 32 numbers in f32.
    let cluster = disk.plan().worker_flags(&["--model-budget-mb", "14"]).start().await;
    let client = cluster.client().await;
    let mut expected = vec![("tiny", bytes(&client, "tiny").await)];
    for (seed, name) in [(1, "one"), (2, "two")] {
        register(&client, name, &disk.model(name, seed)).await.unwrap();
        expected.push((name, bytes(&client, name).await));
    }
    for turn in 0..2 {
        for (name, answer) in &expected {
            assert_eq!(bytes(&client, name).await, *answer, "{name} in turn {turn}");
        }
    }
    let listed = client.list_models().await.unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed.iter().filter(|model| !model.loaded.is_empty()).count(), 2, "{listed:?}");
}

#[tokio::test]
async fn the_command_line_registers_and_lists_models() {
    let disk = Disk::new();
    let cluster = disk.plan().start().await;
    let run = |arguments: &[&str]| {
        let farm = ["--json", "--endpoint", cluster.endpoint()];
        Command::new(luna())
            .args([&["model"], arguments, &farm].concat())
            .output()
            .expect("`luna` can be started")
    };
    let json = |arguments: &[&str]| -> Value {
        let output = run(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("`--json` prints JSON")
    };
    let (by_path, uploaded) = (disk.model("by-path", 1), disk.model("uploaded", 2));
    let registered = json(&["register", "by-path", "sd15", text(&by_path)]);
    assert_eq!(registered["workers"][0], "cpu-0");
    json(&["register", "uploaded", "sd15", "--upload", text(&uploaded)]);
    let listed = json(&["ls"]);
    let names: Vec<_> = (0..3).map(|index| listed[index]["name"].as_str()).collect();
    assert_eq!(names, [Some("by-path"), Some("tiny"), Some("uploaded")]);
    assert_eq!(listed[0]["digest"], registered["model"]["digest"]);

    let missing = disk.path("models/missing.safetensors");
    let refused = run(&["register", "m", "sd15", text(&missing)]);
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("there is no file") && message.contains("--upload"), "{message}");
}

/// A directory of models that workers may take files from, and their caches.
struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().expect("a temporary directory can be made"));
        // Nothing else says how many heads so narrow a model has.
        let config = tiny_file().with_file_name("config.json");
        for folder in ["models", "cache/cpu-0/models", "cache/cpu-1/models"] {
            let folder = disk.path(folder);
            fs::create_dir_all(&folder).expect("the temporary directory is writable");
            models::copy(&config, &folder.join("config.json"));
        }
        disk
    }

    /// A farm with the tiny model.
    fn plan(&self) -> ClusterPlan {
        let (root, cache) = (self.path("models"), self.path("cache/{worker}"));
        let flags = ["--model-root", text(&root), "--cache", text(&cache)];
        Cluster::new().model(&models::tiny_sd15()).worker_flags(&flags)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The tiny model, with other weights for every seed but 0.
    fn model(&self, name: &str, seed: u8) -> PathBuf {
        let path = self.path("models").join(format!("{name}.safetensors"));
        let mut bytes = fs::read(tiny_file()).expect("the model is there");
        let (header_bytes, header) =
            SafeTensors::read_metadata(&bytes).expect("the model is a safetensors file");
        let bias = header.info("text_model.final_layer_norm.bias").expect("it has a last norm");
        // The first weight's least significant byte but one.
        bytes[8 + header_bytes + bias.data_offsets.0 + 1] ^= seed;
        fs::write(&path, bytes).expect("the temporary directory is writable");
        path
    }
}

fn tiny_file() -> PathBuf {
    let spec = models::tiny_sd15();
    PathBuf::from(spec.strip_prefix("tiny=sd15:").expect("it is a stand-alone CLIP-L"))
}

async fn register(
    client: &Client,
    name: &str,
    path: &Path,
) -> Result<RegisterModelReply, luna_client::Error> {
    let model = RegisterModel::new(name, Family::Sd15).path(text(path));
    client.register_model(model, |_, _| {}).await
}

async fn status_of(client: &Client, name: &str) -> ModelStatus {
    let models = client.list_models().await.expect("the broker answers");
    let found = models.into_iter().find(|status| status.model.name.as_str() == name);
    found.expect("the model is served")
}

/// A digest of the encoding of one prompt, bit by bit.
async fn bytes(client: &Client, model: &str) -> BlobDigest {
    let request = EncodeRequest::new(model).prompt("a (red:1.3) cat").no_cache();
    let encoding = client.encode(request).await.expect("the farm answers");
    let conditioning = &encoding.conditionings[0];
    let elements = conditioning.cond.data.iter().chain(&conditioning.pooled.data);
    BlobDigest::of(&elements.flat_map(|element| element.to_le_bytes()).collect::<Vec<_>>())
}

fn names(workers: &[WorkerName]) -> Vec<&str> {
    workers.iter().map(WorkerName::as_str).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}
