//! `luna up`: a farm in the foreground.

mod child;
mod farm;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use luna_client::Client;
use protocol::Dtype;
use settings::Time;
use tokio::sync::mpsc;
use worker::{device, model::ModelSpec};

use crate::args::UpArgs;

pub(crate) use child::{LogLine, Program};
pub(crate) use farm::{Farm, FarmPlan};

/// Log lines that may wait for the terminal before the processes wait for it too.
const LOG_LINES_WAITING: usize = 1024;

/// How long a farm may take to load its models before `luna up` says that it still waits.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// What a farm is made of.
#[derive(Debug, Clone)]
pub(crate) struct FarmOptions {
    pub(crate) models: Vec<ModelSpec>,
    pub(crate) embeddings: Option<PathBuf>,
    pub(crate) workers: u32,
    pub(crate) endpoint: String,
    pub(crate) weights_dtype: Dtype,
    pub(crate) threads: u32,
    pub(crate) store: Option<PathBuf>,
    pub(crate) worker_exe: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) json_logs: bool,
}

/// Runs a farm until Ctrl-C or SIGTERM, or until one of its processes fails for good.
pub(crate) async fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    let (logs, lines) = mpsc::channel(LOG_LINES_WAITING);
    let (count, note) = worker_count(args.workers);
    let options = FarmOptions {
        models: args.models,
        embeddings: args.embeddings,
        workers: count,
        endpoint: args.endpoint,
        weights_dtype: args.weights_dtype,
        threads: args.threads.unwrap_or_else(|| threads_per_worker(count)),
        store: args.store,
        worker_exe: args.worker_exe,
        grace: args.grace.0,
        json_logs: args.json,
    };
    let plan = options.plan()?;
    options.check_free()?;
    let names =
        std::iter::once(&plan.broker).chain(&plan.workers).map(|program| program.name.len());
    let printer = tokio::spawn(print(lines, names.max().unwrap_or_default(), args.json));
    let say = |line: String| logs.send(LogLine { name: "up".to_owned(), line });
    for line in note.into_iter().chain(options.models.is_empty().then(no_model)) {
        say(line).await?;
    }

    let mut farm = Farm::start(&plan, &logs);
    let ready = announce_ready(options.endpoint.clone(), logs.clone());
    let announcer = tokio::spawn(ready);
    let failure = tokio::select! {
        signal = stop_signal() => { say(format!("{} received, draining", signal?)).await?; None }
        failure = farm.failed() => Some(failure),
    };
    announcer.abort();
    farm.stop(async {
        let signal = next_stop_signal().await;
        // Whoever hurries has the last word, with or without a terminal.
        let _ = say(format!("{signal} received, killing what is left")).await;
    })
    .await;
    if failure.is_none() {
        say("the farm has stopped".to_owned()).await?;
    }
    drop(logs);
    // The announcer may hold the last sender for a moment; the printer ends right after it.
    let _ = announcer.await;
    printer.await.context("the log printer failed")?;
    match failure {
        None => Ok(ExitCode::SUCCESS),
        Some(failure) => bail!("{failure}"),
    }
}

impl FarmOptions {
    /// The processes to start.
    pub(crate) fn plan(&self) -> anyhow::Result<FarmPlan> {
        let luna =
            std::env::current_exe().context("cannot find this executable to start it again")?;
        let worker_endpoint = broker::worker_endpoint_of(&self.endpoint.parse()?)?.to_string();
        Ok(FarmPlan {
            broker: self.broker(luna.clone(), &worker_endpoint)?,
            workers: (0..self.workers)
                .map(|n| self.worker(&luna, n, &worker_endpoint))
                .collect::<anyhow::Result<_>>()?,
            grace: self.grace,
        })
    }

    /// Refuses an endpoint on which somebody listens: our broker could not, and our workers would
    /// join a stranger's farm and take the places of its workers of the same names.
    fn check_free(&self) -> anyhow::Result<()> {
        let workers = broker::worker_endpoint_of(&self.endpoint.parse()?)?.to_string();
        for endpoint in [&self.endpoint, &workers] {
            if is_listening(endpoint) {
                bail!(
                    "`{endpoint}` is in use, perhaps by a farm (see `luna status`): stop it, or choose another `--endpoint`"
                );
            }
        }
        Ok(())
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
        flag("--weights-dtype", self.weights_dtype.to_string());
        flag("--threads", self.threads.to_string());
        for model in &self.models {
            flag("--model", model.to_string());
        }
        if let Some(embeddings) = &self.embeddings {
            flag("--embeddings", text("--embeddings", embeddings)?);
        }
        self.common(&mut arguments);
        Ok(Program { name, executable, arguments, environment: Vec::new() })
    }

