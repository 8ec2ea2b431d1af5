//! Which worker holds which adapters and models, and where.
//!
//! The table is the broker's *belief*. Workers own the truth: they evict on their own and send
//! their whole inventory whenever it changed. A stale row costs one extra load, never a wrong
//! embedding, so routing may trust the table without asking anyone.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{AdapterId, ModelName, worker::Inventory};

use crate::peer::WorkerPeer;

/// The last report of every live worker.
#[derive(Debug, Default)]
pub(crate) struct ResidencyTable {
    reports: BTreeMap<WorkerPeer, Report>,
}

/// Everything that one worker held at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Grows with every change; starts again from zero when the worker restarts.
    pub(crate) revision: u64,
    /// Adapters on its device or in its main memory.
    pub(crate) memory: BTreeSet<AdapterId>,
    /// How many of those are in its main memory.
    pub(crate) host: usize,
    /// Adapters in its cache on disk.
    pub(crate) disk: BTreeSet<AdapterId>,
    /// Models in its memory.
    pub(crate) models: BTreeSet<ModelName>,
}

impl Report {
    /// What a worker announced.
    pub(crate) fn new(revision: u64, inventory: Inventory) -> Self {
        let Inventory { device, host, disk, models } = inventory;
        Self {
            revision,
            host: host.len(),
            memory: device.into_iter().chain(host).collect(),
            disk: disk.into_iter().collect(),
            models: models.into_iter().collect(),
        }
    }
}

impl ResidencyTable {
    /// Replaces everything known about `worker`.
    pub(crate) fn record(&mut self, worker: WorkerPeer, report: Report) {
        self.reports.insert(worker, report);
    }

    /// Forgets `worker`: it was lost, or it said goodbye.
    pub(crate) fn forget(&mut self, worker: WorkerPeer) {
        self.reports.remove(&worker);
    }

    /// Whether the last report of `worker` is of this revision.
    pub(crate) fn is_current(&self, worker: WorkerPeer, revision: u64) -> bool {
        self.reports.get(&worker).is_some_and(|report| report.revision == revision)
    }

    /// Whether `worker` can serve `adapter` without a load.
    pub(crate) fn holds(&self, worker: WorkerPeer, adapter: &AdapterId) -> bool {
        self.reports.get(&worker).is_some_and(|report| report.memory.contains(adapter))
    }

    /// The workers that can serve `adapter` without a load, in the order of their connections.
    pub(crate) fn holders(&self, adapter: &AdapterId) -> impl Iterator<Item = WorkerPeer> {
        let holds = move |report: &Report| report.memory.contains(adapter);
        self.reports.iter().filter(move |(_, report)| holds(report)).map(|(&worker, _)| worker)
    }

    /// The last report of `worker`.
    pub(crate) fn report(&self, worker: WorkerPeer) -> Option<&Report> {
        self.reports.get(&worker)
    }

    /// Every adapter that any worker holds in memory.
    pub(crate) fn adapters(&self) -> BTreeSet<AdapterId> {
        self.reports.values().flat_map(|report| &report.memory).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: WorkerPeer = WorkerPeer::new(0);
    const SECOND: WorkerPeer = WorkerPeer::new(1);

    #[test]
    fn a_report_replaces_the_one_before() {
        let mut table = ResidencyTable::default();
        table.record(SECOND, report(1, &["anime", "photo"]));
        table.record(FIRST, report(7, &["anime"]));
        assert_eq!(holders(&table, "anime"), [FIRST, SECOND]);

        table.record(SECOND, report(2, &["photo"]));

        assert_eq!(holders(&table, "anime"), [FIRST]);
        assert_eq!(holders(&table, "photo"), [SECOND]);
        assert!(table.is_current(SECOND, 2) && !table.is_current(SECOND, 1));
    }

    #[test]
    fn a_forgotten_worker_holds_nothing() {
        let mut table = ResidencyTable::default();
        table.record(FIRST, report(0, &["anime"]));
        table.forget(FIRST);

        assert_eq!(holders(&table, "anime"), []);
        assert_eq!(table.report(FIRST), None);
        assert!(!table.is_current(FIRST, 0), "a worker that is not known has no revision");
    }

    fn report(revision: u64, names: &[&str]) -> Report {
        let device = names.iter().map(|name| AdapterId::of(name.as_bytes())).collect();
        Report::new(revision, Inventory { device, ..Inventory::default() })
    }

    fn holders(table: &ResidencyTable, name: &str) -> Vec<WorkerPeer> {
        table.holders(&AdapterId::of(name.as_bytes())).collect()
    }
}
