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
    /// Models in its memory.
    pub(crate) models: BTreeSet<ModelName>,
    /// Adapters, each in the nearest place that has it.
    tiers: BTreeMap<AdapterId, Tier>,
    /// Of the inventory as it was told.
    digest: u64,
}

/// Where a worker has an adapter, the nearest place first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// On its device.
    Device,
    /// In its main memory.
    Host,
    /// In its cache on disk.
    Disk,
}

impl Report {
    /// What a worker announced.
    pub(crate) fn new(revision: u64, inventory: Inventory) -> Self {
        let digest = inventory.digest();
        let Inventory { device, host, disk, models } = inventory;
        let mut tiers = BTreeMap::new();
        for (tier, adapters) in [(Tier::Device, device), (Tier::Host, host), (Tier::Disk, disk)] {
            for adapter in adapters {
                tiers.entry(adapter).or_insert(tier);
            }
        }
        Self { revision, models: models.into_iter().collect(), tiers, digest }
    }

    /// How many adapters are in this place.
    pub(crate) fn count(&self, tier: Tier) -> usize {
        self.tiers.values().filter(|&&found| found == tier).count()
    }

    /// Adapters that can be applied without reading the disk.
    pub(crate) fn in_memory(&self) -> impl Iterator<Item = &AdapterId> {
        self.tiers.iter().filter(|(_, tier)| **tier < Tier::Disk).map(|(adapter, _)| adapter)
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

    /// Whether the last report of `worker` is of this revision, and has this digest if one is told.
    pub(crate) fn is_current(
        &self,
        worker: WorkerPeer,
        revision: u64,
        digest: Option<u64>,
    ) -> bool {
        self.reports.get(&worker).is_some_and(|report| {
            report.revision == revision && digest.is_none_or(|digest| digest == report.digest)
        })
    }

    /// Where `worker` has `adapter`.
    fn tier(&self, worker: WorkerPeer, adapter: &AdapterId) -> Option<Tier> {
        self.reports.get(&worker)?.tiers.get(adapter).copied()
    }

    /// Whether `worker` has `adapter` and needs nothing from the broker to apply it.
    pub(crate) fn holds(&self, worker: WorkerPeer, adapter: &AdapterId) -> bool {
        self.tier(worker, adapter).is_some()
    }

    /// Whether `worker` has `adapter` on its device or in its main memory.
    pub(crate) fn has_in_memory(&self, worker: WorkerPeer, adapter: &AdapterId) -> bool {
        self.tier(worker, adapter).is_some_and(|tier| tier < Tier::Disk)
    }

    /// Whether any worker has `adapter`.
    pub(crate) fn is_held(&self, adapter: &AdapterId) -> bool {
        self.reports.values().any(|report| report.tiers.contains_key(adapter))
    }

    /// The workers that have `adapter` in memory, in the order of their connections.
    pub(crate) fn holders(&self, adapter: &AdapterId) -> impl Iterator<Item = WorkerPeer> {
        let workers = self.reports.keys().copied();
        workers.filter(|&worker| self.has_in_memory(worker, adapter))
    }

    /// Whether `worker` has the model in memory.
    pub(crate) fn has_model(&self, worker: WorkerPeer, model: &ModelName) -> bool {
        self.reports.get(&worker).is_some_and(|report| report.models.contains(model))
    }

    /// The last report of `worker`.
    pub(crate) fn report(&self, worker: WorkerPeer) -> Option<&Report> {
        self.reports.get(&worker)
    }

    /// Every adapter that any worker holds in memory.
    pub(crate) fn adapters(&self) -> BTreeSet<AdapterId> {
        self.reports.values().flat_map(Report::in_memory).copied().collect()
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
        let is_current = |revision, digest| table.is_current(SECOND, revision, digest);
        assert!(is_current(2, None) && !is_current(1, None));
        let digest = inventory(&["photo"]).digest();
        assert!(is_current(2, Some(digest)) && !is_current(2, Some(digest ^ 1)));
    }

    #[test]
    fn a_forgotten_worker_holds_nothing() {
        let mut table = ResidencyTable::default();
        table.record(FIRST, report(0, &["anime"]));
        table.forget(FIRST);

        assert_eq!(holders(&table, "anime"), []);
        assert_eq!(table.report(FIRST), None);
        assert!(!table.is_current(FIRST, 0, None), "a worker that is not known has no revision");
    }

    #[test]
    fn an_adapter_counts_in_the_nearest_place() {
        let mut table = ResidencyTable::default();
        let ids = |names: &[&str]| names.iter().map(|name| id(name)).collect::<Vec<_>>();
        let (device, host, disk) = (ids(&["a"]), ids(&["a", "b"]), ids(&["b", "c"]));
        let inventory = Inventory { device, host, disk, models: vec!["sd15".parse().unwrap()] };
        table.record(FIRST, Report::new(0, inventory));

        let report = table.report(FIRST).unwrap();
        assert_eq!([Tier::Device, Tier::Host, Tier::Disk].map(|tier| report.count(tier)), [1; 3]);
        let model = "sd15".parse().unwrap();
        assert!(table.holds(FIRST, &id("c")) && table.is_held(&id("c")));
        assert_eq!(holders(&table, "c"), [], "not in memory");
        assert_eq!(table.adapters(), ids(&["a", "b"]).into_iter().collect());
        assert!(table.has_model(FIRST, &model));
    }

    fn id(name: &str) -> AdapterId {
        AdapterId::of(name.as_bytes())
    }

    fn report(revision: u64, names: &[&str]) -> Report {
        Report::new(revision, inventory(names))
    }

    fn inventory(names: &[&str]) -> Inventory {
        let device = names.iter().map(|name| id(name)).collect();
        Inventory { device, ..Inventory::default() }
    }

    fn holders(table: &ResidencyTable, name: &str) -> Vec<WorkerPeer> {
        table.holders(&id(name)).collect()
    }
}
