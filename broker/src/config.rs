//! The broker's settings, from flags, environment and file.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    time::Duration,
};

use broker_core::{Config, Limits};
use protocol::limits;
use settings::{Reader, Settings, SettingsErrors, Time, accept, within};
use telemetry::{LogConfig, LogFormat};
use transport::{Endpoint, EndpointError};

use crate::flags::Flags;

/// Sections that the configuration file of a farm may have.
const SECTIONS: [&str; 2] = ["broker", "worker"];

/// Where a broker listens for clients unless told otherwise.
const ENDPOINT: &str = "tcp://127.0.0.1:19283";

/// Everything a broker needs to know.
#[derive(Debug, Clone)]
pub struct BrokerConfig {
    /// Where to listen for clients.
    pub endpoint: Endpoint,
    /// Where to listen for workers.
    pub worker_endpoint: Endpoint,
    /// Directory for uploaded adapters and models; made if it does not exist.
    pub store: PathBuf,
    /// How long requests in hand may take when the broker is told to stop.
    pub grace: Duration,
    /// The core's times and limits.
    pub core: Config,
}

/// The settings of one process.
#[derive(Debug, Clone)]
pub(crate) struct ProcessConfig {
    pub(crate) broker: BrokerConfig,
    pub(crate) log_format: LogFormat,
    /// The settings as text, one per line with their origins.
    pub(crate) effective: String,
}

/// Why no endpoint for workers follows from the one for clients.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoWorkerEndpoint {
    /// There is no port after the last.
    #[error("there is no port after 65535: name the endpoint for workers, or choose another port")]
    LastPort,
    /// The path of the socket would be too long.
    #[error(transparent)]
    Path(#[from] EndpointError),
}

/// Where workers connect to the broker that clients reach at `endpoint`, unless another place is
/// named: the next port, or the same path with `.workers`. Port 0 stays: the system chooses both.
///
/// # Errors
/// When there is no next port, or the path becomes too long.
pub fn worker_endpoint_of(endpoint: &Endpoint) -> Result<Endpoint, NoWorkerEndpoint> {
    match endpoint.tcp_port() {
        None => Ok(format!("{endpoint}.workers").parse()?),
        Some(0) => Ok(endpoint.clone()),
        Some(port) => {
            let next = port.checked_add(1).and_then(|next| endpoint.with_tcp_port(next));
            next.ok_or(NoWorkerEndpoint::LastPort)
        }
    }
}

