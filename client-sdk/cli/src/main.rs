//! The `luna` command.
//!
//! It reads arguments and hands over; what a command does is in [`command`] and [`up`].

mod args;
mod command;
mod output;
mod up;

use std::{io::Write as _, process::ExitCode};

use anyhow::Context as _;
use clap::Parser as _;

use args::{Cli, Command, FarmCommand};

fn main() -> ExitCode {
    let command = match Cli::parse().command {
        Command::Broker(passed) => return broker::main_with_args(passed.arguments),
        Command::Worker(passed) => return worker::main_with_args(passed.arguments),
        Command::Bench(command) => return report(command::bench::run(command)),
        Command::Farm(command) => command,
    };
    report(run(command))
}

/// The exit code; an error goes to standard error.
fn report(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        // Nothing can be said where nothing can be written.
        let _ = writeln!(std::io::stderr(), "error: {}", message(&error));
        ExitCode::FAILURE
    })
}

/// The error and its causes, each said once: some errors of others name their cause themselves.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    message
}

fn run(command: FarmCommand) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        match command {
            FarmCommand::Up(args) => up::run(args).await,
            FarmCommand::Demo(args) => command::demo::run(args).await,
            FarmCommand::Encode(args) => command::encode::run(args).await,
            FarmCommand::Lora(command) => command::lora::run(command).await,
            FarmCommand::Model(command) => command::model::run(command).await,
            FarmCommand::Explain(args) => command::explain::run(args).await,
            FarmCommand::Warm(args) => command::warm::run(args).await,
            FarmCommand::Drain(command) => command::drain::run(command).await,
            FarmCommand::Status(args) => command::status::run(args).await,
            FarmCommand::Fixtures(args) => command::fixtures::run(&args),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_an_error_names_itself_is_not_said_again() {
        let error = anyhow::anyhow!("no such file").context("cannot read `a`: no such file");
        assert_eq!(message(&error), "cannot read `a`: no such file");
        let error = anyhow::anyhow!("disk full").context("cannot write `a`");
        assert_eq!(
            message(&error.context("the demo failed")),
            "the demo failed: cannot write `a`: disk full"
        );
    }
}
