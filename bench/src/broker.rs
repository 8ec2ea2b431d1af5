//! `luna bench broker`: what a broker does with requests that cost the workers nothing.
//!
//! Every cell, one size of messages with one number of requests in flight, is measured at all three
//! kinds of `site` in turn, round after round, so that whatever else the machine does
//! falls on all of them alike.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use futures::future::join_all;
use serde::Serialize;
use transport::{Dealer, DealerConfig};

use crate::{
    closed_loop::{ClosedLoop, Outcome},
    idle::{self, IdleReport},
    latency::{Latencies, LatencySummary},
    proc_stat::{cpu_time, resident_bytes},
    site::{Site, Workforce},
    traffic::Traffic,
};

/// Connections that the requests in flight are spread over.
const CONNECTIONS_MAX: usize = 8;

/// Workers behind the broker and behind the proxy.
const WORKERS: usize = 2;

/// Requests that a worker takes at once: all that are ever in flight.
const SLOTS: u32 = 1024;

/// Turns that every cell is measured in.
const ROUNDS: u32 = 3;

/// What is run before a cell is measured, as a share of a turn.
const WARM_UP: f64 = 0.25;

/// What is measured, and for how long.
#[derive(Debug, Clone)]
pub struct BrokerPlan {
    /// The executable whose `broker` subcommand is measured.
    pub executable: PathBuf,
    /// A Python with pyzmq, for the libzmq proxy.
    pub python: PathBuf,
    /// Sizes of messages.
    pub sizes: Vec<Sizes>,
    /// Numbers of requests in flight.
    pub in_flight: Vec<usize>,
    /// Time of every measurement, all its turns together.
    pub duration: Duration,
    /// Idle clients to connect in the end; 0 leaves that out.
    pub idle_clients: usize,
}

/// The sizes of requests and their replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of a request's header frame; small ones become the fewest that a header can have.
    pub request_bytes: usize,
    /// Bytes of a reply's attachments.
    pub reply_bytes: usize,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct BrokerReport {
    /// CPU cores of the machine, which the load shares with what is measured.
    pub cores: usize,
    /// The proxy's version, or nothing where there was none.
    pub proxy: Option<String>,
    /// Why there was no proxy.
    pub proxy_missing: Option<String>,
    /// One for every size and number in flight.
    pub cells: Vec<Cell>,
    /// What idle clients cost.
    pub idle: Option<IdleReport>,
}

/// One size of messages with one number of requests in flight.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// Bytes of a request's header frame.
    pub request_bytes: usize,
    /// Bytes of a reply's attachments; a reply's header comes on top.
    pub reply_bytes: usize,
    /// Requests in flight.
    pub in_flight: usize,
    /// Without anything between clients and the one who answers.
    pub direct: Measurement,
    /// Through the broker.
    pub broker: Measurement,
    /// Through the libzmq proxy.
    pub proxy: Option<Measurement>,
}

/// One cell at one site.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measurement {
    /// Round trips.
    pub latency: LatencySummary,
    /// Replies per second over all turns.
    pub per_second: f64,
    /// Replies per second in the slowest turn.
    pub per_second_min: f64,
    /// Replies per second in the fastest turn.
    pub per_second_max: f64,
    /// CPU time of the measured process for each reply.
    pub cpu_us_per_request: Option<f64>,
    /// Resident memory of the measured process afterwards.
    pub resident_bytes: Option<u64>,
}

/// What a site is asked for, turn after turn.
#[derive(Debug)]
struct Series {
    site: Site,
    clients: Vec<Dealer>,
    outcomes: Vec<Outcome>,
    cpu: Duration,
}

/// The sites of one size of messages, in the order of a [`Cell`]'s fields.
struct Sites {
    direct: Site,
    broker: Site,
    proxy: Option<Site>,
}

/// Measures everything, and tells `progress` what it is at.
///
/// # Errors
/// When something cannot be started, or a request is not answered as it should be. A missing proxy
/// is no error.
pub fn run(plan: &BrokerPlan, progress: &mut dyn FnMut(&str)) -> anyhow::Result<BrokerReport> {
    ensure!(!plan.in_flight.contains(&0), "at least 1 request must be in flight");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(plan, progress))
}

impl Cell {
    /// Round-trip time that the broker adds to the direct one at a percentile, in microseconds.
    pub fn added_us(&self, of: fn(&LatencySummary) -> f64) -> f64 {
        of(&self.broker.latency) - of(&self.direct.latency)
    }

    /// The broker's number divided by the proxy's.
    pub fn ratio(&self, of: fn(&Measurement) -> Option<f64>) -> Option<f64> {
        let proxy = of(self.proxy.as_ref()?)?;
        Some(of(&self.broker)? / proxy).filter(|ratio| ratio.is_finite())
    }
}

async fn measure(
    plan: &BrokerPlan,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<BrokerReport> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut report =
        BrokerReport { cores, proxy: None, proxy_missing: None, cells: Vec::new(), idle: None };
    let serials = AtomicU32::new(0);
    for sizes in &plan.sizes {
        let traffic = Arc::new(Traffic::new(sizes.request_bytes, sizes.reply_bytes)?);
        let mut sites = sites(plan, &traffic, &mut report).await?;
        for &in_flight in &plan.in_flight {
            let bytes = traffic.request_bytes();
            progress(&format!(
                "requests of {bytes} bytes, replies of {}, {in_flight} in flight",
                sizes.reply_bytes
            ));
            let load = ClosedLoop {
                traffic: &traffic,
                in_flight,
                duration: plan.duration / ROUNDS,
                serials: &serials,
            };
            let (cell, returned) = measure_cell(&load, sizes.reply_bytes, sites).await?;
            report.cells.push(cell);
            sites = returned;
        }
    }
    if plan.idle_clients > 0 {
        progress(&format!("{} idle clients", plan.idle_clients));
        report.idle = Some(idle::measure(&plan.executable, plan.idle_clients).await?);
    }
    Ok(report)
}

