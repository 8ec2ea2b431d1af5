//! What the environment and the configuration file say about the processes that `luna up` starts,
//! as far as it must know it itself. The processes read the same, check it, and report mistakes.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use settings::{Settings, Time, accept};

/// Sections that the configuration file of a farm may have.
const SECTIONS: [&str; 2] = ["broker", "worker"];

/// Settings of broker and workers that were not given on the command line.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Configured {
    pub(crate) endpoint: Option<String>,
    pub(crate) worker_endpoint: Option<String>,
    pub(crate) has_models: bool,
    pub(crate) has_threads: bool,
    pub(crate) cache: Option<PathBuf>,
    pub(crate) has_journal: bool,
    /// The longest time that a process may take to drain.
    pub(crate) grace: Option<Duration>,
}

impl Configured {
    /// Reads what there is; what cannot be read is left to the processes to complain about.
    pub(crate) fn read(environment: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let environment: Vec<_> = environment.into_iter().collect();
        let file = environment.iter().find(|(name, _)| name == "LUNA_CONFIG");
        let file = file.map(|(_, path)| PathBuf::from(path));
        let mut settings = Settings::new(&SECTIONS).env("LUNA", environment);
        if let Some(path) = &file {
            settings = settings.file(path);
        }
        let mut reader = settings.reader();
        let mut text = |key| reader.get_optional::<String>(key, "", accept);
        let (endpoint, worker_endpoint) = (text("broker.endpoint"), text("broker.worker_endpoint"));
        let has_threads = text("worker.threads").is_some();
        let cache = text("worker.cache").map(PathBuf::from);
        let has_journal = text("worker.journal").is_some();
        let models = reader.get_list::<String>("worker.models", "", Vec::new(), accept);
        let mut time = |key| reader.get_optional::<Time>(key, "", accept).map(|time| time.0);
        let grace = time("broker.grace").max(time("worker.grace"));
        let has_models = !models.is_empty();
        Self { endpoint, worker_endpoint, has_models, has_threads, cache, has_journal, grace }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_the_processes_read_is_read_here_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("luna.toml");
        let text = "[broker]\ngrace = \"5s\"\n[worker]\nthreads = 3\ngrace = \"2m\"\nlanes = 2\n\
                    cache = \"/c\"\nmodels = [\"a=sd15:/a\"]\n";
        std::fs::write(&path, text).unwrap();
        let environment = [
            ("LUNA_CONFIG", path.to_str().unwrap()),
            ("LUNA_BROKER_ENDPOINT", "tcp://127.0.0.1:7"),
        ];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let configured = Configured::read(environment);
        let expected = Configured {
            endpoint: Some("tcp://127.0.0.1:7".to_owned()),
            worker_endpoint: None,
            has_models: true,
            has_threads: true,
            cache: Some("/c".into()),
            has_journal: false,
            grace: Some(Duration::from_mins(2)),
        };
        assert_eq!(configured, expected);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_for_the_processes_to_report() {
        let environment = [("LUNA_CONFIG".into(), "/no/such/luna.toml".into())];
        assert_eq!(Configured::read(environment), Configured::default());
    }
}
