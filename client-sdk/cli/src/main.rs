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
        Command::Farm(command) => command,
    };
    run(command).unwrap_or_else(|error| {
        // Nothing can be said where nothing can be written.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::FAILURE
    })
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
            FarmCommand::Status(args) => command::status::run(args).await,
            FarmCommand::Fixtures(args) => command::fixtures::run(&args),
        }
    })
}