async fn sites(
    plan: &BrokerPlan,
    traffic: &Arc<Traffic>,
    report: &mut BrokerReport,
) -> anyhow::Result<Sites> {
    let workforce = Workforce { workers: WORKERS, slots: SLOTS, service: Duration::ZERO };
    let direct = Site::direct(traffic)?;
    let broker = Site::broker(&plan.executable, &workforce, traffic).await?;
    let proxy = match Site::proxy(&plan.python, WORKERS, traffic) {
        Ok(site) => {
            report.proxy = site.version().map(str::to_owned);
            Some(site)
        }
        Err(error) => {
            report.proxy_missing = Some(format!("{error:#}"));
            None
        }
    };
    Ok(Sites { direct, broker, proxy })
}

async fn measure_cell(
    load: &ClosedLoop<'_>,
    reply_bytes: usize,
    sites: Sites,
) -> anyhow::Result<(Cell, Sites)> {
    let mut series = Vec::new();
    for site in [Some(sites.direct), Some(sites.broker), sites.proxy].into_iter().flatten() {
        let mut one = Series::start(site, load.in_flight).await?;
        let warm_up = ClosedLoop { duration: load.duration.mul_f64(WARM_UP), ..*load };
        warm_up.run(&mut one.clients).await?;
        series.push(one);
    }
    for _ in 0..ROUNDS {
        for one in &mut series {
            one.take_turn(load).await?;
        }
    }
    let mut measured = Vec::new();
    for one in series {
        measured.push(one.finish().await?);
    }
    let mut measured = measured.into_iter();
    let mut next = || measured.next();
    let (direct, direct_site) = next().context("the direct site is measured always")?;
    let (broker, broker_site) = next().context("the broker is measured always")?;
    let (proxy, proxy_site) = next().unzip();
    let request_bytes = load.traffic.request_bytes();
    let cell =
        Cell { request_bytes, reply_bytes, in_flight: load.in_flight, direct, broker, proxy };
    Ok((cell, Sites { direct: direct_site, broker: broker_site, proxy: proxy_site }))
}

impl Series {
    async fn start(mut site: Site, in_flight: usize) -> anyhow::Result<Self> {
        let config = DealerConfig { thread_name: "bench-client", ..DealerConfig::default() };
        let clients = site.clients(in_flight.min(CONNECTIONS_MAX), &config).await?;
        Ok(Self { site, clients, outcomes: Vec::new(), cpu: Duration::ZERO })
    }

    async fn take_turn(&mut self, load: &ClosedLoop<'_>) -> anyhow::Result<()> {
        let pid = self.site.pid();
        let before = pid.map(cpu_time).transpose()?;
        let outcome = load.run(&mut self.clients).await;
        self.site.check()?;
        self.outcomes.push(outcome?);
        if let (Some(pid), Some(before)) = (pid, before) {
            self.cpu += cpu_time(pid)?.saturating_sub(before);
        }
        Ok(())
    }

    async fn finish(self) -> anyhow::Result<(Measurement, Site)> {
        let pid = self.site.pid();
        let resident_bytes = pid.map(resident_bytes).transpose()?;
        let cpu = pid.map(|_| self.cpu);
        join_all(self.clients.into_iter().map(Dealer::close)).await;
        Ok((summarise(&self.outcomes, cpu, resident_bytes), self.site))
    }
}

fn summarise(
    outcomes: &[Outcome],
    cpu: Option<Duration>,
    resident_bytes: Option<u64>,
) -> Measurement {
    let mut latencies = Latencies::default();
    for outcome in outcomes {
        latencies.add(&outcome.latencies);
    }
    let elapsed: Duration = outcomes.iter().map(|outcome| outcome.elapsed).sum();
    let rates = || outcomes.iter().map(|one| rate(one.latencies.count(), one.elapsed));
    let count = latencies.count();
    Measurement {
        latency: latencies.summary(),
        per_second: rate(count, elapsed),
        per_second_min: rates().fold(f64::INFINITY, f64::min),
        per_second_max: rates().fold(0.0, f64::max),
        cpu_us_per_request: cpu.map(|cpu| 1e6 / rate(count, cpu)),
        resident_bytes,
    }
}

/// How many there are per second.
#[expect(clippy::cast_precision_loss, reason = "there are far fewer requests than 2^52")]
fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_summed_and_the_slowest_and_fastest_are_told() {
        let turn = |count: u64, seconds| {
            let mut latencies = Latencies::default();
            for _ in 0..count {
                latencies.record(Duration::from_millis(1));
            }
            Outcome { latencies, elapsed: Duration::from_secs(seconds) }
        };
        let cpu = Some(Duration::from_millis(600));
        let measured = summarise(&[turn(100, 1), turn(200, 1), turn(300, 2)], cpu, Some(7));
        let near = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-6, "{value}");
        near(measured.per_second, 150.0);
        near(measured.per_second_min, 100.0);
        near(measured.per_second_max, 200.0);
        near(measured.cpu_us_per_request.unwrap(), 1_000.0);
        assert_eq!((measured.latency.count, measured.resident_bytes), (600, Some(7)));
    }
}
