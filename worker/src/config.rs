//! The worker's settings, from flags, environment and file.

mod execution;
mod memory;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::Parser;
use protocol::{Dtype, WorkerName};
use settings::{Reader, Settings, SettingsErrors, Time, accept, within};
use telemetry::{LogConfig, LogFormat};
use transport::Endpoint;

use self::{
    execution::{ExecutionConfig, ExecutionFlags},
    memory::{MemoryConfig, MemoryFlags},
};
use crate::{device::DeviceChoice, model::ModelSpec, models::ModelRoots};

/// Sections that the configuration file of a farm may have.
const SECTIONS: [&str; 2] = ["broker", "worker"];

/// Where brokers listen for workers unless told otherwise.
const DEFAULT_ENDPOINT: &str = "tcp://127.0.0.1:19284";

/// Time to finish what is in hand unless told otherwise.
const GRACE_DEFAULT: Time = Time(Duration::from_secs(30));

/// A Luna worker: holds CLIP text models on one device and encodes for the broker.
///
/// Settings come from flags, else from `LUNA_WORKER_*`, else from the table `[worker]` of the
/// configuration file, else from defaults.
#[derive(Debug, Default, Parser)]
#[command(name = "luna-worker", version)]
pub(crate) struct Flags {
    /// Configuration file (TOML)
    #[arg(long, env = "LUNA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the settings, print them and exit
    #[arg(long)]
    pub(crate) check_config: bool,
    /// What people call this worker; a second one of the same name replaces the first
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Where the broker listens for workers
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// A model to serve; may be repeated
    #[arg(long = "model", value_name = "NAME=FAMILY:FILE[,FILE]")]
    models: Vec<ModelSpec>,
    /// A directory that clients may name files of models in; may be repeated. Without it they can
    /// only upload models; their files are kept in the cache, else as long as the worker runs
    #[arg(long = "model-root", value_name = "DIR")]
    model_roots: Vec<PathBuf>,
    /// Directory of textual-inversion files
    #[arg(long, value_name = "DIR")]
    embeddings: Option<PathBuf>,
    /// How weights are stored: float16, float32 or bfloat16
    #[arg(long, value_name = "DTYPE")]
    weights_dtype: Option<String>,
    /// Where to compute: cpu
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// CPU threads
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    #[command(flatten)]
    execution: ExecutionFlags,
    #[command(flatten)]
    memory: MemoryFlags,
    /// Directory in which the worker notes what it is busy with, so that a request that kills
    /// workers is told from those that were there by chance; best in memory (tmpfs). Without it
    /// the cache, else `$RUNTIME_DIRECTORY`, else there is no journal
    #[arg(long, value_name = "DIR")]
    journal: Option<PathBuf>,
    /// How long work in hand may take when the worker is told to stop, for example 30s
    #[arg(long, value_name = "TIME")]
    grace: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Stop when standard input closes, so that a supervisor that dies takes this process along
    #[arg(long)]
    pub(crate) exit_on_stdin_eof: bool,
}

/// Everything a worker needs to know.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) name: WorkerName,
    pub(crate) endpoint: Endpoint,
    pub(crate) models: Vec<ModelSpec>,
    pub(crate) model_roots: ModelRoots,
    pub(crate) embeddings: Option<PathBuf>,
    pub(crate) weights_dtype: Dtype,
    pub(crate) device: DeviceChoice,
    pub(crate) threads: u32,
    pub(crate) execution: ExecutionConfig,
    pub(crate) memory: MemoryConfig,
    /// Where the journal is, if there is to be one.
    pub(crate) journal: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) log_format: LogFormat,
    /// The settings as text, one per line with their origins.
    pub(crate) effective: String,
}

