//! `luna up`: a farm in the foreground.

mod child;
mod configured;
mod farm;
mod options;

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use luna_client::{Client, DEFAULT_ENDPOINT};
use tokio::sync::mpsc;
use worker::device;

use crate::args::UpArgs;

pub(crate) use child::{LogLine, Program};
pub(crate) use configured::Configured;
pub(crate) use farm::{Farm, FarmPlan};
pub(crate) use options::{FarmOptions, threads_per_worker};

/// Log lines that may wait for the terminal before the processes wait for it too.
const LOG_LINES_WAITING: usize = 1024;

/// How long a farm may take to load its models before `luna up` says that it still waits.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// How long processes take to drain that were told nothing else.
const GRACE_DEFAULT: Duration = Duration::from_secs(30);

/// Runs a farm until Ctrl-C or SIGTERM, or until one of its processes fails for good.
pub(crate) async fn run(args: UpArgs) -> anyhow::Result<ExitCode> {
    let (logs, lines) = mpsc::channel(LOG_LINES_WAITING);
    let (count, note) = worker_count(args.workers);
    let json = args.json;
    let configured = Configured::read(std::env::vars_os());
    let has_place = args.cache.is_some() || configured.cache.is_some() || configured.has_journal;
    let (options, has_models) = options(args, count, configured);
    let journals = if has_place { None } else { Some(journals()?) };
    let journal = journals.as_ref().map(|directory| directory.path().to_owned());
    let options = FarmOptions { journal, ..options };
    let plan = options.plan()?;
    options.check_free()?;
    let names =
        std::iter::once(&plan.broker).chain(&plan.workers).map(|program| program.name.len());
    let printer = tokio::spawn(print(lines, names.max().unwrap_or_default(), json));
    let say = |line: String| logs.send(LogLine { name: "up".to_owned(), line });
    for line in note.into_iter().chain((!has_models).then(no_model)) {
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

/// What the command line and the settings of the processes ask for, and whether that is any model.
fn options(args: UpArgs, workers: u32, configured: Configured) -> (FarmOptions, bool) {
    let has_models = !args.models.is_empty() || configured.has_models;
    let threads = match (args.threads, configured.has_threads) {
        // One worker takes every core by itself.
        (None, false) if workers > 1 => Some(threads_per_worker(workers)),
        (threads, _) => threads,
    };
    let options = FarmOptions {
        models: args.models,
        embeddings: args.embeddings,
        workers,
        endpoint: args
            .endpoint
            .or(configured.endpoint)
            .unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
        worker_endpoint: configured.worker_endpoint,
        weights_dtype: args.weights_dtype,
        threads,
        lanes: args.lanes,
        execution_mode: args.execution_mode,
        fidelity: args.fidelity,
        // One worker finds it in its own settings.
        cache: args.cache.or(configured.cache.filter(|_| workers > 1)),
        journal: None,
        model_roots: args.model_roots,
        store: args.store,
        worker_exe: args.worker_exe,
        grace: args.grace.map(|grace| grace.0),
        patience: args.grace.map(|grace| grace.0).or(configured.grace).unwrap_or(GRACE_DEFAULT),
        json_logs: args.json,
    };
    (options, has_models)
}

/// A place for the journals of workers that have no other: it outlives them and ends with the farm.
fn journals() -> anyhow::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("luna-journals-");
    // That one is in memory where there is one.
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
    let made = runtime.map(|directory| builder.tempdir_in(directory));
    let made = made.filter(Result::is_ok).unwrap_or_else(|| builder.tempdir());
    made.context("cannot make a temporary directory for the workers' journals")
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
    use clap::Parser as _;

    use super::*;
    use crate::args::{Command, FarmCommand};

    #[test]
    fn what_was_not_given_is_left_to_the_settings_of_the_processes() {
        let args = |arguments: &[&str]| {
            let arguments = ["luna", "up"].iter().chain(arguments);
            let command = crate::args::Cli::parse_from(arguments).command;
            let Command::Farm(FarmCommand::Up(args)) = command else { panic!("{command:?}") };
            // The environment of whoever runs the test may name one.
            UpArgs { endpoint: None, ..args }
        };
        let flags = |arguments: &[&str], workers, configured: &Configured| {
            let (options, _) = options(args(arguments), workers, configured.clone());
            options.plan().unwrap().workers.pop().unwrap().arguments.join(" ")
        };
        let unset =
            Configured { endpoint: Some("tcp://127.0.0.1:5".into()), ..Configured::default() };
        assert_eq!(
            flags(&[], 1, &unset),
            "worker --name cpu-0 --endpoint tcp://127.0.0.1:6 --exit-on-stdin-eof"
        );
        assert!(flags(&[], 2, &unset).contains("--threads"), "the cores are shared out");
        let set = Configured { has_threads: true, cache: Some("/c".into()), ..unset };
        assert!(!flags(&[], 2, &set).contains("--threads"));
        assert!(flags(&[], 2, &set).contains("--cache /c/cpu-1"), "each has its own");
        assert!(!flags(&[], 1, &set).contains("--cache"));

        let given = flags(
            &[
                "--lanes=2",
                "--execution-mode=locking",
                "--fidelity=exact",
                "--cache=/d",
                "--model-root=/a",
                "--model-root=/b",
                "--weights-dtype=float32",
                "--threads=3",
                "--grace=5s",
                "--json",
            ],
            1,
            &set,
        );
        for flag in [
            "--lanes 2",
            "--execution-mode locking",
            "--fidelity exact",
            "--cache /d",
            "--model-root /a --model-root /b",
            "--weights-dtype float32",
            "--threads 3",
            "--grace 5s",
            "--log-format json",
        ] {
            assert!(given.contains(flag), "{flag} is missing in {given}");
        }
    }

    #[test]
    fn a_json_line_keeps_its_fields_and_a_plain_one_becomes_a_message() {
        let line = json_line("broker", r#"{"level":"INFO"}"#);
        assert!(line.contains(r#""level":"INFO""#) && line.contains(r#""process":"broker""#));
        assert!(json_line("broker", "plain").contains(r#""message":"plain""#));
    }
}
