//! From arguments to a serving broker, and from there to an exit code.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;
use telemetry::LogConfig;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use transport::BindError;

use crate::{
    config::ProcessConfig,
    flags::Flags,
    server::{Server, StartError},
};

/// Wrong arguments (`EX_USAGE` of sysexits.h): starting again cannot help.
const EXIT_USAGE: u8 = 64;

/// Wrong settings (`EX_CONFIG`): starting again cannot help.
const EXIT_CONFIG: u8 = 78;

/// Runs a broker with these arguments, the program's name left out.
///
/// Exit codes: 0 after a drain, 1 for a failure that a restart may cure, 64 for wrong arguments,
/// 78 for wrong settings.
pub fn main_with_args(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> ExitCode {
    let arguments = arguments.into_iter().map(Into::into);
    let arguments = std::iter::once(OsString::from("luna-broker")).chain(arguments);
    let flags = match Flags::try_parse_from(arguments) {
        Ok(flags) => flags,
        Err(answer) => {
            // Nothing can be said where nothing can be written.
            let _ = answer.print();
            return if answer.use_stderr() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let config = match ProcessConfig::load(&flags, std::env::vars_os()) {
        Ok(config) => config,
        Err(mistakes) => return fail(&mistakes),
    };
    if flags.check_config {
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{}", config.effective);
        return ExitCode::SUCCESS;
    }
    if let Err(error) = start_logs(&config) {
        return fail(&format_args!("{error:#}"));
    }
    match serve(&config, flags.exit_on_stdin_eof) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            if is_permanent(&error) { ExitCode::from(EXIT_CONFIG) } else { ExitCode::FAILURE }
        }
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "luna-broker: {error}");
    ExitCode::from(EXIT_CONFIG)
}

fn start_logs(config: &ProcessConfig) -> anyhow::Result<()> {
    let log = LogConfig::from_vars("luna-broker", std::env::vars_os())?;
    telemetry::init(&LogConfig { format: config.log_format, ..log })?;
    Ok(())
}

fn serve(config: &ProcessConfig, exit_on_stdin_eof: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let stdin_closed = exit_on_stdin_eof.then(watch_stdin).transpose()?;
    runtime.block_on(async {
        let shutdown = shutdown_reason(stdin_closed)?;
        Server::bind(&config.broker)?.serve(shutdown).await
    })
}

/// Whether starting again with the same settings cannot help.
fn is_permanent(error: &anyhow::Error) -> bool {
    let Some(StartError::Bind { source, .. }) = error.downcast_ref() else { return false };
    match source {
        BindError::AddrInUse { .. } | BindError::Io { .. } => false,
        BindError::BindRefused { .. }
        | BindError::MissingDirectory { .. }
        | BindError::NotASocket { .. }
        | BindError::InvalidConfig { .. } => true,
    }
}

/// Resolves on SIGTERM, on Ctrl-C, and when standard input closes if that is watched.
fn shutdown_reason(
    stdin_closed: Option<oneshot::Receiver<()>>,
) -> anyhow::Result<impl Future<Output = String>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let closed = async move {
        match stdin_closed {
            Some(closed) => drop(closed.await),
            None => std::future::pending().await,
        }
    };
    Ok(async move {
        let reason = tokio::select! {
            _ = terminate.recv() => "SIGTERM received",
            _ = interrupt.recv() => "SIGINT received",
            () = closed => "standard input closed",
        };
        reason.to_owned()
    })
}

/// Waits on a thread of its own for the end of standard input.
fn watch_stdin() -> anyhow::Result<oneshot::Receiver<()>> {
    let (closed, receiver) = oneshot::channel();
    let watch = move || {
        // An error ends it like the end of the input: there will be no more of it.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        // Nobody listens any more when the process is stopping already.
        let _ = closed.send(());
    };
    std::thread::Builder::new()
        .name("luna-stdin".to_owned())
        .spawn(watch)
        .context("cannot start the thread that watches standard input")?;
    Ok(receiver)
}
