//! What goes wrong and when: a schedule that follows from a seed. Nothing here does anything.

use std::{fmt, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

/// What a schedule is made for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlanSettings {
    /// The same seed gives the same schedule.
    pub(crate) seed: u64,
    /// How long the load lasts.
    pub(crate) duration: Duration,
    /// Workers of the farm.
    pub(crate) workers: usize,
}

/// Faults in the order of their time.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan(Vec<Planned>);

/// One fault and its time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Planned {
    /// Since the load began.
    pub(crate) at: Duration,
    /// What happens.
    pub(crate) fault: Fault,
}

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// Something happens to a process of the farm.
    Process(Target, Blow),
    /// A client asks for much and reads nothing of it.
    SlowReader {
        /// What it asks for.
        requests: usize,
        /// How long it stays.
        stay: Duration,
    },
    /// Clients go in the middle of their requests, and others come.
    ClientChurn {
        /// How many.
        clients: usize,
    },
    /// An upload that does not end as it should.
    BrokenUpload(Breakage),
}

/// A process of the farm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// The one broker.
    Broker,
    /// A worker, counted from 0.
    Worker(usize),
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blow {
    /// SIGKILL, and started anew after this time, as a service manager does.
    Kill(Duration),
    /// SIGSTOP, and SIGCONT after this time.
    Pause(Duration),
    /// SIGTERM, and started anew as soon as it has ended.
    Restart,
}

/// How an upload is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breakage {
    /// The client's connection ends after half of the file.
    Vanish,
    /// The upload is committed after half of the file.
    CommitEarly,
    /// One bit of the file is not what its digest says.
    FlippedBit,
    /// Half of the file comes, and nothing more for as long as the client is there.
    Silence,
}

/// The kinds of faults, as the report counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    KillWorker,
    KillBroker,
    PauseWorker,
    PauseBroker,
    RestartWorker,
    RestartBroker,
    SlowReader,
    ClientChurn,
    BrokenUpload,
}

impl Plan {
    /// The schedule of a seed. Faults are drawn from a bag that holds every kind at least once, so
    /// that also a short run has all of them; they overlap as it happens.
    pub(crate) fn new(settings: PlanSettings) -> Self {
        let PlanSettings { seed, duration, workers } = settings;
        let mut random = StdRng::seed_from_u64(seed);
        let (mut planned, mut bag) = (Vec::new(), Vec::new());
        let mut at = QUIET_BEFORE;
        while at + QUIET_AFTER < duration {
            if bag.is_empty() {
                bag = BAG.to_vec();
                bag.shuffle(&mut random);
            }
            let kind = bag.pop().expect("it was filled above");
            planned.push(Planned { at, fault: draw(kind, workers, &mut random) });
            at += millis(&mut random, PACE_MS);
        }
        Self(planned)
    }

    /// The faults in the order of their time.
    pub(crate) fn faults(&self) -> &[Planned] {
        &self.0
    }
}

impl Fault {
    /// What the report counts it under.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Process(Target::Worker(_), Blow::Kill(_)) => "worker killed",
            Self::Process(Target::Broker, Blow::Kill(_)) => "broker killed",
            Self::Process(Target::Worker(_), Blow::Pause(_)) => "worker paused",
            Self::Process(Target::Broker, Blow::Pause(_)) => "broker paused",
            Self::Process(Target::Worker(_), Blow::Restart) => "worker restarted",
            Self::Process(Target::Broker, Blow::Restart) => "broker restarted",
            Self::SlowReader { .. } => "slow reader",
            Self::ClientChurn { .. } => "clients dropped",
            Self::BrokenUpload(_) => "upload broken",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broker => f.write_str("broker"),
            Self::Worker(number) => write!(f, "worker {number}"),
        }
    }
}

