//! The simulator's command line; `cargo xtask sim` builds and starts it.

#![expect(clippy::print_stdout, reason = "a command line speaks to people")]

use std::{process::ExitCode, time::Instant};

use clap::Parser;
use luna_sim::{Campaign, Mutant, Summary, explain, run_seed};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", about = "Runs the real cores in virtual time, with faults")]
struct Arguments {
    /// How many seeds to run
    #[arg(long, default_value_t = 200, value_name = "N")]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    first: u64,
    /// Runs this seed alone, twice
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Prints everything that happens in the one seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Threads; as many as there are cores unless given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Puts a bug into the farm
    #[arg(long, value_name = "NAME")]
    mutant: Option<Mutant>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let passed = match arguments.seed {
        Some(seed) => one(seed, &arguments),
        None => many(&arguments),
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64, arguments: &Arguments) -> bool {
    let (first, second) = (run_seed(seed, arguments.mutant), run_seed(seed, arguments.mutant));
    let passed = first.violation.is_none();
    if arguments.trace || !passed {
        print!("{}", explain(seed, arguments.mutant, arguments.trace));
    }
    println!("seed {seed}: {:?}, hash {:016x}", first.counts, first.hash);
    if first.hash != second.hash {
        println!("seed {seed} breaks I11: the second run has hash {:016x}", second.hash);
    }
    passed && first.hash == second.hash
}

fn many(arguments: &Arguments) -> bool {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.threads.unwrap_or(cores);
    let Arguments { first, seeds: count, mutant, .. } = *arguments;
    let started = Instant::now();
    let Summary { seeds, counts, virtual_us, failures } =
        Campaign { first, count, threads, mutant }.run(false);
    let seconds = started.elapsed().as_secs_f64();
    if let Some((seed, _)) = failures.first() {
        print!("{}", explain(*seed, mutant, false));
    }
    for (seed, violation) in failures.iter().take(20) {
        println!("seed {seed}: {} {}", violation.invariant, violation.what);
    }
    println!("{counts:?}");
    println!(
        "{seeds} seeds, {} requests, {} faults, {} s of virtual time, {} violations in {seconds:.1} s \
         on {threads} threads",
        counts.requests,
        counts.faults,
        virtual_us / 1_000_000,
        failures.len(),
    );
    failures.is_empty()
}
