//! `luna bench overload`: what is left of a broker's service when more is asked for than its workers
//! can do.
//!
//! The workers take a fixed time for every request, one at a time, so that the farm's capacity is
//! known: it is measured first, with a few requests always waiting. All loads after that are open
//! loops (`open_loop`): clients send on a schedule and do not care whether the farm keeps up.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use anyhow::ensure;
use futures::future::join_all;
use serde::Serialize;
use transport::{Dealer, DealerConfig};

use crate::{
    closed_loop::ClosedLoop,
    latency::{Latencies, LatencySummary},
    open_loop::{OpenLoop, OpenOutcome, StreamTally},
    schedule::Schedule,
    site::{Site, Workforce},
    traffic::Traffic,
};

/// Clients that share a load evenly.
const CLIENTS: usize = 8;

/// What overload is, in capacities.
const OVERLOAD: f64 = 3.0;

/// What the polite clients ask for together, in capacities.
const POLITE: f64 = 0.5;

/// What the greedy client asks for, in loads of one polite client.
const GREED: f64 = 20.0;

/// Turns that the polite clients are measured in, without and with the greedy one.
const ROUNDS: u32 = 3;

/// The begin of every load, which is not counted.
const WARM_UP: Duration = Duration::from_secs(1);

/// Bytes of a request and of a reply: small, so that the workers are the bottleneck.
const BYTES: (usize, usize) = (256, 1024);

/// What is measured, and for how long.
#[derive(Debug, Clone)]
pub struct OverloadPlan {
    /// The executable whose `broker` subcommand is measured.
    pub executable: PathBuf,
    /// Workers, each with one slot.
    pub workers: usize,
    /// How long a worker works on a request.
    pub service: Duration,
    /// The time in which an answer is of use.
    pub budget: Duration,
    /// How long each load is counted.
    pub duration: Duration,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct OverloadReport {
    /// CPU cores of the machine, which the load shares with what is measured.
    pub cores: usize,
    /// Workers, each with one slot.
    pub workers: usize,
    /// How long a worker works on a request, in milliseconds.
    pub service_ms: f64,
    /// The time in which an answer is of use, in milliseconds.
    pub budget_ms: f64,
    /// Requests per second that the farm answers when some always wait.
    pub capacity_per_second: f64,
    /// As much as the farm can do.
    pub full: LoadReport,
    /// Three times as much.
    pub over: LoadReport,
    /// Good replies at three times the capacity, as a share of the most that were ever seen.
    pub goodput_share: f64,
    /// Polite clients that together ask for half of the capacity.
    pub polite_alone: LoadReport,
    /// The same clients beside a greedy one.
    pub polite_beside_greedy: LoadReport,
    /// The greedy client, which asks for 20 times as much as each of them.
    pub greedy: LoadReport,
    /// The polite clients' p99 with the greedy one, divided by that without.
    pub polite_p99_ratio: f64,
}

/// What became of a load.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// Clients.
    pub clients: usize,
    /// Requests per second that were due.
    pub offered_per_second: f64,
    /// Replies per second that came within the budget.
    pub goodput_per_second: f64,
    /// How long these took, from when the request was due.
    pub good: LatencySummary,
    /// How long it took until a request was answered `overloaded`.
    pub rejected: LatencySummary,
    /// The least, the median and the greatest `retry_after_ms` that came with it.
    pub retry_after_ms: Option<[u32; 3]>,
    /// Replies after the budget.
    pub late: u64,
    /// Requests that were never answered.
    pub lost: u64,
    /// Requests that were not sent because the broker did not read.
    pub unsent: u64,
    /// Other errors by code.
    pub failed: BTreeMap<String, u64>,
    /// How much later than due the load sent: the error of the measurement itself.
    pub lateness: LatencySummary,
}

/// The farm under load, and what all loads have in common.
struct Farm<'a> {
    plan: &'a OverloadPlan,
    site: Site,
    traffic: Arc<Traffic>,
    serials: AtomicU32,
    capacity: f64,
}

/// What became of some clients' requests, over all turns.
#[derive(Debug, Default)]
struct Sum {
    streams: Vec<StreamTally>,
    lateness: Latencies,
    counted: Duration,
}

/// Measures everything, and tells `progress` what it is at.
///
/// # Errors
/// When something cannot be started, or a connection is lost.
pub fn run(plan: &OverloadPlan, progress: &mut dyn FnMut(&str)) -> anyhow::Result<OverloadReport> {
    ensure!(plan.workers > 0, "at least 1 worker must be there");
    ensure!(!plan.service.is_zero(), "workers must take some time for a request");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(plan, progress))
}

