//! The farm keeps its promises under every fault, and the simulator would notice if it did not.

use luna_sim::{Campaign, Mutant, explain, run_seed};

/// The seeds that every change has to pass.
const SEEDS: u64 = 200;

/// Encodes that they ask for together.
const REQUESTS_MIN: u64 = 1_000_000;

#[test]
fn the_farm_keeps_its_promises_under_faults() {
    let summary = campaign(SEEDS, None).run(true);
    if let Some((seed, _)) = summary.failures.first() {
        panic!("{}", explain(*seed, None, false));
    }
    let requests = summary.counts.requests;
    assert!(requests >= REQUESTS_MIN, "{requests} requests are too few to prove anything");
    // A farm that refuses everything breaks no promise either.
    assert!(summary.counts.answered * 10 > requests * 8, "{:?}", summary.counts);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..4 {
        let (first, second) = (run_seed(seed, None), run_seed(seed, None));
        assert_eq!(first.hash, second.hash, "seed {seed}");
        assert_eq!(first.counts, second.counts, "seed {seed}");
    }
    assert_ne!(run_seed(0, None).hash, run_seed(1, None).hash);
}

#[test]
fn every_mutant_is_found() {
    for (name, mutant) in Mutant::ALL {
        let summary = campaign(SEEDS, Some(mutant)).run(true);
        assert!(!summary.failures.is_empty(), "mutant `{name}` survived {SEEDS} seeds");
    }
}

fn campaign(count: u64, mutant: Option<Mutant>) -> Campaign {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Campaign { first: 0, count, threads, mutant }
}
