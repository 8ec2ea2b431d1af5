//! Crashes: every request is answered, and answered right, while processes die.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fixtures::Size;
use luna_client::{AdapterId, Client, EncodeRequest, Encoding};
use luna_e2e::{Cluster, models};
use tokio::task::JoinHandle;

const CLIENTS: u64 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_costs_no_request() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let load = Load::start(&cluster).await;
    for number in [0, 1, 0] {
        load.wait_for_answers(200).await;
        cluster.worker(number).kill();
        cluster.restart_worker(number);
        cluster.wait_for_workers(2).await;
    }
    let answers = load.stop().await;
    assert!(answers >= 600, "only {answers} answers");
    let status = cluster.client().await.status().await.expect("the broker answers");
    assert_eq!(status.counters.workers_lost, 3);
    assert_eq!(status.counters.failed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_broker_comes_back_and_every_request_is_answered() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let load = Load::start(&cluster).await;
    for _ in 0..3 {
        load.wait_for_answers(200).await;
        cluster.broker().kill();
        cluster.restart_broker();
    }
    load.wait_for_answers(200).await;
    let answers = load.stop().await;
    assert!(answers >= 800, "only {answers} answers");
}

#[tokio::test]
async fn a_request_waits_for_a_worker_that_comes_back() {
    let mut cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let base = encode(&client, None).await;
    cluster.worker(0).kill();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { encode(&client, None).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    cluster.restart_worker(0);
    assert_eq!(bytes(&waiting.await.expect("the request is answered")), bytes(&base));
}

#[tokio::test]
async fn an_uploaded_lora_survives_a_killed_broker() {
    let mut cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, 1).await;
    let before = encode(&client, Some(adapter)).await;
    cluster.broker().kill();
    cluster.worker(0).kill();
    cluster.restart_broker();
    cluster.restart_worker(0);
    cluster.wait_for_workers(1).await;
    let client = cluster.client().await;
    assert_eq!(client.has_lora(&[adapter]).await.expect("the broker answers").present, [adapter]);
    assert_eq!(bytes(&encode(&client, Some(adapter)).await), bytes(&before));
}

#[tokio::test]
async fn a_stopped_worker_is_noticed_by_its_silence() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    cluster.worker(0).signal(luna_e2e::process::Signal::STOP);
    for _ in 0..10 {
        encode(&client, None).await;
    }
    cluster.worker(0).signal(luna_e2e::process::Signal::CONT);
    cluster.wait_for_workers(2).await;
}

#[tokio::test]
async fn a_worker_that_is_asked_to_stop_drains_and_exits_with_success() {
    let mut cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let load = Load::start(&cluster).await;
    load.wait_for_answers(100).await;
    assert!(cluster.worker(0).terminate().success());
    load.wait_for_answers(100).await;
    load.stop().await;
    let client = cluster.client().await;
    let status = client.status().await.expect("the broker answers");
    assert_eq!((status.workers.len(), status.counters.workers_lost), (1, 0));
    assert!(cluster.broker().terminate().success());
}

/// Clients that encode with stacks of their own and check every answer.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for seed in 0..CLIENTS {
            let client = cluster.client().await;
            let adapter = if seed == 0 { None } else { Some(upload(&client, seed).await) };
            let expected = bytes(&encode(&client, adapter).await);
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(bytes(&encode(&client, adapter).await), expected, "client {seed}");
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Self { stop, answers, tasks }
    }

    /// Waits until `count` more answers have come.
    async fn wait_for_answers(&self, count: usize) {
        let goal = self.answers.load(Ordering::Relaxed) + count;
        while self.answers.load(Ordering::Relaxed) < goal {
            assert!(self.tasks.iter().all(|task| !task.is_finished()), "a client failed");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("every answer was right");
        }
        self.answers.load(Ordering::Relaxed)
    }
}

async fn encode(client: &Client, adapter: Option<AdapterId>) -> Encoding {
    let request = EncodeRequest::new("tiny").prompt("a photo of a (red:1.3) cat").no_cache();
    let request = adapter.into_iter().fold(request, |request, adapter| request.lora(adapter, 0.8));
    client.encode(request).await.expect("every request is answered")
}

async fn upload(client: &Client, seed: u64) -> AdapterId {
    let path = models::seeded_lora(Size::Tiny, seed, 4);
    client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter
}

fn bytes(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}
