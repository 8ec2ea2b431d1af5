//! The outcome of a run, for people and for programs.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{
    ledger::{Book, Counts, Failures},
    measure::{Detections, Gaps, percentile},
    plan::Plan,
};

/// Everything that a run counted and measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    seed: u64,
    seconds: u64,
    workers: usize,
    clients: usize,
    requests: Counts,
    latency: Spread,
    /// Of requests with enough time that nobody gave up, by code.
    innocent_errors: BTreeMap<String, Failures>,
    /// Of requests that had too little time on purpose, by code.
    hurried_errors: BTreeMap<String, Failures>,
    upload_errors: BTreeMap<String, Failures>,
    /// By kind.
    faults: BTreeMap<&'static str, usize>,
    worker_kill: WorkerKill,
    broker_kill: BrokerKill,
    /// What the processes warned of, by message.
    warnings: BTreeMap<String, usize>,
    /// Why the run has failed; nothing when it has passed.
    violations: Vec<String>,
}

/// What was found out about a run, before it is judged.
#[derive(Debug)]
pub(crate) struct Findings {
    pub(crate) seed: u64,
    pub(crate) duration: Duration,
    pub(crate) workers: usize,
    pub(crate) clients: usize,
    pub(crate) book: Book,
    pub(crate) plan: Plan,
    pub(crate) detections: Detections,
    pub(crate) gaps: Gaps,
    pub(crate) warnings: BTreeMap<String, usize>,
    /// What was seen that must not be, apart from what is in `book`.
    pub(crate) seen: Vec<String>,
}

/// Times in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    count: usize,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
}

/// From the SIGKILL of a worker to the broker's log line that says it is lost.
#[derive(Debug, Clone, Serialize)]
struct WorkerKill {
    detection: Spread,
    unknown: usize,
    during_broker_fault: usize,
    missed: usize,
}

/// From the SIGKILL of the broker to the first answer, less the pause before it is started.
#[derive(Debug, Clone, Serialize)]
struct BrokerKill {
    gap: Spread,
    gap_of_each_client: Spread,
    unanswered: usize,
}

impl Report {
    /// Judges what was found.
    pub(crate) fn new(findings: Findings) -> Self {
        let violations = findings.violations();
        let Findings { seed, duration, workers, clients, book, plan, detections, gaps, .. } =
            findings;
        let mut faults = BTreeMap::new();
        for planned in plan.faults() {
            *faults.entry(planned.fault.name()).or_default() += 1;
        }
        let Detections { times, unknown, during_broker_fault, missed } = detections;
        Self {
            seed,
            seconds: duration.as_secs(),
            workers,
            clients,
            requests: book.counts,
            latency: Spread::of(&book.latencies),
            innocent_errors: book.innocent_errors,
            hurried_errors: book.hurried_errors,
            upload_errors: book.upload_errors,
            faults,
            worker_kill: WorkerKill {
                detection: Spread::of(&times),
                unknown,
                during_broker_fault,
                missed,
            },
            broker_kill: BrokerKill {
                gap: Spread::of(&gaps.first),
                gap_of_each_client: Spread::of(&gaps.clients),
                unanswered: gaps.unanswered,
            },
            warnings: findings.warnings,
            violations,
        }
    }

    /// Whether nothing was wrong.
    pub fn has_passed(&self) -> bool {
        self.violations.is_empty()
    }
}