/// One fault of a kind, with its numbers drawn.
fn draw(kind: Kind, workers: usize, random: &mut StdRng) -> Fault {
    let worker = Target::Worker(random.random_range(0..workers));
    match kind {
        Kind::KillWorker => Fault::Process(worker, Blow::Kill(millis(random, WORKER_RESTART_MS))),
        Kind::KillBroker => Fault::Process(Target::Broker, Blow::Kill(BROKER_RESTART)),
        Kind::PauseWorker => Fault::Process(worker, Blow::Pause(millis(random, WORKER_PAUSE_MS))),
        Kind::PauseBroker => {
            Fault::Process(Target::Broker, Blow::Pause(millis(random, BROKER_PAUSE_MS)))
        }
        Kind::RestartWorker => Fault::Process(worker, Blow::Restart),
        Kind::RestartBroker => Fault::Process(Target::Broker, Blow::Restart),
        Kind::SlowReader => {
            let requests = random.random_range(SLOW_REQUESTS);
            Fault::SlowReader { requests, stay: millis(random, SLOW_STAY_MS) }
        }
        Kind::ClientChurn => Fault::ClientChurn { clients: random.random_range(CHURN_CLIENTS) },
        Kind::BrokenUpload => {
            let ways =
                [Breakage::Vanish, Breakage::CommitEarly, Breakage::FlippedBit, Breakage::Silence];
            Fault::BrokenUpload(ways[random.random_range(0..ways.len())])
        }
    }
}

fn millis(random: &mut StdRng, range: std::ops::RangeInclusive<u64>) -> Duration {
    Duration::from_millis(random.random_range(range))
}

/// How often each kind comes, relative to the others.
const BAG: [Kind; 17] = [
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::KillWorker,
    Kind::KillBroker,
    Kind::KillBroker,
    Kind::PauseWorker,
    Kind::PauseWorker,
    Kind::PauseBroker,
    Kind::RestartWorker,
    Kind::RestartBroker,
    Kind::SlowReader,
    Kind::ClientChurn,
    Kind::ClientChurn,
    Kind::BrokenUpload,
    Kind::BrokenUpload,
];

/// Before the first fault: the load gets going.
const QUIET_BEFORE: Duration = Duration::from_secs(2);

/// After the last fault: what is held up has to get through.
const QUIET_AFTER: Duration = Duration::from_secs(6);

/// From one fault to the next.
const PACE_MS: std::ops::RangeInclusive<u64> = 300..=2100;

/// As a service manager's `RestartSec`.
pub(crate) const BROKER_RESTART: Duration = Duration::from_millis(100);
const WORKER_RESTART_MS: std::ops::RangeInclusive<u64> = 200..=1000;

/// Shorter and longer than the two seconds after which a silent worker counts as lost.
const WORKER_PAUSE_MS: std::ops::RangeInclusive<u64> = 100..=4000;

/// Shorter than the two seconds after which clients and workers connect anew.
const BROKER_PAUSE_MS: std::ops::RangeInclusive<u64> = 100..=1500;

/// Their answers are more than a socket holds.
const SLOW_REQUESTS: std::ops::RangeInclusive<usize> = 200..=600;
const SLOW_STAY_MS: std::ops::RangeInclusive<u64> = 2000..=8000;

const CHURN_CLIENTS: std::ops::RangeInclusive<usize> = 1..=4;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SETTINGS: PlanSettings =
        PlanSettings { seed: 7, duration: Duration::from_mins(3), workers: 3 };

    #[test]
    fn a_seed_gives_the_same_schedule_again() {
        assert_eq!(Plan::new(SETTINGS), Plan::new(SETTINGS));
        assert_ne!(Plan::new(SETTINGS), Plan::new(PlanSettings { seed: 8, ..SETTINGS }));
    }

    #[test]
    fn a_minute_has_every_kind_of_fault() {
        for seed in 0..20 {
            let plan =
                Plan::new(PlanSettings { seed, duration: Duration::from_mins(1), ..SETTINGS });
            let names: BTreeSet<_> = plan.faults().iter().map(|it| it.fault.name()).collect();
            assert_eq!(names.len(), 9, "seed {seed}: {names:?}");
        }
    }

    #[test]
    fn faults_are_in_order_of_time_and_leave_the_end_quiet() {
        let plan = Plan::new(SETTINGS);
        assert!(plan.faults().is_sorted_by_key(|planned| planned.at));
        let last = plan.faults().last().expect("three minutes have faults");
        assert!(last.at + QUIET_AFTER < SETTINGS.duration);
    }

    #[test]
    fn only_workers_that_exist_are_hit() {
        for planned in Plan::new(SETTINGS).faults() {
            if let Fault::Process(Target::Worker(number), _) = planned.fault {
                assert!(number < SETTINGS.workers);
            }
        }
    }
}
