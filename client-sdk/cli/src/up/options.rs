//! What a farm is made of, as the arguments of its processes.
//!
//! Only what was asked for is passed on: a flag wins over the settings that a process reads itself.

use std::{
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use protocol::{Dtype, ExecutionMode, Fidelity};
use settings::Time;
use worker::model::ModelSpec;

use super::{FarmPlan, Program};

/// What a farm is made of.
#[derive(Debug, Clone)]
pub(crate) struct FarmOptions {
    pub(crate) models: Vec<ModelSpec>,
    pub(crate) embeddings: Option<PathBuf>,
    pub(crate) workers: u32,
    pub(crate) endpoint: String,
    /// Where workers connect; else what follows from `endpoint`.
    pub(crate) worker_endpoint: Option<String>,
    pub(crate) weights_dtype: Option<Dtype>,
    pub(crate) threads: Option<u32>,
    pub(crate) lanes: Option<u32>,
    pub(crate) execution_mode: Option<ExecutionMode>,
    pub(crate) fidelity: Option<Fidelity>,
    /// Where workers keep adapters on disk; several get a directory each in it.
    pub(crate) cache: Option<PathBuf>,
    /// Where workers keep their journals, a file each; left to them without it.
    pub(crate) journal: Option<PathBuf>,
    /// Directories in which workers may look for models.
    pub(crate) model_roots: Vec<PathBuf>,
    pub(crate) store: Option<PathBuf>,
    pub(crate) worker_exe: Option<PathBuf>,
    pub(crate) grace: Option<Duration>,
    /// How long each process may really take to drain.
    pub(crate) patience: Duration,
    pub(crate) json_logs: bool,
}

impl FarmOptions {
    /// The processes to start.
    pub(crate) fn plan(&self) -> anyhow::Result<FarmPlan> {
        let luna =
            std::env::current_exe().context("cannot find this executable to start it again")?;
        let worker_endpoint = self.workers_connect_to()?;
        Ok(FarmPlan {
            broker: self.broker(luna.clone(), &worker_endpoint)?,
            workers: (0..self.workers)
                .map(|n| self.worker(&luna, n, &worker_endpoint))
                .collect::<anyhow::Result<_>>()?,
            grace: self.patience,
        })
    }

    /// Refuses an endpoint on which somebody listens: our broker could not, and our workers would
    /// join a stranger's farm and take the places of its workers of the same names.
    pub(super) fn check_free(&self) -> anyhow::Result<()> {
        let workers = self.workers_connect_to()?;
        for endpoint in [&self.endpoint, &workers] {
            if is_listening(endpoint) {
                bail!(
                    "`{endpoint}` is in use, perhaps by a farm (see `luna status`): stop it, or choose another `--endpoint`"
                );
            }
        }
        Ok(())
    }

    fn workers_connect_to(&self) -> anyhow::Result<String> {
        match &self.worker_endpoint {
            Some(endpoint) => Ok(endpoint.clone()),
            None => Ok(broker::worker_endpoint_of(&self.endpoint.parse()?)?.to_string()),
        }
    }

    fn broker(&self, executable: PathBuf, worker_endpoint: &str) -> anyhow::Result<Program> {
        let mut arguments = vec!["broker".to_owned()];
        let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        flag("--endpoint", self.endpoint.clone());
        flag("--worker-endpoint", worker_endpoint.to_owned());
        if let Some(store) = &self.store {
            flag("--store", text("--store", store)?);
        }
        self.common(&mut arguments);
        let (name, environment) = ("broker".to_owned(), Vec::new());
        Ok(Program { name, executable, arguments, environment })
    }

    fn worker(&self, luna: &Path, number: u32, endpoint: &str) -> anyhow::Result<Program> {
        let name = format!("cpu-{number}");
        let (executable, mut arguments) = match &self.worker_exe {
            Some(executable) => (executable.clone(), Vec::new()),
            None => (luna.to_path_buf(), vec!["worker".to_owned()]),
        };
        let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        flag("--name", name.clone());
        flag("--endpoint", endpoint.to_owned());
        let settings = [
            ("--weights-dtype", self.weights_dtype.map(|dtype| dtype.to_string())),
            ("--threads", self.threads.map(|threads| threads.to_string())),
            ("--lanes", self.lanes.map(|lanes| lanes.to_string())),
            ("--execution-mode", self.execution_mode.map(|mode| mode.to_string())),
            ("--fidelity", self.fidelity.map(|fidelity| fidelity.to_string())),
        ];
        for (name, value) in settings {
            if let Some(value) = value {
                flag(name, value);
            }
        }
        for model in &self.models {
            flag("--model", model.to_string());
        }
        if let Some(embeddings) = &self.embeddings {
            flag("--embeddings", text("--embeddings", embeddings)?);
        }
        if let Some(cache) = &self.cache {
            // Workers do not share a cache.
            let own = if self.workers > 1 { cache.join(&name) } else { cache.clone() };
            flag("--cache", text("--cache", &own)?);
        }
        if let Some(journal) = &self.journal {
            flag("--journal", text("--journal", journal)?);
        }
        for root in &self.model_roots {
            flag("--model-root", text("--model-root", root)?);
        }
        self.common(&mut arguments);
        Ok(Program { name, executable, arguments, environment: Vec::new() })
    }

    fn common(&self, arguments: &mut Vec<String>) {
        let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        if let Some(grace) = self.grace {
            flag("--grace", Time(grace).to_string());
        }
        if self.json_logs {
            flag("--log-format", "json".to_owned());
        }
        arguments.push("--exit-on-stdin-eof".to_owned());
    }
}

/// Whether a connection is accepted here at once; endpoints of `luna up` are on this machine.
fn is_listening(endpoint: &str) -> bool {
    match endpoint.split_once("://") {
        Some(("ipc", path)) => UnixStream::connect(path).is_ok(),
        Some((_, address)) => TcpStream::connect(address).is_ok(),
        None => false,
    }
}

/// A path as the text of a setting; never another path in its place.
fn text(flag: &str, path: &Path) -> anyhow::Result<String> {
    let text = path.to_str();
    let text =
        text.with_context(|| format!("`{flag}` {}: the path is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// CPU threads of each of `workers` on this machine, at least one.
pub(crate) fn threads_per_worker(workers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores).unwrap_or(u32::MAX).div_euclid(workers.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_gets_what_it_needs() {
        let plan = options().plan().unwrap();
        let arguments = plan.broker.arguments.join(" ");
        assert!(arguments.starts_with(
            "broker --endpoint tcp://127.0.0.1:5000 --worker-endpoint tcp://127.0.0.1:5001"
        ));
        let names: Vec<_> = plan.workers.iter().map(|program| program.name.as_str()).collect();
        assert_eq!(names, ["cpu-0", "cpu-1"]);
        let with = FarmOptions { journal: Some("/j".into()), ..options() }.plan().unwrap();
        for worker in &with.workers {
            assert!(worker.arguments.join(" ").contains("--journal /j"));
        }
        assert!(plan.workers[1].arguments.join(" ").contains("--model sd=sd15:clip_l.safetensors"));
    }

    #[test]
    fn an_endpoint_on_which_somebody_listens_is_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
        let taken = FarmOptions { endpoint: endpoint.clone(), ..options() };
        let error = taken.check_free().unwrap_err().to_string();
        assert!(error.contains(&endpoint) && error.contains("in use"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("luna");
        let endpoint = format!("ipc://{}", path.display());
        let options = FarmOptions { endpoint, ..options() };
        assert!(options.check_free().is_ok());
        let _workers = std::os::unix::net::UnixListener::bind(path.with_added_extension("workers"));
        let error = options.check_free().unwrap_err().to_string();
        assert!(error.contains("luna.workers"), "{error}");
    }

    #[test]
    fn a_path_that_cannot_be_passed_on_is_refused_and_never_replaced() {
        use std::os::unix::ffi::OsStrExt as _;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"/tmp/\xff"));
        let store = FarmOptions { store: Some(path.clone()), ..options() };
        let cache = FarmOptions { cache: Some(path.clone()), ..options() };
        let embeddings = FarmOptions { embeddings: Some(path), ..options() };
        for (options, flag) in
            [(store, "`--store`"), (cache, "`--cache`"), (embeddings, "`--embeddings`")]
        {
            let error = options.plan().unwrap_err().to_string();
            assert!(error.contains(flag) && error.contains("not UTF-8"), "{error}");
        }
    }

    fn options() -> FarmOptions {
        FarmOptions {
            models: vec!["sd=sd15:clip_l.safetensors".parse().unwrap()],
            embeddings: None,
            workers: 2,
            endpoint: "tcp://127.0.0.1:5000".to_owned(),
            worker_endpoint: None,
            weights_dtype: None,
            threads: None,
            lanes: None,
            execution_mode: None,
            fidelity: None,
            cache: None,
            journal: None,
            model_roots: Vec::new(),
            store: None,
            worker_exe: None,
            grace: None,
            patience: Duration::from_secs(3),
            json_logs: false,
        }
    }
}