impl Findings {
    /// Everything that must not be. How long something took is reported and not judged: it depends
    /// on the machine.
    fn violations(&self) -> Vec<String> {
        let Book { counts, innocent_errors, upload_errors, wrong, lost, .. } = &self.book;
        let mut violations = self.seen.clone();
        violations.extend(wrong.iter().map(|how| format!("a wrong answer: {how}")));
        violations.extend(lost.iter().map(|what| format!("a lost request: {what}")));
        if counts.wrong + counts.lost > 0 {
            let Counts { wrong, lost, .. } = counts;
            violations.push(format!("{wrong} answers were wrong and {lost} requests lost"));
        }
        if counts.repeated > 0 {
            violations.push(format!("{} requests were answered twice", counts.repeated));
        }
        if !counts.is_balanced() {
            violations.push(format!("requests were not closed exactly once: {counts:?}"));
        }
        if counts.answers == 0 {
            violations.push("no request was answered".to_owned());
        }
        let failed = |whose: &str, errors: &BTreeMap<String, Failures>| {
            let unexpected = errors.iter().filter(|(code, _)| !code.starts_with(ALLOWED));
            let tell = |(code, failures): (&String, &Failures)| {
                let Failures { count, first } = failures;
                format!("{count} {whose} failed with `{code}`, the first: {first}")
            };
            unexpected.map(tell).collect::<Vec<_>>()
        };
        violations.extend(failed("innocent requests", innocent_errors));
        violations.extend(failed("uploads", upload_errors));
        if self.detections.missed > 0 {
            let missed = self.detections.missed;
            violations.push(format!("{missed} killed workers were never noticed"));
        }
        violations
    }
}

impl Spread {
    fn of(times: &[Duration]) -> Self {
        let at = |percent| percentile(times, percent).map(|time| time.as_secs_f64() * 1e3);
        Self { count: times.len(), p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, seconds, workers, clients, .. } = self;
        writeln!(f, "seed {seed}, {seconds} s, {workers} workers, {clients} clients")?;
        let Counts { requests, answers, errors, cancelled, abandoned, .. } = self.requests;
        let Counts { wrong, lost, repeated, unclaimed, uploads, .. } = self.requests;
        writeln!(f, "requests            {requests}")?;
        writeln!(f, "  answered right    {answers}")?;
        writeln!(f, "  errors            {errors}")?;
        writeln!(f, "  given up          {cancelled} cancelled, {abandoned} by clients that went")?;
        writeln!(f, "  wrong answers     {wrong}")?;
        writeln!(f, "  lost              {lost}")?;
        writeln!(f, "  duplicate replies {repeated} ({unclaimed} to requests that were given up)")?;
        writeln!(f, "latency             {}", self.latency)?;
        write_errors(f, "errors of innocents", &self.innocent_errors)?;
        write_errors(f, "errors of hurried requests", &self.hurried_errors)?;
        writeln!(f, "uploads             {uploads}")?;
        write_errors(f, "errors of uploads", &self.upload_errors)?;
        writeln!(f, "faults              {}", self.faults.values().sum::<usize>())?;
        for (name, count) in &self.faults {
            writeln!(f, "  {name:17} {count}")?;
        }
        let WorkerKill { detection, unknown, during_broker_fault, missed } = &self.worker_kill;
        writeln!(f, "worker kill to the broker's `worker lost`: {detection}")?;
        writeln!(
            f,
            "  not measured: {unknown} not known to the broker, {during_broker_fault} during a \
             fault of the broker; {missed} missed"
        )?;
        let BrokerKill { gap, gap_of_each_client, unanswered } = &self.broker_kill;
        writeln!(f, "broker kill to the first answer, less 100 ms of pause: {gap}")?;
        writeln!(f, "  the same for each client: {gap_of_each_client}")?;
        writeln!(f, "  {unanswered} without an answer before the next fault of the broker")?;
        for (message, count) in &self.warnings {
            writeln!(f, "warned {count} times: {message}")?;
        }
        for violation in &self.violations {
            writeln!(f, "VIOLATION: {violation}")?;
        }
        let end = if self.has_passed() { "passed" } else { "FAILED" };
        write!(f, "{end}; `--seed {seed}` gives the same faults again")
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, p50_ms, p99_ms, max_ms } = *self;
        match (p50_ms, p99_ms, max_ms) {
            (Some(p50), Some(p99), Some(max)) => {
                write!(f, "p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms of {count}")
            }
            _ => f.write_str("none"),
        }
    }
}

fn write_errors(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    errors: &BTreeMap<String, Failures>,
) -> fmt::Result {
    for (code, Failures { count, first }) in errors {
        writeln!(f, "{title}: {count} `{code}`, the first: {first}")?;
    }
    Ok(())
}

/// What an innocent request may be answered: the farm is full, or its broker leaves.
const ALLOWED: &str = "overloaded";
