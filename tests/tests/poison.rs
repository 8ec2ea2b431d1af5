//! A request whose workers die: it is found by the workers' journals, refused, and stays refused
//! when the broker restarts, while requests that were there by chance are answered.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use luna_client::{Client, EncodeRequest, Encoding, Error, ErrorCode};
use luna_e2e::{Cluster, models, process::Signal};
use tokio::task::JoinHandle;

const WORKERS: usize = 3;

const CLIENTS: usize = 4;

/// Tries to catch a worker at the request before it has answered.
const TRIES: usize = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_kills_workers_is_refused_and_the_innocent_are_answered() {
    let journals = tempfile::tempdir().expect("a temporary directory can be made");
    let directory = journals.path().to_str().expect("its path is text");
    let mut cluster = Cluster::new()
        .workers(WORKERS)
        .model(&models::tiny_sd15())
        .worker_flags(&["--lanes", "2", "--journal", directory])
        .start()
        .await;
    let client = cluster.client().await;
    let key = key_of_poison(&client, journals.path()).await;
    let load = Load::start(&cluster).await;

    let journals = journals.path().to_owned();
    let mut killer = Killer { journals, key, killed: BTreeSet::new(), kills: 0 };
    let mut tries = 0;
    let error = loop {
        // Whoever answers in time proves the request innocent, and everything begins anew.
        killer.kills = 0;
        match killer.ask(&mut cluster, &client).await {
            Ok(_) => tries += 1,
            Err(error) => break error,
        }
        assert!(tries < TRIES, "no worker could be killed in time");
    };
    assert_eq!(error.code(), Some(ErrorCode::WorkerLost), "{error}");
    assert_eq!(killer.kills, 3);
    cluster.wait_for_workers(WORKERS).await;
    load.wait_for_answers(20).await;

    cluster.broker().kill();
    cluster.restart_broker();
    cluster.wait_for_workers(WORKERS).await;
    let again = encode(&cluster.client().await, poison()).await.expect_err("it is refused");
    assert_eq!(again.code(), Some(ErrorCode::WorkerLost), "{again}");
    load.wait_for_answers(20).await;
    load.stop().await;
}

/// Kills every worker that computes the request with this key.
struct Killer {
    journals: PathBuf,
    key: String,
    /// Epochs of processes that are dead; their journals stay until the next ones have read them.
    killed: BTreeSet<String>,
    kills: usize,
}

impl Killer {
    /// Asks for the poison and kills whoever begins with it, until there is an outcome.
    async fn ask(&mut self, cluster: &mut Cluster, client: &Client) -> Result<Encoding, Error> {
        let asked = tokio::spawn({
            let client = client.clone();
            async move { encode(&client, poison()).await }
        });
        while !asked.is_finished() {
            for number in 0..WORKERS {
                if let Some(epoch) = self.busy_process(number) {
                    self.kill(cluster, number, epoch);
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        asked.await.expect("asking does not panic")
    }

    /// Kills a worker unless it has just finished.
    fn kill(&mut self, cluster: &mut Cluster, number: usize, epoch: String) {
        cluster.worker(number).signal(Signal::STOP);
        if self.busy_process(number).is_some() {
            cluster.worker(number).kill();
            cluster.restart_worker(number);
            self.killed.insert(epoch);
            self.kills += 1;
        } else {
            cluster.worker(number).signal(Signal::CONT);
        }
    }

    /// The epoch of a worker's process that lives and computes the request.
    fn busy_process(&self, number: usize) -> Option<String> {
        let (epoch, busy) = process(&self.journals, number)?;
        (!self.killed.contains(&epoch) && busy.contains(&self.key)).then_some(epoch)
    }
}

/// Clients that ask for other things and check every answer.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for number in 0..CLIENTS {
            let client = cluster.client().await;
            let request = EncodeRequest::new("tiny").prompt(format!("cat {number}")).no_cache();
            let expected =
                bytes(&encode(&client, request.clone()).await.expect("the farm answers"));
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let encoding = encode(&client, request.clone()).await;
                    let encoding = encoding.expect("the innocent are answered");
                    assert_eq!(bytes(&encoding), expected, "client {number}");
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

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("every answer was right");
        }
    }
}

/// Asks until the farm has time for the request: on a slow machine it may say that it has not.
async fn encode(client: &Client, request: EncodeRequest) -> Result<Encoding, Error> {
    loop {
        match client.encode(request.clone()).await {
            Err(error) if error.code() == Some(ErrorCode::Overloaded) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            outcome => return outcome,
        }
    }
}

/// The name that the poison has in journals, learned while nobody asks for anything else.
async fn key_of_poison(client: &Client, journals: &Path) -> String {
    for _ in 0..TRIES {
        let asked = tokio::spawn({
            let client = client.clone();
            async move { encode(&client, poison()).await }
        });
        let mut key = None;
        while !asked.is_finished() {
            let busy = |number| process(journals, number).and_then(|(_, mut busy)| busy.pop());
            key = key.or_else(|| (0..WORKERS).find_map(busy));
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        asked.await.expect("asking does not panic").expect("nobody kills anything yet");
        if let Some(key) = key {
            return key;
        }
    }
    panic!("no journal ever named a request");
}

/// The epoch of a worker's last process and what it is busy with, as its journal says.
fn process(journals: &Path, number: usize) -> Option<(String, Vec<String>)> {
    let journal = fs::read(journals.join(format!("cpu-{number}.journal"))).unwrap_or_default();
    let text = String::from_utf8_lossy(&journal);
    let (_, slots) = text.split_once("\nprocess ")?;
    let (epoch, slots) = slots.split_once('\n')?;
    let lines = slots.lines().filter_map(|line| line.strip_prefix("busy "));
    let busy = lines.filter_map(|line| line.split(' ').next().map(str::to_owned));
    Some((epoch.to_owned(), busy.collect()))
}

/// A request that takes long enough to be caught at it.
fn poison() -> EncodeRequest {
    let text = "a very long prompt about a cat on a mat ".repeat(30);
    let request = EncodeRequest::new("tiny").no_cache();
    (0..25).fold(request, |request, number| request.prompt(format!("{number} {text}")))
}

fn bytes(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}