impl Config {
    /// Reads every setting, and reports every mistake at once.
    pub(crate) fn load(
        flags: &Flags,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, SettingsErrors> {
        let environment: Vec<_> = environment.into_iter().collect();
        let log_format_default = default_log_format(&environment);
        let runtime = runtime_directory(&environment);
        let mut reader = flags.settings(environment).reader();
        let mut models = reader.get_list("worker.models", "models to serve", Vec::new(), accept);
        if !flags.models.is_empty() {
            models.clone_from(&flags.models);
        }
        let model_roots = read_model_roots(&mut reader, &flags.model_roots);
        let name =
            reader.get("worker.name", "what people call this worker", default_name(), accept);
        let endpoint = DEFAULT_ENDPOINT.parse().expect("the default is an endpoint");
        let endpoint =
            reader.get("worker.endpoint", "where the broker listens for workers", endpoint, accept);
        let embeddings = reader.get_optional(
            "worker.embeddings",
            "directory of textual-inversion files",
            is_directory,
        );
        let weights_dtype =
            reader.get("worker.weights_dtype", "how weights are stored", Dtype::Float16, accept);
        let device = reader.get("worker.device", "where to compute", DeviceChoice::Cpu, accept);
        let threads = reader.get("worker.threads", "CPU threads", cores(), within(1..=1024));
        let execution = ExecutionConfig::read(&mut reader);
        let memory = MemoryConfig::read(&mut reader);
        let journal: Option<Directory> = reader.get_optional(
            "worker.journal",
            "directory in which the worker notes what it is busy with",
            is_usable,
        );
        let journal = journal.map(|Directory(path)| path).or_else(|| memory.cache.clone());
        let grace =
            reader.get("worker.grace", "time to finish when told to stop", GRACE_DEFAULT, accept);
        let log_format =
            reader.get("worker.log_format", "text or json", log_format_default, accept);
        check_names(&models, |reason| reader.reject("worker.models", reason));
        let effective = reader.effective();
        reader.finish()?;
        Ok(Self {
            name,
            endpoint,
            models,
            model_roots,
            embeddings: embeddings.map(|Directory(path)| path),
            weights_dtype,
            device,
            threads,
            execution,
            memory,
            journal: journal.or(runtime),
            grace: grace.0,
            log_format,
            effective,
        })
    }
}

impl Flags {
    /// All sources of settings, the flags on top.
    fn settings(&self, environment: Vec<(OsString, OsString)>) -> Settings {
        let mut settings = Settings::new(&SECTIONS).env("LUNA", environment);
        if let Some(path) = &self.config {
            settings = settings.file(path);
        }
        let settings = settings
            .set_if("worker.name", self.name.as_ref())
            .set_if("worker.endpoint", self.endpoint.as_ref())
            .set_if("worker.embeddings", self.embeddings.as_ref().map(|path| path.display()))
            .set_if("worker.weights_dtype", self.weights_dtype.as_ref())
            .set_if("worker.device", self.device.as_ref())
            .set_if("worker.threads", self.threads.as_ref())
            .set_if("worker.journal", self.journal.as_ref().map(|path| path.display()))
            .set_if("worker.grace", self.grace.as_ref())
            .set_if("worker.log_format", self.log_format.as_ref());
        self.memory.set(self.execution.set(settings))
    }
}

/// A directory's path.
#[derive(Debug, Clone)]
struct Directory(PathBuf);

impl std::str::FromStr for Directory {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(PathBuf::from(text)))
    }
}

fn is_directory(directory: &Directory) -> Result<(), String> {
    if directory.0.is_dir() { Ok(()) } else { Err("not a directory".to_owned()) }
}

/// A directory is made when the worker starts; a file in its place cannot be.
fn is_usable(directory: &Directory) -> Result<(), String> {
    let path = &directory.0;
    if path.exists() && !path.is_dir() { Err("not a directory".to_owned()) } else { Ok(()) }
}

impl std::fmt::Display for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.display().fmt(f)
    }
}

fn read_model_roots(reader: &mut Reader, flags: &[PathBuf]) -> ModelRoots {
    let (key, help) = ("worker.model_roots", "directories that clients may name models in");
    let read: Vec<Directory> = reader.get_list(key, help, Vec::new(), accept);
    let read: Vec<_> = read.into_iter().map(|Directory(path)| path).collect();
    ModelRoots::new(if flags.is_empty() { read } else { flags.to_vec() }).unwrap_or_else(|error| {
        reader.reject(key, error.to_string());
        ModelRoots::default()
    })
}

fn check_names(models: &[ModelSpec], mut reject: impl FnMut(String)) {
    for (index, model) in models.iter().enumerate() {
        if models[..index].iter().any(|other| other.name == model.name) {
            reject(format!("two models are called `{}`: give each its own name", model.name));
        }
        for file in model.files.iter().filter(|file| !file.is_file()) {
            reject(format!("model `{}`: there is no file {}", model.name, file.display()));
        }
    }
}

/// The format that all Luna processes are told to log in; a mistake in it is reported when
/// logging starts.
fn default_log_format(environment: &[(OsString, OsString)]) -> LogFormat {
    let config = LogConfig::from_vars("luna-worker", environment.iter().cloned());
    config.map(|config| config.format).unwrap_or_default()
}

/// The directory that systemd keeps over restarts of a unit, the first one if there are several.
fn runtime_directory(environment: &[(OsString, OsString)]) -> Option<PathBuf> {
    let (_, value) = environment.iter().find(|(name, _)| name == "RUNTIME_DIRECTORY")?;
    let first = value.to_str()?.split(':').next()?;
    (!first.is_empty()).then(|| PathBuf::from(first))
}

fn default_name() -> WorkerName {
    "cpu-0".parse().expect("`cpu-0` is a name")
}

