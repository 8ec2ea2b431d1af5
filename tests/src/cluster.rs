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

use crate::{launcher::Launcher, process::Process};

/// Longest time for a farm of tiny models to get ready, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a farm is to be made of.
#[derive(Debug, Clone)]
pub struct ClusterPlan {
    workers: usize,
    pub(crate) models: Vec<String>,
    pub(crate) weights_dtype: Dtype,
    pub(crate) embeddings: Option<PathBuf>,
    pub(crate) threads: usize,
    pub(crate) worker_flags: Vec<String>,
    pub(crate) broker_flags: Vec<String>,
    pub(crate) is_tcp: bool,
}

/// A running farm. Its processes end with it.
#[derive(Debug)]
pub struct Cluster {
    broker: Process,
    workers: Vec<Process>,
    launcher: Launcher,
    directory: TempDir,
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
        self.worker_flags.extend(flags.iter().map(ToString::to_string));
        self
    }

    /// With these further flags for the broker.
    #[must_use]
    pub fn broker_flags(mut self, flags: &[&str]) -> Self {
        self.broker_flags.extend(flags.iter().map(ToString::to_string));
        self
    }

    /// On TCP sockets of the loopback interface instead of ipc sockets.
    #[must_use]
    pub fn tcp(mut self) -> Self {
        self.is_tcp = true;
        self
    }

    /// What starts the farm's processes one by one, with their files in `directory`.
    pub fn launcher(self, directory: &Path) -> Launcher {
        Launcher::new(self, directory)
    }

    /// Starts the farm and waits until it is ready.
    pub async fn start(self) -> Cluster {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let workers = self.workers;
        let launcher = self.launcher(directory.path());
        let mut cluster = Cluster {
            broker: launcher.start_broker(),
            workers: (0..workers).map(|number| launcher.start_worker(number)).collect(),
            launcher,
            directory,
        };
        cluster.wait_for_workers(workers).await;
        cluster
    }
}

impl Cluster {
    /// Where clients connect.
    pub fn endpoint(&self) -> &str {
        self.launcher.endpoint()
    }

    /// Where workers connect.
    pub fn worker_endpoint(&self) -> &str {
        self.launcher.worker_endpoint()
    }

    /// A directory that is deleted with the farm.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A new client.
    pub async fn client(&self) -> Client {
        Client::builder()
            .endpoint(self.endpoint())
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
        self.broker = self.launcher.start_broker();
    }

    /// Starts a worker anew, after it was killed.
    pub fn restart_worker(&mut self, number: usize) {
        self.workers[number] = self.launcher.start_worker(number);
    }

    /// Waits until `count` workers serve.
    pub async fn wait_for_workers(&mut self, count: usize) {
        let client = self.client().await;
        let started = Instant::now();
        loop {
            let status = client.status().await.expect("the broker answers");
            if status.workers.len() == count
                && (count == 0 || status.ready || !self.launcher.serves_models())
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
}
