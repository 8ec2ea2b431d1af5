//! The books: what was asked, how it ended, and the first broken promise.

use std::collections::{BTreeMap, BTreeSet};

use client_core::GRACE;
use protocol::{ErrorCode, RequestDigest, RequestId};

use crate::{
    event::Connection,
    plan::Plan,
    time::{Span, Time},
};

/// Time after the last fault in which a farm may still be recovering.
pub(crate) const RECOVERY: Span = Span::from_secs(4);

/// Time after a fault that takes a worker or its connection in which it may be taken for a
/// request's doing: nobody can tell who killed a worker that computed nothing else.
const BLAME: Span = Span::from_secs(1);

/// Worker processes that one poison request may take with it, whoever sends it and how often. After
/// a restart the broker does not know of processes that died before, until their workers are back.
const KILLS_MAX: usize = 3;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The invariant, `I1` to `I11`, or the promise `P15`: planned stops cost no request.
    pub invariant: &'static str,
    /// The request concerned, if it is one.
    pub request: Option<String>,
    /// What happened.
    pub what: String,
    /// When, in microseconds since the start.
    pub at_us: u64,
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Encodes asked for.
    pub requests: u64,
    /// Encodes answered rightly.
    pub answered: u64,
    /// Encodes that ended otherwise, by how.
    pub failed: BTreeMap<String, u64>,
    /// Encodes that were cancelled, or whose client was killed.
    pub forgotten: u64,
    /// Adapters uploaded.
    pub uploads: u64,
    /// Faults that happened.
    pub faults: u64,
    /// Worker processes killed by poison requests.
    pub poisoned: u64,
}

/// How an encode ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Answered,
    Failed(ErrorCode),
    TimedOut,
    Unreachable,
}

/// The books of one run.
#[derive(Debug)]
pub(crate) struct Ledger {
    open: BTreeMap<RequestId, Entry>,
    pub(crate) counts: Counts,
    pub(crate) violation: Option<Violation>,
    /// When the last fault ended, as far as is known.
    pub(crate) calm_since: Time,
    /// When a fault last hit a worker, its connection or the broker.
    pub(crate) struck: Time,
    /// Adapters that the farm holds for sure, by their places in the catalog.
    pub(crate) known: Vec<usize>,
    /// Worker processes that died of each poison request, by what is asked for.
    kills: BTreeMap<RequestDigest, Vec<Kill>>,
    /// Which life of the broker each connection of a worker belongs to.
    pub(crate) lives: BTreeMap<Connection, u32>,
    may_be_overloaded: bool,
    is_mild: bool,
    is_planned: bool,
}

/// A worker's process that died of a poison request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kill {
    /// The process.
    pub(crate) epoch: u64,
    /// The connection on which it had been given the request.
    pub(crate) connection: Option<Connection>,
    /// Whether it was to have nothing else.
    pub(crate) alone: bool,
}

/// A broker that gives out a request, and what it knows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Giver<'a> {
    /// The broker's life.
    pub(crate) life: u32,
    /// The epochs of processes whose ends journals have told it of.
    pub(crate) told: &'a BTreeSet<u64>,
}

/// An encode that has not ended.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) client: usize,
    pub(crate) deadline: Time,
    pub(crate) is_poison: bool,
    /// Whether its time is too short to be sure of an answer.
    pub(crate) is_hasty: bool,
}

