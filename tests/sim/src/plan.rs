//! What a seed stands for: the size of the farm, its traffic and the faults that will happen.

use worker_core::Tiers;

use crate::{
    catalog::Catalog,
    faults::{self, Class, Planned},
    mutant::Mutant,
    random::Random,
    time::{Span, Time},
};

/// Everything about a run that is fixed before it begins.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) mutant: Option<Mutant>,
    pub(crate) workers: usize,
    pub(crate) clients: usize,
    /// Shortest and longest time on the executor.
    pub(crate) service: (Span, Span),
    /// Mean pause between the requests of one client.
    pub(crate) pause: Span,
    /// Requests that one client has open at once.
    pub(crate) open_max: usize,
    /// Requests that may wait at the broker.
    pub(crate) queued_max: usize,
    /// Requests that a worker runs at once.
    pub(crate) lanes: usize,
    pub(crate) tiers: Tiers,
    pub(crate) model_budget_bytes: Option<u64>,
    /// Adapters that the broker has from the start; the rest is uploaded.
    pub(crate) stored: usize,
    /// Adapters that are used at all.
    pub(crate) adapters: usize,
    /// Share of messages that are sent twice where the protocol allows it.
    pub(crate) duplicates: f64,
    /// Share of requests that kill the worker that runs them.
    pub(crate) poison: f64,
    /// Every how many workers lack the model `refiner`.
    refiner_every: usize,
    /// Whether the faults are such that workers are never away for long, so that no request may be
    /// refused for good.
    pub(crate) is_mild: bool,
    /// Whether workers stop as planned and nothing else happens, so that no request may fail.
    pub(crate) is_planned: bool,
    pub(crate) faults: Vec<Planned>,
    /// When the last of the planned faults has ended.
    pub(crate) calm: Time,
}

/// How long faults happen.
const STORM: Span = Span::from_secs(8);

impl Plan {
    /// What `seed` stands for.
    pub(crate) fn new(mutant: Option<Mutant>, random: &mut Random) -> Self {
        let workers = random.between(2, 6);
        let clients = random.between(3, 16);
        let service = (Span::from_millis(1), Span::from_millis(random.between(3, 12) as u64));
        let classes = Class::draw(random);
        let adapters = random.between(8, 48);
        let poison = if classes.contains(&Class::Poison) { 0.002 } else { 0.0 };
        let calm = Time::ZERO + STORM;
        // Every client asks so often that the workers are busy for about a third of the time.
        let mean = service.1.micros() / 2;
        let busy = mean * clients as u64 * 14 / (5 * workers as u64);
        Self {
            mutant,
            workers,
            clients,
            service,
            pause: Span::from_micros(busy),
            open_max: random.between(2, 24),
            queued_max: *random.pick(&[1024, 1024, 1024, 64, 16]),
            lanes: random.between(1, 3),
            tiers: tiers(adapters, random),
            // Room for both models or for one at a time.
            model_budget_bytes: random.chance(0.3).then_some(3 << 19),
            stored: adapters - random.between(0, 4),
            adapters,
            duplicates: *random.pick(&[0.0, 0.01]),
            poison,
            refiner_every: random.between(2, 3),
            is_mild: classes.iter().all(|class| class.is_mild()),
            is_planned: classes == [Class::Drain],
            faults: faults::plan(&classes, (workers, clients), STORM, random),
            calm,
        }
    }

    /// Whether a worker has the second model.
    pub(crate) fn serves_refiner(&self, worker: usize) -> bool {
        worker.is_multiple_of(self.refiner_every)
    }

    /// Whether the farm may be too small for bursts without any fault.
    pub(crate) fn may_be_overloaded(&self) -> bool {
        self.queued_max < self.clients * self.open_max * 2
    }
}

/// Budgets that are too small for all adapters, most of the time.
fn tiers(adapters: usize, random: &mut Random) -> Tiers {
    if adapters == Catalog::get().adapters.len() {
        // The last adapter is large.
        let (device_budget_bytes, disk_budget_bytes) = (3_000_000, 4_000_000);
        return Tiers { device_budget_bytes, disk_budget_bytes, ..Tiers::default() };
    }
    Tiers {
        // The largest stack must fit.
        device_budget_bytes: random.between(6_000, 40_000) as u64,
        host_budget_bytes: *random.pick(&[0, 10_000]),
        disk_budget_bytes: *random.pick(&[0, 20_000, 100_000]),
        ttl: random.chance(0.2).then_some(Span::from_secs(2).duration()),
    }
}
