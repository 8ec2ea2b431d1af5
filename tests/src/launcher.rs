//! How the processes of one farm are started: their arguments, sockets and logs.
//!
//! It keeps no process: whoever starts one owns it.

use std::path::{Path, PathBuf};

use crate::{cluster::ClusterPlan, process::Process};

/// Starts the processes of one farm, again and again at the same sockets and store.
#[derive(Debug, Clone)]
pub struct Launcher {
    plan: ClusterPlan,
    directory: PathBuf,
    endpoint: String,
    worker_endpoint: String,
}

impl Launcher {
    pub(crate) fn new(plan: ClusterPlan, directory: &Path) -> Self {
        let (endpoint, worker_endpoint) = if plan.is_tcp {
            (free_tcp_endpoint(), free_tcp_endpoint())
        } else {
            let ipc = |name: &str| format!("ipc://{}", directory.join(name).display());
            (ipc("clients"), ipc("workers"))
        };
        Self { plan, directory: directory.to_owned(), endpoint, worker_endpoint }
    }

    /// Where clients connect.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where workers connect.
    pub fn worker_endpoint(&self) -> &str {
        &self.worker_endpoint
    }

    /// What worker `number` is called.
    pub fn worker_name(number: usize) -> String {
        format!("cpu-{number}")
    }

    /// Where the output of the broker is appended.
    pub fn broker_log(&self) -> PathBuf {
        self.directory.join("broker.log")
    }

    /// Where the output of worker `number` is appended.
    pub fn worker_log(&self, number: usize) -> PathBuf {
        self.directory.join(format!("{}.log", Self::worker_name(number)))
    }

    /// Starts the broker.
    pub fn start_broker(&self) -> Process {
        let mut arguments = strings(&["broker", "--exit-on-stdin-eof", "--endpoint"]);
        arguments.push(self.endpoint.clone());
        arguments.extend(["--worker-endpoint".to_owned(), self.worker_endpoint.clone()]);
        arguments
            .extend(["--store".to_owned(), self.directory.join("store").display().to_string()]);
        arguments.extend_from_slice(&self.plan.broker_flags);
        Process::start(&arguments, &self.broker_log())
    }

    /// Starts worker `number`.
    pub fn start_worker(&self, number: usize) -> Process {
        let name = Self::worker_name(number);
        let mut arguments = strings(&["worker", "--exit-on-stdin-eof", "--endpoint"]);
        arguments.push(self.worker_endpoint.clone());
        arguments.extend(["--name".to_owned(), name.clone()]);
        arguments.extend(["--threads".to_owned(), self.plan.threads.to_string()]);
        arguments.extend(["--weights-dtype".to_owned(), self.plan.weights_dtype.to_string()]);
        for model in &self.plan.models {
            arguments.extend(["--model".to_owned(), model.clone()]);
        }
        if let Some(embeddings) = &self.plan.embeddings {
            arguments.extend(["--embeddings".to_owned(), embeddings.display().to_string()]);
        }
        arguments.extend(self.plan.worker_flags.iter().map(|flag| flag.replace("{worker}", &name)));
        Process::start(&arguments, &self.worker_log(number))
    }

    pub(crate) fn serves_models(&self) -> bool {
        !self.plan.models.is_empty()
    }
}

/// An address that nothing listened on a moment ago.
fn free_tcp_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    format!("tcp://{}", listener.local_addr().expect("the listener is bound"))
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}