fn cores() -> u32 {
    std::thread::available_parallelism()
        .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use protocol::{ExecutionMode, Fidelity};

    use super::*;

    #[test]
    fn every_mistake_is_reported_at_once() {
        let flags = Flags {
            endpoint: Some("tcp://*:1".to_owned()),
            weights_dtype: Some("float8".to_owned()),
            threads: Some("0".to_owned()),
            models: vec!["a=sd15:/no/such/file".parse().unwrap()],
            model_roots: vec!["/no/such/root".into()],
            ..Flags::default()
        };
        let message = Config::load(&flags, []).unwrap_err().to_string();
        for word in
            ["worker.endpoint", "float8", "worker.threads", "/no/such/file", "/no/such/root"]
        {
            assert!(message.contains(word), "{word} is missing in:\n{message}");
        }
    }

    #[test]
    fn defaults_are_enough() {
        let config = Config::load(&Flags::default(), []).unwrap();
        assert_eq!(config.endpoint.to_string(), DEFAULT_ENDPOINT);
        assert_eq!(config.weights_dtype, Dtype::Float16);
        assert_eq!(config.grace, Duration::from_secs(30));
        let ExecutionConfig { lanes, modes } = config.execution;
        let merged_mb = modes.merged_budget_bytes >> 20;
        assert_eq!((lanes, modes.mode, merged_mb), (1, ExecutionMode::Auto, 512));
        assert_eq!(modes.fidelity, Fidelity::Comfyui);
        let tiers = config.memory.tiers;
        let budgets = [tiers.device_budget_bytes, tiers.host_budget_bytes, tiers.disk_budget_bytes];
        assert_eq!(budgets, [1 << 30, 0, 0], "no cache, no tier on disk");
        assert_eq!((config.memory.model_budget_bytes, tiers.ttl), (None, None));
    }

    #[test]
    fn memory_and_lanes_are_set_like_everything_else() {
        let flags = [
            "luna-worker",
            "--lanes",
            "4",
            "--execution-mode",
            "locking",
            "--fidelity",
            "exact",
            "--merged-budget-mb",
            "9",
            "--cache",
            "/no/such/dir",
            "--disk-budget-mb",
            "5",
            "--host-budget-mb",
            "6",
            "--adapter-ttl",
            "10m",
            "--model-budget-mb",
            "7",
        ];
        let environment = [("LUNA_WORKER_ADAPTER_BUDGET_MB".into(), "8".into())];
        let config = Config::load(&Flags::parse_from(flags), environment).unwrap();
        let ExecutionConfig { lanes, modes } = config.execution;
        let merged_mb = modes.merged_budget_bytes >> 20;
        assert_eq!((lanes, modes.mode, merged_mb), (4, ExecutionMode::Locking, 9));
        assert_eq!(modes.fidelity, Fidelity::Exact);
        let tiers = config.memory.tiers;
        let budgets = [tiers.device_budget_bytes, tiers.host_budget_bytes, tiers.disk_budget_bytes];
        assert_eq!(budgets, [8 << 20, 6 << 20, 5 << 20]);
        assert_eq!(tiers.ttl, Some(Duration::from_mins(10)));
        assert_eq!(config.memory.model_budget_bytes, Some(7 << 20));
        for key in ["lanes", "cache", "disk_budget_mb", "adapter_ttl", "model_budget_mb"] {
            assert!(config.effective.contains(&format!("{key} = ")), "{key} is not shown");
        }
    }

    #[test]
    fn what_no_worker_can_do_is_refused() {
        let flags = [
            "luna-worker",
            "--lanes",
            "0",
            "--execution-mode",
            "batched",
            "--fidelity",
            "fast",
            "--adapter-ttl",
            "0s",
            "--model-budget-mb",
            "0",
            "--cache",
            "Cargo.toml",
        ];
        let message = Config::load(&Flags::parse_from(flags), []).unwrap_err().to_string();
        for key in
            ["lanes", "execution_mode", "fidelity", "adapter_ttl", "model_budget_mb", "cache"]
        {
            assert!(message.contains(&format!("worker.{key}")), "{key} is missing in:\n{message}");
        }
    }

    #[test]
    fn the_journal_is_where_it_was_told_to_be_or_where_it_outlives_the_process() {
        let runtime = [("RUNTIME_DIRECTORY".into(), "/run/a:/run/b".into())];
        let journal = |flags: &[&str], environment: &[(OsString, OsString)]| {
            let flags = ["luna-worker"].iter().chain(flags);
            let config = Config::load(&Flags::parse_from(flags), environment.iter().cloned());
            config.unwrap().journal.map(|path| path.display().to_string())
        };
        assert_eq!(journal(&[], &[]), None);
        assert_eq!(journal(&[], &runtime).as_deref(), Some("/run/a"));
        assert_eq!(journal(&["--cache=/no/c"], &runtime).as_deref(), Some("/no/c"));
        let both = ["--cache=/no/c", "--journal=/no/j"];
        assert_eq!(journal(&both, &runtime).as_deref(), Some("/no/j"));
    }

    #[test]
    fn the_environment_gives_way_to_flags() {
        let environment = [("LUNA_WORKER_NAME", "a"), ("LUNA_WORKER_GRACE", "2m")];
        let environment = environment.map(|(key, value)| (key.into(), value.into()));
        let flags = Flags { name: Some("b".to_owned()), ..Flags::default() };
        let config = Config::load(&flags, environment).unwrap();
        assert_eq!(config.name.as_str(), "b");
        assert_eq!(config.grace, Duration::from_mins(2));
    }
}