impl Ledger {
    /// Empty books.
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            open: BTreeMap::new(),
            counts: Counts::default(),
            violation: None,
            calm_since: plan.calm,
            struck: Time::ZERO,
            known: (0..plan.stored).collect(),
            kills: BTreeMap::new(),
            lives: BTreeMap::new(),
            may_be_overloaded: plan.may_be_overloaded(),
            is_mild: plan.is_mild,
            is_planned: plan.is_planned,
        }
    }

    /// Notes a broken promise; the first one counts.
    pub(crate) fn violate(
        &mut self,
        invariant: &'static str,
        request: Option<&RequestId>,
        what: impl Into<String>,
        now: Time,
    ) {
        let request = request.map(ToString::to_string);
        let what = what.into();
        self.violation.get_or_insert(Violation { invariant, request, what, at_us: now.micros() });
    }

    /// An encode begins.
    pub(crate) fn asked(&mut self, id: RequestId, entry: Entry) {
        self.counts.requests += 1;
        self.open.insert(id, entry);
    }

    /// An encode ends. `awake` is since when its client's process could act.
    pub(crate) fn ended(&mut self, id: &RequestId, ending: Ending, awake: Time, now: Time) {
        let Some(entry) = self.open.remove(id) else {
            return self.violate("I1", Some(id), format!("ended again: {ending:?}"), now);
        };
        let grace = Span::from_micros(u64::try_from(GRACE.as_micros()).unwrap_or(u64::MAX));
        let latest = (entry.deadline + grace).max(awake) + Span::from_millis(1);
        if now > latest {
            let late = now.since(latest);
            self.violate("I1", Some(id), format!("ended {late} too late: {ending:?}"), now);
        }
        self.count(ending);
        let must_succeed = !entry.is_poison && !entry.is_hasty && now > self.calm_since + RECOVERY;
        let is_excused = ending == Ending::Failed(ErrorCode::Overloaded) && self.may_be_overloaded;
        if must_succeed && ending != Ending::Answered && !is_excused {
            let what = format!("all faults ended at {}, and yet: {ending:?}", self.calm_since);
            self.violate("I6", Some(id), what, now);
        }
        let is_sound = !entry.is_hasty && !is_excused;
        if self.is_planned && is_sound && ending != Ending::Answered {
            self.violate("P15", Some(id), format!("a planned stop cost it: {ending:?}"), now);
        }
        if self.is_mild
            && let Ending::Failed(code) = ending
            && !code.is_retryable()
        {
            let what = format!("a request that can be answered was refused for good: {code}");
            self.violate("I6", Some(id), what, now);
        }
        let is_quarantined = ending == Ending::Failed(ErrorCode::WorkerLost);
        if is_quarantined && !entry.is_poison && now > self.struck + BLAME {
            self.violate("I8", Some(id), "an innocent request was quarantined", now);
        }
        if entry.is_poison && ending == Ending::Answered {
            self.violate("I2", Some(id), "a request that kills workers was answered", now);
        }
    }

    /// Nobody waits for an encode any more.
    pub(crate) fn cancelled(&mut self, id: &RequestId) {
        self.counts.forgotten += u64::from(self.open.remove(id).is_some());
    }

    /// The farm holds one more adapter.
    pub(crate) fn uploaded(&mut self, adapter: usize) {
        self.counts.uploads += 1;
        if !self.known.contains(&adapter) {
            self.known.push(adapter);
        }
    }

    /// A client's process is gone with everything that it waited for.
    pub(crate) fn client_died(&mut self, client: usize) {
        let before = self.open.len();
        self.open.retain(|_, entry| entry.client != client);
        self.counts.forgotten += (before - self.open.len()) as u64;
    }

    /// A poison request took a worker with it.
    pub(crate) fn crashed(&mut self, key: RequestDigest, kill: Kill, now: Time) {
        self.counts.poisoned += 1;
        self.calm_since = self.calm_since.max(now);
        let kills = self.kills.entry(key).or_default();
        kills.push(kill);
        let life = |kill: &Kill| kill.connection.and_then(|connection| self.lives.get(&connection));
        let same = kills.iter().filter(|other| life(other) == life(&kill)).count();
        if same > KILLS_MAX {
            let what = format!("{same} workers died of equal requests of one broker");
            self.violate("I4", None, what, now);
        }
    }

    /// The broker gives out a request, to run `alone` or not. After three deaths it may do so once
    /// more if it was not told of the first ones in time for the last to be alone.
    pub(crate) fn given(&mut self, key: RequestDigest, alone: bool, by: Giver<'_>, now: Time) {
        let Some(kills) = self.kills.get(&key) else { return };
        let is_own = |kill: &Kill| {
            let connection = kill.connection;
            connection.and_then(|connection| self.lives.get(&connection)) == Some(&by.life)
        };
        let is_known = |kill: &&Kill| is_own(kill) || by.told.contains(&kill.epoch);
        let known = kills.iter().filter(is_known).count();
        let is_last = alone && !kills.iter().filter(is_known).any(|kill| kill.alone);
        if known >= KILLS_MAX && !is_last {
            let what = format!("a request was given out again of which {known} workers had died");
            self.violate("I4", None, what, now);
        }
    }

    /// A worker that was told to stop comes back at `back`.
    pub(crate) fn stopped(&mut self, back: Time) {
        self.calm_since = self.calm_since.max(back);
    }

    /// Checks that nothing is left open.
    pub(crate) fn close(&mut self, now: Time) {
        let Some((id, entry)) = self.open.iter().next() else { return };
        let (id, count) = (id.clone(), self.open.len());
        let what = format!(
            "{count} requests are still open, this one until {}, and the last fault ended at {}",
            entry.deadline, self.calm_since
        );
        self.violate("I6", Some(&id), what, now);
    }

    fn count(&mut self, ending: Ending) {
        let name = match ending {
            Ending::Answered => {
                self.counts.answered += 1;
                return;
            }
            Ending::Failed(code) => code.as_str(),
            Ending::TimedOut => "timed out at the client",
            Ending::Unreachable => "unreachable",
        };
        *self.counts.failed.entry(name.to_owned()).or_default() += 1;
    }
}