async fn measure(
    plan: &OverloadPlan,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<OverloadReport> {
    progress("the farm's capacity");
    let mut farm = Farm::start(plan).await?;
    let even = |load: f64| vec![farm_share(load); CLIENTS];

    progress("as much as the farm can do");
    let full = Sum::of([farm.load(&even(1.0)).await?], plan.duration).report(&even(1.0), &farm);
    progress("three times as much");
    let over = Sum::of([farm.load(&even(OVERLOAD)).await?], plan.duration);
    let over = over.report(&even(OVERLOAD), &farm);

    let polite = even(POLITE);
    let greedy = [polite[0] * GREED];
    let (mut alone, mut beside, mut greed) = (Sum::default(), Sum::default(), Sum::default());
    for round in 1..=ROUNDS {
        progress(&format!("polite clients alone, turn {round} of {ROUNDS}"));
        alone.add(farm.load(&polite).await?, plan.duration);
        progress(&format!("polite clients beside a greedy one, turn {round} of {ROUNDS}"));
        let mut outcome = farm.load(&[&polite[..], &greedy].concat()).await?;
        let streams = outcome.streams.split_off(CLIENTS);
        greed.add(OpenOutcome { streams, lateness: outcome.lateness.clone() }, plan.duration);
        beside.add(outcome, plan.duration);
    }
    let polite_alone = alone.report(&polite, &farm);
    let polite_beside_greedy = beside.report(&polite, &farm);
    let peak = full.goodput_per_second.max(farm.capacity);
    Ok(OverloadReport {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        workers: plan.workers,
        service_ms: plan.service.as_secs_f64() * 1e3,
        budget_ms: plan.budget.as_secs_f64() * 1e3,
        capacity_per_second: farm.capacity,
        goodput_share: over.goodput_per_second / peak,
        full,
        over,
        polite_p99_ratio: polite_beside_greedy.good.p99_us / polite_alone.good.p99_us,
        polite_alone,
        polite_beside_greedy,
        greedy: greed.report(&greedy, &farm),
    })
}

/// One client's share of a load, in capacities.
#[expect(clippy::cast_precision_loss, reason = "there are 8 clients")]
fn farm_share(load: f64) -> f64 {
    load / CLIENTS as f64
}

impl<'a> Farm<'a> {
    /// A farm whose capacity is known.
    async fn start(plan: &'a OverloadPlan) -> anyhow::Result<Self> {
        let traffic = Arc::new(Traffic::new(BYTES.0, BYTES.1)?);
        let workforce = Workforce { workers: plan.workers, slots: 1, service: plan.service };
        let mut site = Site::broker(&plan.executable, &workforce, &traffic).await?;
        let serials = AtomicU32::new(0);
        let mut clients = site.clients(CLIENTS, &config()).await?;
        let load = |duration| ClosedLoop {
            traffic: &traffic,
            in_flight: CLIENTS.max(2 * plan.workers),
            duration,
            serials: &serials,
        };
        load(WARM_UP).run(&mut clients).await?;
        let outcome = load(plan.duration).run(&mut clients).await?;
        join_all(clients.into_iter().map(Dealer::close)).await;
        let capacity = per_second(outcome.latencies.count(), outcome.elapsed);
        Ok(Self { plan, site, traffic, serials, capacity })
    }

    /// Puts one client for each of `shares`, in capacities, on the farm.
    async fn load(&mut self, shares: &[f64]) -> anyhow::Result<OpenOutcome> {
        let rates: Vec<_> = shares.iter().map(|share| share * self.capacity).collect();
        let duration = WARM_UP + self.plan.duration;
        let clients = self.site.clients(rates.len(), &config()).await?;
        let load = OpenLoop {
            schedule: Schedule::new(&rates, duration),
            traffic: Arc::clone(&self.traffic),
            budget: self.plan.budget,
            warm_up: WARM_UP,
            duration,
        };
        let outcome = load.run(clients, &self.serials).await;
        self.site.check()?;
        outcome
    }
}

impl Sum {
    fn of(outcomes: impl IntoIterator<Item = OpenOutcome>, counted: Duration) -> Self {
        let mut sum = Self::default();
        for outcome in outcomes {
            sum.add(outcome, counted);
        }
        sum
    }

    fn add(&mut self, outcome: OpenOutcome, counted: Duration) {
        self.streams.extend(outcome.streams);
        self.lateness.add(&outcome.lateness);
        self.counted += counted;
    }

    /// What people read of it, with what each client asked for.
    fn report(&self, shares: &[f64], farm: &Farm<'_>) -> LoadReport {
        let (mut good, mut rejected) = (Latencies::default(), Latencies::default());
        let (mut advice, mut failed) = (BTreeMap::new(), BTreeMap::new());
        for stream in &self.streams {
            good.add(&stream.good);
            rejected.add(&stream.rejected);
            merge(&mut advice, &stream.retry_after_ms);
            merge(&mut failed, &stream.failed);
        }
        let sum = |of: fn(&StreamTally) -> u64| self.streams.iter().map(of).sum::<u64>();
        LoadReport {
            clients: shares.len(),
            offered_per_second: shares.iter().sum::<f64>() * farm.capacity,
            goodput_per_second: per_second(sum(|stream| stream.good_in_window), self.counted),
            good: good.summary(),
            rejected: rejected.summary(),
            retry_after_ms: spread(&advice),
            late: sum(|stream| stream.late),
            lost: sum(|stream| stream.lost),
            unsent: sum(|stream| stream.unsent),
            failed,
            lateness: self.lateness.summary(),
        }
    }
}

fn config() -> DealerConfig {
    DealerConfig { thread_name: "bench-client", ..DealerConfig::default() }
}

fn merge<K: Ord + Clone>(into: &mut BTreeMap<K, u64>, counts: &BTreeMap<K, u64>) {
    for (key, count) in counts {
        *into.entry(key.clone()).or_default() += count;
    }
}

/// The least, the median and the greatest of values that are counted.
fn spread(counts: &BTreeMap<u32, u64>) -> Option<[u32; 3]> {
    let total: u64 = counts.values().sum();
    let mut passed = 0;
    let median = counts.iter().find_map(|(value, count)| {
        passed += count;
        (2 * passed >= total).then_some(*value)
    })?;
    Some([*counts.first_key_value()?.0, median, *counts.last_key_value()?.0])
}

#[expect(clippy::cast_precision_loss, reason = "there are far fewer requests than 2^52")]
fn per_second(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_told_by_its_least_median_and_greatest() {
        assert_eq!(spread(&BTreeMap::new()), None);
        assert_eq!(spread(&BTreeMap::from([(250, 9)])), Some([250; 3]));
        let counts = BTreeMap::from([(10, 2), (20, 2), (90, 1)]);
        assert_eq!(spread(&counts), Some([10, 20, 90]));
    }
}
