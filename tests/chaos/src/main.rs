//! The command line of chaos; `cargo xtask chaos` builds and starts it.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to people")]

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use luna_chaos::{Report, RunSettings, run};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask chaos",
    about = "Hurts a farm of real processes under load, and checks every answer"
)]
struct Arguments {
    /// How long the load lasts
    #[arg(long, default_value_t = 3.0, value_name = "N")]
    minutes: f64,
    /// Gives the same faults again; one from the clock unless given
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Workers of the farm
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: u8,
    /// Clients that ask all the time
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    clients: u16,
    /// Different things that they ask for
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    entries: u16,
    /// Keeps logs and store also when nothing was wrong
    #[arg(long)]
    keep: bool,
    /// Prints the report as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match chaos(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs and prints the report; says whether nothing was wrong.
fn chaos(arguments: &Arguments) -> Result<bool> {
    let duration = Duration::try_from_secs_f64(arguments.minutes * 60.0)
        .context("`--minutes` is no time: write a number like 3 or 0.5")?;
    ensure!(duration < DURATION_MAX, "`--minutes` is more than a week: write less");
    let settings = RunSettings {
        seed: arguments.seed.unwrap_or_else(seed_of_the_clock),
        duration,
        workers: arguments.workers.into(),
        clients: arguments.clients.into(),
        entries: arguments.entries.into(),
        keep: arguments.keep,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report: Report = runtime.block_on(run(settings, |line| eprintln!("{line}")))?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(report.has_passed())
}

fn seed_of_the_clock() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

const DURATION_MAX: Duration = Duration::from_hours(7 * 24);
