//! The `luna` command as people and scripts use it.

use std::{
    path::Path,
    process::{Command, Output},
};

use fixtures::Size;
use luna_e2e::{Cluster, Process, binary::luna, models};
use safetensors::SafeTensors;
use serde_json::Value;

#[test]
fn up_serves_until_it_is_told_to_stop_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let endpoint = format!("ipc://{}", directory.path().join("luna").display());
    let mut up = start_up(directory.path(), &endpoint);
    let children = wait_for(|| {
        let status = run(&["status", "--wait", "--json", "--endpoint", &endpoint]);
        assert!(status.status.success(), "{}", text(&status.stderr));
        Some(worker_pids(&json(&status))).filter(|pids| pids.len() == 2)
    });

    assert!(up.terminate().success(), "{}", up.output());
    for pid in children {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "worker {pid} outlived `luna up`");
    }
    let after = run(&["status", "--timeout", "1s", "--endpoint", &endpoint]);
    assert!(!after.status.success());
    assert!(text(&after.stderr).contains("luna up"), "{}", text(&after.stderr));
    assert!(up.output().contains("the farm has stopped"), "{}", up.output());
}

#[test]
fn up_starts_a_dead_worker_again_and_takes_its_farm_along_when_killed() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let endpoint = format!("ipc://{}", directory.path().join("luna").display());
    let mut up = start_up(directory.path(), &endpoint);
    let pids = || {
        let output = run(&["status", "--wait", "--json", "--endpoint", &endpoint]);
        worker_pids(&json(&output))
    };
    let before = wait_for(|| Some(pids()).filter(|pids| pids.len() == 2));
    kill(before[0]);
    let after =
        wait_for(|| Some(pids()).filter(|pids| pids.len() == 2 && !pids.contains(&before[0])));

    up.kill();
    for pid in after {
        wait_for(|| (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    }
}

#[test]
fn a_missing_model_file_ends_up_with_its_name() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let endpoint = format!("ipc://{}", directory.path().join("luna").display());
    let store = directory.path().join("store");
    let output = run(&[
        "up",
        "--model",
        "sd=sd15:/no/such/clip_l.safetensors",
        "--endpoint",
        &endpoint,
        "--store",
        &store.display().to_string(),
    ]);
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).contains("/no/such/clip_l.safetensors"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn the_demo_shows_that_a_lora_leaves_nothing_behind() {
    let output = run(&["demo", "--tiny", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows = json(&output);
    let rows = rows.as_array().expect("the demo prints a list");
    assert_eq!(rows.len(), 10);
    for row in rows {
        let is_base = row["stack"].as_str().is_some_and(|stack| stack.starts_with("none"));
        assert_eq!(row["distance"].as_f64() == Some(0.0), is_base, "{row}");
    }
}

#[tokio::test]
async fn encode_writes_the_conditioning_and_its_receipt() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let lora = models::seeded_lora(Size::Tiny, 1, 4).display().to_string();
    let file = |name: &str| cluster.directory().join(name).display().to_string();
    let encode = |output: &str, more: &[&str]| {
        let prompt = ["--model", "tiny", "--prompt", "a (red:1.3) cat", "-o", output];
        let endpoint = ["encode", "--endpoint", cluster.endpoint(), "--json"];
        let output = run(&[&endpoint[..], &prompt[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        json(&output)
    };
    let receipt = encode(&file("lora"), &["--lora", &format!("{lora}:0.8"), "--clip-skip=-2"]);
    assert_eq!(receipt["stack"][0]["applied"], 24);
    let adapter = receipt["stack"][0]["adapter"].as_str().expect("the receipt names the adapter");
    let by_digest = format!("{adapter}:0.8");
    let again = ["--lora", &by_digest, "--clip-skip=-2"];
    assert_eq!(encode(&file("digest"), &again)["cache"], "hit");
    let anew = [&again[..], &["--no-cache"]].concat();
    assert_eq!(encode(&file("digest"), &anew)["cache"], Value::Null);
    encode(&file("base"), &[]);

    let read = |name: &str| std::fs::read(file(name)).expect("the file was written");
    let (lora, digest, base) = (read("lora"), read("digest"), read("base"));
    let tensors = SafeTensors::deserialize(&lora).expect("a safetensors file was written");
    assert_eq!(tensors.tensor("cond").expect("there is `cond`").shape(), [1, 77, 32]);
    assert_eq!(tensors.tensor("pooled").expect("there is `pooled`").shape(), [1, 32]);
    let cond = |file: &[u8]| {
        let tensors = SafeTensors::deserialize(file).expect("a safetensors file was written");
        tensors.tensor("cond").expect("there is `cond`").data().to_vec()
    };
    assert_eq!(cond(&lora), cond(&digest), "by file and by digest");
    assert_ne!(cond(&lora), cond(&base));
}

#[tokio::test]
async fn loras_are_pushed_once_listed_and_evicted() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let file = models::seeded_lora(Size::Tiny, 1, 4).display().to_string();
    let luna = |arguments: &[&str]| {
        let output = run(&[arguments, &["--json", "--endpoint", cluster.endpoint()]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        json(&output)
    };
    let first = luna(&["lora", "push", &file]);
    assert!(first[0]["sent_bytes"].as_u64() > Some(0));
    assert_eq!(luna(&["lora", "push", &file])[0]["sent_bytes"], 0);
    let adapter = first[0]["adapter"].as_str().expect("push prints the adapter").to_owned();
    let explained = luna(&["explain", "--model", "tiny", "--lora", &adapter]);
    assert_eq!(explained["chosen"], explained["workers"][0]["worker"]);
    assert!(explained["workers"][0]["score"]["total_ms"].as_f64() > Some(0.0));
    let listed = luna(&["lora", "ls"]);
    assert_eq!(listed[0]["adapter"], adapter.as_str());
    assert!(listed[0]["label"].as_str().is_some_and(|label| label.contains("lora-tiny-1")));
    assert_eq!(luna(&["lora", "evict", &adapter, "--delete"])["evicted"][0], adapter.as_str());
    assert_eq!(luna(&["lora", "ls"]).as_array().map(Vec::len), Some(0));
    assert_eq!(luna(&["model", "ls"])[0]["name"], "tiny");
}

#[test]
fn mistakes_on_the_command_line_are_named_with_a_remedy() {
    for (arguments, words) in [
        (
            &["encode", "--model", "m", "--prompt", "p", "--lora", "a:strong", "-o", "x"][..],
            "FILE:STRENGTH",
        ),
        (&["up", "--model", "nonsense"], "NAME=FAMILY:FILE"),
        (&["status", "--timeout", "soon"], "30s"),
        (&["worker", "--endpoint", "tcp://*:1"], "worker.endpoint"),
        (&["broker", "--endpoint", "tcp://0.0.0.0:1"], "broker.endpoint"),
    ] {
        let output = run(arguments);
        assert!(!output.status.success(), "{arguments:?} was accepted");
        assert!(text(&output.stderr).contains(words), "{arguments:?}: {}", text(&output.stderr));
    }
}

fn start_up(directory: &Path, endpoint: &str) -> Process {
    let store = directory.join("store").display().to_string();
    let model = models::tiny_sd15();
    let arguments =
        ["up", "--workers", "2", "--model", &model, "--endpoint", endpoint, "--store", &store];
    Process::start(&arguments.map(str::to_owned), &directory.join("up.log"))
}

fn run(arguments: &[&str]) -> Output {
    Command::new(luna())
        .args(arguments)
        .env_remove("LUNA_ENDPOINT")
        .output()
        .expect("`luna` can be started")
}

/// The process ids of the workers in what `luna status --json` printed.
fn worker_pids(status: &Value) -> Vec<u64> {
    let workers = status["workers"].as_array().into_iter().flatten();
    workers.filter_map(|worker| worker["pid"].as_u64()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("`--json` prints JSON")
}

fn kill(pid: u64) {
    let pid =
        i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        .expect("the process is there");
}

/// Polls until `ready` gives something, for half a minute at most.
fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    for _ in 0..600 {
        if let Some(value) = ready() {
            return value;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("what the test waits for did not happen")
}
