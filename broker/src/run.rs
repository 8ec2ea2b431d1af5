//! From arguments to a serving broker, and from there to an exit code.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;
use process::exit;
use telemetry::LogConfig;
use transport::BindError;

use crate::{
    blob_store::StoreError,
    config::ProcessConfig,
    flags::Flags,
    server::{Server, StartError},
};

/// Runs a broker with these arguments, the program's name left out.
///
/// Exit codes: 0 after a drain, 1 for a failure that a restart may cure, 64 for wrong arguments,
/// 75 when another process uses the store or an endpoint, 78 for wrong settings.
pub fn main_with_args(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> ExitCode {
    let arguments = arguments.into_iter().map(Into::into);
    let arguments = std::iter::once(OsString::from("luna-broker")).chain(arguments);
    let flags = match Flags::try_parse_from(arguments) {
        Ok(flags) => flags,
        Err(answer) => {
            // Nothing can be said where nothing can be written.
            let _ = answer.print();
            return if answer.use_stderr() {
                ExitCode::from(exit::USAGE)
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
            exit_code(&error)
        }
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "luna-broker: {error}");
    ExitCode::from(exit::CONFIG)
}

fn start_logs(config: &ProcessConfig) -> anyhow::Result<()> {
    let log = LogConfig::from_vars("luna-broker", std::env::vars_os())?;
    telemetry::init(&LogConfig { format: config.log_format, ..log })?;
    Ok(())
}

fn serve(config: &ProcessConfig, exit_on_stdin_eof: bool) -> anyhow::Result<()> {
    // Every client is an open file.
    let files_max = process::raise_file_limit();
    tracing::debug!(files_max, "open files");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let shutdown = process::shutdown_reason(exit_on_stdin_eof)
            .context("cannot watch for signals and standard input")?;
        let server = Server::bind(&config.broker)?;
        Box::pin(server.serve(async { shutdown.await.to_owned() })).await
    })
}

/// How the process ends after this failure.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref() {
        Some(StartError::Store(StoreError::InUse(_))) => ExitCode::from(exit::IN_USE),
        Some(StartError::Store(StoreError::Newer { .. })) => ExitCode::from(exit::DATA),
        Some(StartError::Bind { source, .. }) => match source {
            BindError::AddrInUse { .. } => ExitCode::from(exit::IN_USE),
            BindError::Io { .. } => ExitCode::FAILURE,
            BindError::BindRefused { .. }
            | BindError::MissingDirectory { .. }
            | BindError::NotASocket { .. }
            | BindError::InvalidConfig { .. } => ExitCode::from(exit::CONFIG),
        },
        Some(StartError::Store(_) | StartError::Io(_)) | None => ExitCode::FAILURE,
    }
}
