//! Planned stops: workers leave one by one and come back, and no request notices.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fixtures::Size;
use luna_client::{AdapterId, Client, DrainTarget, EncodeRequest, ErrorCode, ErrorKind, Warm};
use luna_e2e::{Cluster, binary::luna, models, process::Signal};
use serde_json::Value;

const CLIENTS: u64 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_costs_no_request() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut load = Vec::new();
    for seed in 0..CLIENTS {
        let client = cluster.client().await;
        let adapter = upload(&client, seed).await;
        let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
        load.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                encode(&client, adapter).await;
                answers.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for number in [0, 1, 0, 1] {
        wait_for(&answers, 50).await;
        assert!(cluster.worker(number).terminate().success());
        wait_for(&answers, 50).await;
        cluster.restart_worker(number);
        cluster.wait_for_workers(2).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in load {
        client.await.expect("every request was answered");
    }
    let counters = cluster.client().await.status().await.expect("the broker answers").counters;
    assert_eq!((counters.failed, counters.workers_lost), (0, 0));
}

#[tokio::test]
async fn a_worker_leaves_when_another_has_what_it_alone_held() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, 7).await;
    let warmed = client.warm(Warm::new([adapter]).wait(Duration::from_secs(30))).await;
    let held = warmed.expect("the adapter is warmed").adapters.swap_remove(0).held;
    assert_eq!(held.len(), 1, "one home");
    let (leaving, staying) = if held[0].as_str() == "cpu-0" { (0, 1) } else { (1, 0) };

    let before = encode(&client, adapter).await;
    cluster.worker(leaving).signal(Signal::TERM);
    assert!(cluster.worker(leaving).wait().success());
    let lora = client.list_loras().await.expect("the broker answers").swap_remove(0);
    let holders: Vec<_> = lora.workers.iter().map(ToString::to_string).collect();
    assert_eq!(holders, [format!("cpu-{staying}")], "{}", cluster.worker(leaving).output());
    assert_eq!(encode(&client, adapter).await, before);
}

#[tokio::test]
async fn an_uploaded_lora_comes_to_its_home_by_itself() {
    let cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, 3).await;
    loop {
        let loras = client.list_loras().await.expect("the broker answers");
        if loras.iter().any(|lora| lora.adapter == adapter && !lora.workers.is_empty()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_warms_and_drains() {
    let cluster = Cluster::new()
        .workers(2)
        .model(&models::tiny_sd15())
        .broker_flags(&["--fan-out", "0"])
        .start()
        .await;
    let client = cluster.client().await;
    let adapter = upload(&client, 5).await.to_string();
    let endpoint = cluster.endpoint().to_owned();
    let run = |arguments: &[&str]| command(&endpoint, arguments);

    let (success, warm) = run(&["warm", &adapter, "--workers", "2", "--wait", "30s"]);
    assert!(success, "{warm}");
    assert_eq!(warm["adapters"][0]["held"], serde_json::json!(["cpu-0", "cpu-1"]));

    let (success, drain) = run(&["drain", "worker", "cpu-0", "--reason", "a new driver"]);
    assert!(success && drain["draining"] == true, "{drain}");
    let (_, status) = run(&["status"]);
    assert_eq!(status["workers"][0]["drain_reason"], "a new driver");
    assert_eq!((&status["workers"][0]["draining"], &status["ready"]), (&true.into(), &true.into()));
    let (success, drain) = run(&["drain", "worker", "cpu-0", "--undo"]);
    assert!(success && drain["draining"] == false, "{drain}");

    let (success, drain) = run(&["drain", "broker", "--reason", "an upgrade"]);
    assert!(success && drain["draining"] == true, "{drain}");
    let refused = client.encode(EncodeRequest::new("tiny").prompt("a cat")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Farm(ErrorCode::Overloaded));
    assert!(refused.to_string().contains("an upgrade"), "{refused}");
    client.undo_drain(DrainTarget::Broker).await.expect("it is not stopping");
    client.encode(EncodeRequest::new("tiny").prompt("a cat")).await.expect("it serves again");
}

/// Runs `luna` with `--json`; says whether it succeeded, and what it printed.
fn command(endpoint: &str, arguments: &[&str]) -> (bool, Value) {
    let output = Command::new(luna())
        .args(arguments)
        .args(["--json", "--endpoint", endpoint])
        .output()
        .expect("`luna` can be started");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::String(error));
    (output.status.success(), value)
}

async fn wait_for(answers: &AtomicUsize, count: usize) {
    let goal = answers.load(Ordering::Relaxed) + count;
    while answers.load(Ordering::Relaxed) < goal {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn upload(client: &Client, seed: u64) -> AdapterId {
    let path = models::seeded_lora(Size::Tiny, seed, 4);
    client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter
}

async fn encode(client: &Client, adapter: AdapterId) -> Vec<u32> {
    let request = EncodeRequest::new("tiny").prompt("a (red:1.3) cat").no_cache();
    let encoding = client.encode(request.lora(adapter, 0.8)).await.expect("it is answered");
    encoding.conditionings[0].cond.data.iter().map(|element| element.to_bits()).collect()
}