    fn common(&self, arguments: &mut Vec<String>) {
        let mut flag = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        flag("--grace", Time(self.grace).to_string());
        flag("--log-format", if self.json_logs { "json" } else { "text" }.to_owned());
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

/// How many workers to start, and what there is to say about it. Never a silent fall back: GPUs
/// that this build cannot use are named.
fn worker_count(asked: Option<u32>) -> (u32, Option<String>) {
    let count = asked.unwrap_or(1);
    let gpus = device::gpus().unwrap_or_default().len();
    let note = (gpus > 0).then(|| {
        format!(
            "{gpus} GPUs found, but this build computes on the CPU: starting {count} CPU workers"
        )
    });
    (count, note)
}

fn no_model() -> String {
    "no model to serve: give --model NAME=FAMILY:FILE (`luna fixtures DIR` writes some to try)"
        .to_owned()
}

/// CPU threads of each of `workers` on this machine, at least one.
pub(crate) fn threads_per_worker(workers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores).unwrap_or(u32::MAX).div_euclid(workers.max(1)).max(1)
}

/// Waits for SIGTERM or Ctrl-C and names it.
pub(crate) async fn stop_signal() -> std::io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("Ctrl-C"),
    }
}

/// As [`stop_signal`], for a farm that stops already: without signals it goes on as it does.
pub(crate) async fn next_stop_signal() -> &'static str {
    match stop_signal().await {
        Ok(signal) => signal,
        Err(_) => std::future::pending().await,
    }
}

/// Says once when the farm answers, or that it still does not.
async fn announce_ready(endpoint: String, logs: mpsc::Sender<LogLine>) {
    let say = |line: String| logs.send(LogLine { name: "up".to_owned(), line });
    // The terminal may be gone; then nobody reads the announcement either.
    if let Err(reasons) = wait_ready(&endpoint, READY_PATIENCE).await {
        let _ = say(format!("not ready yet: {reasons}")).await;
        if wait_ready(&endpoint, Duration::MAX).await.is_err() {
            return;
        }
    }
    let _ = say(format!("the farm is ready at {endpoint}: try `luna status`")).await;
}

/// Waits until the farm at `endpoint` is ready; after `patience`, says why it is not.
pub(crate) async fn wait_ready(endpoint: &str, patience: Duration) -> Result<(), String> {
    const PAUSE: Duration = Duration::from_millis(50);
    let started = std::time::Instant::now();
    let client =
        Client::builder().endpoint(endpoint).connect().await.map_err(|error| error.to_string())?;
    loop {
        let reasons = match client.status().await {
            Ok(status) if status.ready => return Ok(()),
            Ok(status) => status.reasons.join("; "),
            Err(error) => error.to_string(),
        };
        if started.elapsed() >= patience {
            return Err(reasons);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Prints every line behind the name of its process.
async fn print(mut lines: mpsc::Receiver<LogLine>, width: usize, json: bool) {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut numbers = BTreeMap::new();
    while let Some(LogLine { name, line }) = lines.recv().await {
        let next = numbers.len();
        let number = *numbers.entry(name.clone()).or_insert(next);
        let line = if json {
            json_line(&name, &line)
        } else if colours {
            format!("\x1b[3{}m{name:width$} |\x1b[0m {line}", 1 + number % 6)
        } else {
            format!("{name:width$} | {line}")
        };
        // Nothing can be said where nothing can be written.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// One JSON object; a line that is one already gets the process's name.
fn json_line(name: &str, line: &str) -> String {
    let mut object = match serde_json::from_str(line) {
        Ok(serde_json::Value::Object(object)) => object,
        _ => serde_json::Map::from_iter([("message".to_owned(), line.into())]),
    };
    object.insert("process".to_owned(), name.into());
    serde_json::Value::Object(object).to_string()
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
        let embeddings = FarmOptions { embeddings: Some(path), ..options() };
        for (options, flag) in [(store, "`--store`"), (embeddings, "`--embeddings`")] {
            let error = options.plan().unwrap_err().to_string();
            assert!(error.contains(flag) && error.contains("not UTF-8"), "{error}");
        }
    }

    #[test]
    fn a_json_line_keeps_its_fields_and_a_plain_one_becomes_a_message() {
        let line = json_line("broker", r#"{"level":"INFO"}"#);
        assert!(line.contains(r#""level":"INFO""#) && line.contains(r#""process":"broker""#));
        assert!(json_line("broker", "plain").contains(r#""message":"plain""#));
    }

    fn options() -> FarmOptions {
        FarmOptions {
            models: vec!["sd=sd15:clip_l.safetensors".parse().unwrap()],
            embeddings: None,
            workers: 2,
            endpoint: "tcp://127.0.0.1:5000".to_owned(),
            weights_dtype: Dtype::Float16,
            threads: 1,
            store: None,
            worker_exe: None,
            grace: Duration::from_secs(3),
            json_logs: false,
        }
    }
}
