//! A farm of real processes for one test: a broker, workers, sockets in a directory of its own.
//!
//! ```no_run
//! # use luna_e2e::{Cluster, models};
//! # async fn example() {
//! let cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
//! let client = cluster.client().await;
//! # }
//! ```

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use luna_client::{Client, Dtype};
use tempfile::TempDir;

use crate::process::Process;

/// Longest time for a farm of tiny models to get ready, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a farm is to be made of.
#[derive(Debug, Clone)]
pub struct ClusterPlan {
    workers: usize,
    models: Vec<String>,
    weights_dtype: Dtype,
    embeddings: Option<PathBuf>,
    threads: usize,
    worker_flags: Vec<String>,
    broker_flags: Vec<String>,
    is_tcp: bool,
}

/// A running farm. Its processes end with it.
#[derive(Debug)]
pub struct Cluster {
    plan: ClusterPlan,
    directory: TempDir,
    broker: Process,
    workers: Vec<Process>,
    endpoint: String,
    worker_endpoint: String,
}

/// Entry to the sentence that describes a farm.
impl Cluster {
    /// A plan of one worker without models.
    #[expect(clippy::new_ret_no_self, reason = "the sentence ends with `start`")]
    pub fn new() -> ClusterPlan {
        ClusterPlan {
            workers: 1,
            models: Vec::new(),
            weights_dtype: Dtype::Float32,
            embeddings: None,
            threads: 1,
            worker_flags: Vec::new(),
            broker_flags: Vec::new(),
            is_tcp: false,
        }
    }
}

impl ClusterPlan {
    /// With this many workers.
    #[must_use]
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = count;
        self
    }

    /// Serving this model: `NAME=FAMILY:FILE[,FILE]`.
    #[must_use]
    pub fn model(mut self, spec: &str) -> Self {
        self.models.push(spec.to_owned());
        self
    }

    /// Storing weights like this.
    #[must_use]
    pub fn weights_dtype(mut self, dtype: Dtype) -> Self {
        self.weights_dtype = dtype;
        self
    }

    /// With textual-inversion files.
    #[must_use]
    pub fn embeddings(mut self, directory: &Path) -> Self {
        self.embeddings = Some(directory.to_path_buf());
        self
    }

    /// With this many CPU threads for each worker.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// With these further flags for every worker; `{worker}` stands for its name.
    #[must_use]
    pub fn worker_flags(mut self, flags: &[&str]) -> Self {
        self.worker_flags.extend(strings(flags));
        self
    }

    /// With these further flags for the broker.
    #[must_use]
    pub fn broker_flags(mut self, flags: &[&str]) -> Self {
        self.broker_flags.extend(strings(flags));
        self
    }

    /// On TCP sockets of the loopback interface instead of ipc sockets.
    #[must_use]
    pub fn tcp(mut self) -> Self {
        self.is_tcp = true;
        self
    }

    /// Starts the farm and waits until it is ready.
    pub async fn start(self) -> Cluster {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let (endpoint, worker_endpoint) = if self.is_tcp {
            (free_tcp_endpoint(), free_tcp_endpoint())
        } else {
            let ipc = |name: &str| format!("ipc://{}", directory.path().join(name).display());
            (ipc("clients"), ipc("workers"))
        };
        let broker =
            start_broker(directory.path(), &endpoint, &worker_endpoint, &self.broker_flags);
        let mut cluster = Cluster {
            plan: self,
            directory,
            broker,
            workers: Vec::new(),
            endpoint,
            worker_endpoint,
        };
        for number in 0..cluster.plan.workers {
            cluster.workers.push(cluster.start_worker(number));
        }
        let workers = cluster.plan.workers;
        cluster.wait_for_workers(workers).await;
        cluster
    }
}

impl Cluster {
    /// Where clients connect.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where workers connect.
    pub fn worker_endpoint(&self) -> &str {
        &self.worker_endpoint
    }

    /// A directory that is deleted with the farm.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A new client.
    pub async fn client(&self) -> Client {
        Client::builder()
            .endpoint(&self.endpoint)
            .connect_timeout(PATIENCE)
            .timeout(PATIENCE)
            .connect()
            .await
            .expect("the broker is there")
    }

    /// The broker's process.
    pub fn broker(&mut self) -> &mut Process {
        &mut self.broker
    }

    /// A worker's process.
    pub fn worker(&mut self, number: usize) -> &mut Process {
        &mut self.workers[number]
    }

    /// Starts the broker anew on the same sockets and store, after it was killed.
    pub fn restart_broker(&mut self) {
        self.broker = start_broker(
            self.directory.path(),
            &self.endpoint,
            &self.worker_endpoint,
            &self.plan.broker_flags,
        );
    }

    /// Starts a worker anew, after it was killed.
    pub fn restart_worker(&mut self, number: usize) {
        self.workers[number] = self.start_worker(number);
    }

    /// Waits until `count` workers serve.
    pub async fn wait_for_workers(&mut self, count: usize) {
        let client = self.client().await;
        let started = Instant::now();
        loop {
            let status = client.status().await.expect("the broker answers");
            if status.workers.len() == count
                && (count == 0 || status.ready || self.plan.models.is_empty())
            {
                return;
            }
            for worker in &mut self.workers {
                assert!(worker.is_running(), "a worker ended early:\n{}", worker.output());
            }
            assert!(started.elapsed() < PATIENCE, "the farm did not get ready: {status:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn start_worker(&self, number: usize) -> Process {
        let mut arguments = strings(&["worker", "--exit-on-stdin-eof", "--endpoint"]);
        arguments.push(self.worker_endpoint.clone());
        arguments.extend(["--name".to_owned(), format!("cpu-{number}")]);
        arguments.extend(["--threads".to_owned(), self.plan.threads.to_string()]);
        arguments.extend(["--weights-dtype".to_owned(), self.plan.weights_dtype.to_string()]);
        for model in &self.plan.models {
            arguments.extend(["--model".to_owned(), model.clone()]);
        }
        if let Some(embeddings) = &self.plan.embeddings {
            arguments.extend(["--embeddings".to_owned(), embeddings.display().to_string()]);
        }
        let name = format!("cpu-{number}");
        arguments.extend(self.plan.worker_flags.iter().map(|flag| flag.replace("{worker}", &name)));
        Process::start(&arguments, &self.directory.path().join(format!("{name}.log")))
    }
}

fn start_broker(
    directory: &Path,
    endpoint: &str,
    worker_endpoint: &str,
    flags: &[String],
) -> Process {
    let mut arguments = strings(&["broker", "--exit-on-stdin-eof", "--endpoint", endpoint]);
    arguments.extend(strings(&["--worker-endpoint", worker_endpoint, "--store"]));
    arguments.push(directory.join("store").display().to_string());
    arguments.extend_from_slice(flags);
    Process::start(&arguments, &directory.join("broker.log"))
}

/// An address that nothing listened on a moment ago.
fn free_tcp_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    format!("tcp://{}", listener.local_addr().expect("the listener is bound"))
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}
