//! Many seeds on several threads, and what is said about one that fails.

use std::{
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    ledger::{Counts, Violation},
    mutant::Mutant,
    trace::Line,
    world::{Report, run},
};

/// Lines that a report of a failure shows at most.
const LINES_MAX: usize = 80;

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub struct Campaign {
    /// The first seed.
    pub first: u64,
    /// How many seeds, one after the other.
    pub count: u64,
    /// Threads; seeds are independent.
    pub threads: usize,
    /// A bug on purpose.
    pub mutant: Option<Mutant>,
}

/// What many runs did together.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Runs that ended.
    pub seeds: u64,
    /// Sums over the runs.
    pub counts: Counts,
    /// Time that passed in the runs, in microseconds.
    pub virtual_us: u64,
    /// The seeds that broke a promise, in order.
    pub failures: Vec<(u64, Violation)>,
}

impl Campaign {
    /// Runs all seeds, or until one fails when `stops` says so.
    pub fn run(self, stops: bool) -> Summary {
        let next = AtomicU64::new(self.first);
        let end = self.first + self.count;
        let summary = Mutex::new(Summary::default());
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= end {
                            return;
                        }
                        let report = run(seed, self.mutant, false);
                        let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
                        summary.add(seed, report);
                        if stops && !summary.failures.is_empty() {
                            next.store(end, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut summary = summary.into_inner().unwrap_or_else(PoisonError::into_inner);
        summary.failures.sort_by_key(|(seed, _)| *seed);
        summary
    }
}

/// Runs one seed.
pub fn run_seed(seed: u64, mutant: Option<Mutant>) -> Report {
    run(seed, mutant, false)
}

/// Runs one seed again and tells what led to its failure, or with `all` everything that happened.
pub fn explain(seed: u64, mutant: Option<Mutant>, all: bool) -> String {
    let report = run(seed, mutant, true);
    let mut text = String::new();
    let concerned = report.violation.as_ref().and_then(|violation| violation.request.clone());
    // Of everything that is no request's own, only faults and notices are told.
    let is_traffic = |line: &Line| line.text.contains(" -> ");
    let lines = report.lines.iter().filter(|line| match (&line.request, &concerned) {
        _ if all => true,
        (Some(request), Some(concerned)) => request == concerned,
        (None, Some(_)) => !is_traffic(line),
        (_, None) => !line.text.ends_with(": heartbeat"),
    });
    let lines: Vec<_> = lines.collect();
    let skipped = if all { 0 } else { lines.len().saturating_sub(LINES_MAX) };
    for line in &lines[skipped..] {
        text.push_str(&line.text);
        text.push('\n');
    }
    if let Some(Violation { invariant, request, what, at_us }) = &report.violation {
        let request = request.as_ref().map(|id| format!(" (request {id})")).unwrap_or_default();
        let at = *at_us / 1000;
        let _ = writeln!(text, "seed {seed} breaks {invariant} after {at} ms{request}: {what}");
        let mutant = mutant.map(|mutant| format!(" --mutant {}", mutant.name()));
        let mutant = mutant.unwrap_or_default();
        let _ = writeln!(text, "replay: cargo xtask sim --seed {seed} --trace{mutant}");
    }
    text
}

impl Summary {
    fn add(&mut self, seed: u64, report: Report) {
        self.seeds += 1;
        self.virtual_us += report.virtual_us;
        self.counts.add(report.counts);
        if let Some(violation) = report.violation {
            self.failures.push((seed, violation));
        }
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.forgotten += other.forgotten;
        self.uploads += other.uploads;
        self.faults += other.faults;
        self.poisoned += other.poisoned;
        for (name, count) in other.failed {
            *self.failed.entry(name).or_default() += count;
        }
    }
}
