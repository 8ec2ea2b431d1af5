//! Workers that keep failing while others do not.
//!
//! ```text
//!            5 failures in a row
//! Well ─────────────────────────▶ Ejected ── 1 s · 2ⁿ, at most 1 min ──▶ Probing
//!  ▲                                 ▲                                     │  │
//!  │                                 └────────────── failure ──────────────┘  │
//!  └───────────────────────────────── success ────────────────────────────────┘
//! ```
//!
//! An ejected worker is given nothing as long as another one can do it, and one that is probed is
//! given one request at a time. Whether a worker may be ejected at all is for the caller to say:
//! there must be others that do not fail, and never more than half of the workers of a model are left out.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::peer::WorkerPeer;

/// Failures in a row after which a worker is suspect.
const FAILURES: u32 = 5;
/// How long the first ejection lasts; each further one lasts twice as long.
const FIRST: Duration = Duration::from_secs(1);
/// The longest ejection.
const LONGEST: Duration = Duration::from_mins(1);

/// How far a worker is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// As all.
    Well,
    /// It is given nothing that another one can do.
    Ejected,
    /// It is given one request at a time.
    Probing,
}

/// How every worker has fared.
#[derive(Debug, Default)]
pub(crate) struct Outliers {
    records: BTreeMap<WorkerPeer, Record>,
}

#[derive(Debug, Default)]
struct Record {
    /// Failures since the last success.
    failures: u32,
    ejections: u32,
    ejected_until: Option<Instant>,
    probing: bool,
}

impl Outliers {
    /// Notes that a worker answered. Says whether it is trusted again because of that.
    pub(crate) fn succeeded(&mut self, peer: WorkerPeer) -> bool {
        let record = self.records.remove(&peer).unwrap_or_default();
        record.probing || record.ejected_until.is_some()
    }

    /// Notes that a worker failed, or lost what it was given. Says whether that makes it suspect.
    pub(crate) fn failed(&mut self, peer: WorkerPeer) -> bool {
        let record = self.records.entry(peer).or_default();
        record.failures = record.failures.saturating_add(1);
        let suspect = record.probing || record.failures >= FAILURES;
        suspect && record.ejected_until.is_none()
    }

    /// Leaves a worker out from now on.
    pub(crate) fn eject(&mut self, peer: WorkerPeer, now: Instant) {
        let record = self.records.entry(peer).or_default();
        let time = FIRST.saturating_mul(1 << record.ejections.min(16)).min(LONGEST);
        record.ejections += 1;
        record.probing = false;
        record.ejected_until = Some(now + time);
    }

    /// The workers whose time is over; they are probed from now on.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<WorkerPeer> {
        let mut due = Vec::new();
        for (&peer, record) in &mut self.records {
            if record.ejected_until.take_if(|until| *until <= now).is_some() {
                record.probing = true;
                due.push(peer);
            }
        }
        due
    }

    /// When the next worker's time is over.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.records.values().filter_map(|record| record.ejected_until).min()
    }

    pub(crate) fn health(&self, peer: WorkerPeer) -> Health {
        match self.records.get(&peer) {
            Some(Record { ejected_until: Some(_), .. }) => Health::Ejected,
            Some(Record { probing: true, .. }) => Health::Probing,
            _ => Health::Well,
        }
    }

    /// Whether a worker has failed since it last succeeded.
    pub(crate) fn is_failing(&self, peer: WorkerPeer) -> bool {
        self.records.get(&peer).is_some_and(|record| record.failures > 0)
    }

    /// The same process goes on under another connection.
    pub(crate) fn rename(&mut self, from: WorkerPeer, to: WorkerPeer) {
        if let Some(record) = self.records.remove(&from) {
            self.records.insert(to, record);
        }
    }

    pub(crate) fn forget(&mut self, peer: WorkerPeer) {
        self.records.remove(&peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: WorkerPeer = WorkerPeer::new(0);

    #[test]
    fn five_failures_in_a_row_are_suspect_and_a_success_forgets_them() {
        let mut outliers = Outliers::default();
        for _ in 0..4 {
            assert!(!outliers.failed(PEER));
        }
        assert!(!outliers.succeeded(PEER) && !outliers.is_failing(PEER));
        for _ in 0..4 {
            assert!(!outliers.failed(PEER));
        }
        assert!(outliers.failed(PEER));
    }

    #[test]
    fn ejections_last_twice_as_long_each_time_until_a_probe_succeeds() {
        let (mut outliers, mut now) = (Outliers::default(), now());
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            outliers.eject(PEER, now);
            assert_eq!(outliers.health(PEER), Health::Ejected);
            assert_eq!(outliers.next_due(), Some(now + Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
            assert_eq!(outliers.due(now), [PEER]);
            assert_eq!(outliers.health(PEER), Health::Probing);
            assert!(outliers.failed(PEER), "one failure of a probe is enough");
        }
        assert!(outliers.succeeded(PEER));
        assert_eq!(outliers.health(PEER), Health::Well);
        outliers.eject(PEER, now);
        assert_eq!(outliers.next_due(), Some(now + FIRST));
    }

    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn now() -> Instant {
        Instant::now()
    }
}
