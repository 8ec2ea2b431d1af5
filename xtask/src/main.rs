//! The project's own chores: `cargo xtask tidy`, `cargo xtask sim`, `cargo xtask chaos`,
//! `cargo xtask ci` and `cargo xtask fuzz`.
//!
//! Chores need nothing but a Rust toolchain, Python 3 and the package registries, and depend on
//! none of the workspace's crates, so that they run when those do not compile.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line speaks to people")]

mod chaos;
mod ci;
mod fuzz;
mod sim;
mod tidy;
mod workspace;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::{fuzz::FuzzArguments, workspace::Workspace};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's own chores")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Checks the rules of the house that the compiler does not know
    Tidy,
    /// Runs the real cores in virtual time, with faults; `cargo xtask sim --help` says more
    Sim(PassedOn),
    /// Hurts a farm of real processes under load; `cargo xtask chaos --help` says more
    Chaos(PassedOn),
    /// Runs everything that has to pass, step by step, and stops at the first failure
    Ci(CiArguments),
    /// Runs the fuzz targets on the stable toolchain; needs a C++ compiler
    Fuzz(FuzzArguments),
}

#[derive(Debug, Args)]
struct CiArguments {
    /// Runs this step alone; may be given several times
    #[arg(long, value_name = "NAME")]
    step: Vec<String>,
    /// Lists the steps and runs nothing
    #[arg(long)]
    list: bool,
    /// Also checks the advisory database, which has to be fetched
    #[arg(long)]
    online: bool,
}

#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct PassedOn {
    /// What the program is told
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

fn main() -> ExitCode {
    let done = Workspace::load().and_then(|workspace| match Arguments::parse().chore {
        Chore::Tidy => tidy::run(&workspace),
        Chore::Sim(PassedOn { arguments }) => sim::run(&workspace, &arguments),
        Chore::Chaos(PassedOn { arguments }) => chaos::run(&workspace, &arguments),
        Chore::Ci(CiArguments { list: true, .. }) => {
            ci::list();
            Ok(())
        }
        Chore::Ci(CiArguments { step, online, .. }) => ci::run(&workspace, &step, online),
        Chore::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