impl ProcessConfig {
    /// Reads every setting, and reports every mistake at once.
    pub(crate) fn load(
        flags: &Flags,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, SettingsErrors> {
        let environment: Vec<_> = environment.into_iter().collect();
        let default_store = default_store(&environment);
        let log_format = default_log_format(&environment);
        let mut settings = Settings::new(&SECTIONS).env("LUNA", environment);
        if let Some(path) = &flags.config {
            settings = settings.file(path);
        }
        let mut reader = settings
            .set_if("broker.endpoint", flags.endpoint.as_ref())
            .set_if("broker.worker_endpoint", flags.worker_endpoint.as_ref())
            .set_if("broker.store", flags.store.as_ref().map(|path| path.display()))
            .set_if("broker.model_store_mb", flags.model_store_mb.as_ref())
            .set_if("broker.fan_out", flags.fan_out.as_ref())
            .set_if("broker.grace", flags.grace.as_ref())
            .set_if("broker.log_format", flags.log_format.as_ref())
            .reader();

        let help = "where to listen for clients";
        let endpoint = reader.get("broker.endpoint", help, default_endpoint(), is_local);
        let worker_endpoint = read_worker_endpoint(&mut reader, &endpoint);
        let store = read_store(&mut reader, default_store);
        let grace = read_time(
            &mut reader,
            "broker.grace",
            "time to finish when told to stop",
            Duration::from_secs(30),
        );
        let log_format = reader.get("broker.log_format", "text or json", log_format, accept);
        let core = read_core(&mut reader);
        let effective = reader.effective();
        reader.finish()?;
        let broker = BrokerConfig { endpoint, worker_endpoint, store, grace, core };
        Ok(Self { broker, log_format, effective })
    }
}

fn read_worker_endpoint(reader: &mut Reader, endpoint: &Endpoint) -> Endpoint {
    let key = "broker.worker_endpoint";
    let help = "where to listen for workers; else the next port, or the same path with .workers";
    let named = match worker_endpoint_of(endpoint) {
        Ok(default) => reader.get(key, help, default, is_local),
        Err(error) => reader.get_optional(key, help, is_local).unwrap_or_else(|| {
            reader.reject(key, error.to_string());
            worker_endpoint_of(&default_endpoint()).expect("the default has a next port")
        }),
    };
    if named == *endpoint && endpoint.tcp_port() != Some(0) {
        reader.reject(key, "clients and workers need an endpoint each");
    }
    named
}

fn read_store(reader: &mut Reader, default: Option<PathBuf>) -> PathBuf {
    let key = "broker.store";
    let help =
        "directory for uploaded LoRAs and models; else $XDG_STATE_HOME/luna or ~/.local/state/luna";
    let named: String = match default {
        Some(default) => reader.get(key, help, default.display().to_string(), accept),
        None => reader.get_optional(key, help, accept).unwrap_or_else(|| {
            reader.reject(key, "neither $XDG_STATE_HOME nor $HOME is set: name the directory");
            String::new()
        }),
    };
    PathBuf::from(named)
}

fn read_core(reader: &mut Reader) -> Config {
    let defaults = Limits::default();
    let upload_kept = read_upload_kept(reader, defaults.upload_kept);
    let mut time = |key, help, default| read_time(reader, key, help, default);
    let worker_silence = time(
        "broker.worker_silence",
        "silence after which a worker counts as lost",
        defaults.worker_silence,
    );
    let startup_grace = time(
        "broker.startup_grace",
        "how long requests wait for the first worker after the start",
        defaults.startup_grace,
    );
    let budget_default = time(
        "broker.budget_default",
        "time for the answer to a request that names none",
        defaults.budget_default,
    );
    let mut megabytes = |key, help, default: u64, max: u64| {
        reader.get(key, help, default >> 20, within(1..=max >> 20))
    };
    let store_mb_max = megabytes(
        "broker.store_mb_max",
        "megabytes of all stored LoRAs; the least recently used go first",
        defaults.store_bytes_max,
        1 << 50,
    );
    let model_store_mb = megabytes(
        "broker.model_store_mb",
        "megabytes of all uploaded files of models; what registered models need stays",
        defaults.model_store_bytes_max,
        1 << 50,
    );
    let upload_mb_max = megabytes(
        "broker.upload_mb_max",
        "megabytes of one upload",
        defaults.upload_bytes_max,
        limits::UPLOAD_BYTES_MAX,
    );
    let core = Config::try_new(Limits {
        worker_silence,
        startup_grace,
        budget_default,
        store_bytes_max: store_mb_max << 20,
        model_store_bytes_max: model_store_mb << 20,
        upload_bytes_max: upload_mb_max << 20,
        upload_kept,
        ..read_queue(reader, &defaults)
    });
    core.unwrap_or_else(|error| {
        reader.reject("broker", error.to_string());
        Config::default()
    })
}

/// What may wait, and what is kept of what is done.
fn read_queue(reader: &mut Reader, defaults: &Limits) -> Limits {
    let queued_time_max = read_time(
        reader,
        "broker.queued_time_max",
        "estimated work that may wait for every worker of a model",
        defaults.queued_time_max,
    );
    let answers_age_max = read_time(
        reader,
        "broker.cache_age_max",
        "how long an answer is kept for equal requests",
        defaults.answers_age_max,
    );
    let cache_mb_max = reader.get(
        "broker.cache_mb_max",
        "megabytes of the answers that are kept for equal requests; 0 keeps none",
        defaults.answers_bytes_max >> 20,
        within(0..=1 << 20),
    );
    let mut count =
        |key, help, default: usize, max: usize| reader.get(key, help, default, within(1..=max));
    let queued_max =
        count("broker.queued_max", "requests that may wait", defaults.queued_max, 1 << 20);
    let queued_mb_max = count(
        "broker.queued_mb_max",
        "megabytes of the requests that may wait",
        defaults.queued_bytes_max >> 20,
        1 << 20,
    );
    let fan_out = reader.get(
        "broker.fan_out",
        "workers that fetch a LoRA as soon as it is uploaded; 0 for none",
        defaults.fan_out,
        within(0..=1024),
    );
    Limits {
        fan_out,
        queued_time_max,
        answers_age_max,
        answers_bytes_max: cache_mb_max << 20,
        queued_max,
        queued_bytes_max: queued_mb_max << 20,
        ..defaults.clone()
    }
}

fn read_upload_kept(reader: &mut Reader, default: Duration) -> Duration {
    let help = "how long what came of an upload is kept to be gone on with";
    read_time(reader, "broker.upload_kept", help, default)
}

fn read_time(reader: &mut Reader, key: &str, help: &str, default: Duration) -> Duration {
    reader.get(key, help, Time(default), accept).0
}

fn default_endpoint() -> Endpoint {
    ENDPOINT.parse().expect("the default is an endpoint")
}

/// The format that all Luna processes are told to log in; a mistake in it is reported when
/// logging starts.
fn default_log_format(environment: &[(OsString, OsString)]) -> LogFormat {
    let config = LogConfig::from_vars("luna-broker", environment.iter().cloned());
    config.map(|config| config.format).unwrap_or_default()
}

/// Network binds need keys, which this version does not have.
fn is_local(endpoint: &Endpoint) -> Result<(), String> {
    if endpoint.is_local() {
        return Ok(());
    }
    Err("it is reachable from the network: write `tcp://127.0.0.1:PORT` or `ipc:///PATH`"
        .to_owned())
}

/// `$XDG_STATE_HOME/luna`, else `~/.local/state/luna`. The XDG specification has relative paths
/// ignored.
fn default_store(environment: &[(OsString, OsString)]) -> Option<PathBuf> {
    let get = |name: &str| {
        let found = environment.iter().find(|(key, _)| key == OsStr::new(name));
        found.map(|(_, value)| PathBuf::from(value)).filter(|path| path.is_absolute())
    };
    let state = get("XDG_STATE_HOME").or_else(|| Some(get("HOME")?.join(".local/state")))?;
    Some(state.join("luna"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn defaults_are_enough() {
        let config = load(&Flags::default(), &[("HOME", "/home/artist")]).unwrap().broker;
        assert_eq!(config.endpoint.to_string(), ENDPOINT);
        assert_eq!(config.worker_endpoint.to_string(), "tcp://127.0.0.1:19284");
        assert_eq!(config.store, Path::new("/home/artist/.local/state/luna"));
        assert_eq!(config.core, Config::default());
    }

    #[test]
    fn the_endpoint_for_workers_follows_from_the_one_for_clients() {
        let of = |text: &str| worker_endpoint_of(&text.parse().unwrap()).map(|e| e.to_string());
        assert_eq!(of("tcp://127.0.0.1:7").unwrap(), "tcp://127.0.0.1:8");
        assert_eq!(of("tcp://127.0.0.1:0").unwrap(), "tcp://127.0.0.1:0");
        assert_eq!(of("ipc:///run/luna").unwrap(), "ipc:///run/luna.workers");
        assert_eq!(of("tcp://127.0.0.1:65535"), Err(NoWorkerEndpoint::LastPort));
        let longest = format!("ipc:///{}", "p".repeat(Endpoint::IPC_PATH_BYTES_MAX - 1));
        assert!(matches!(of(&longest), Err(NoWorkerEndpoint::Path(_))));
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let flags = Flags {
            endpoint: Some("tcp://0.0.0.0:65535".to_owned()),
            grace: Some("soon".to_owned()),
            ..Flags::default()
        };
        let environment =
            [("LUNA_BROKER_QUEUED_MAX", "0"), ("LUNA_BROKER_WORKER_SILENCE", "100ms")];
        let message = load(&flags, &environment).unwrap_err().to_string();
        for part in [
            "`broker.endpoint` is \"tcp://0.0.0.0:65535\" (command line): it is reachable",
            "`broker.grace` is \"soon\" (command line): not a time",
            "`broker.queued_max` is \"0\"",
            "`broker.store`",
            "`dispatch_lost_ms` is 600",
        ] {
            assert!(message.contains(part), "{part} is missing in:\n{message}");
        }
    }

    #[test]
    fn the_log_format_of_all_processes_gives_way_to_the_brokers_own() {
        let all = [("HOME", "/h"), ("LUNA_LOG_FORMAT", "json")];
        assert_eq!(load(&Flags::default(), &all).unwrap().log_format, LogFormat::Json);
        let flags = Flags { log_format: Some("text".to_owned()), ..Flags::default() };
        assert_eq!(load(&flags, &all).unwrap().log_format, LogFormat::Text);
    }

    #[test]
    fn both_sockets_at_one_place_are_refused() {
        let flags = Flags {
            endpoint: Some("ipc:///tmp/luna".to_owned()),
            worker_endpoint: Some("ipc:///tmp/luna".to_owned()),
            ..Flags::default()
        };
        let message = load(&flags, &[("HOME", "/home/artist")]).unwrap_err().to_string();
        assert!(message.contains("an endpoint each"), "{message}");
    }

    #[test]
    fn relative_state_directories_are_ignored() {
        let environment = [("XDG_STATE_HOME", "state"), ("HOME", "/home/artist")];
        let config = load(&Flags::default(), &environment).unwrap().broker;
        assert_eq!(config.store, Path::new("/home/artist/.local/state/luna"));
        let environment = [("XDG_STATE_HOME", "/state"), ("HOME", "/home/artist")];
        let config = load(&Flags::default(), &environment).unwrap().broker;
        assert_eq!(config.store, Path::new("/state/luna"));
    }

    fn load(flags: &Flags, vars: &[(&str, &str)]) -> Result<ProcessConfig, SettingsErrors> {
        ProcessConfig::load(flags, vars.iter().map(|&(key, value)| (key.into(), value.into())))
    }
}
