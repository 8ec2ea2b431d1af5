//! Which workers were told to fetch adapters that no request needs yet.
//!
//! As with dispatches, workers own the truth: they list what they fetch in every heartbeat. What
//! they do not list after a while was refused, given up or never arrived.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use protocol::{AdapterId, limits};

use crate::peer::WorkerPeer;

/// What is being fetched, by worker, with the time when the worker was told.
#[derive(Debug, Default)]
pub(crate) struct PrefetchTable {
    told: BTreeMap<WorkerPeer, BTreeMap<AdapterId, Instant>>,
    /// Whether anything has left the table since that was last asked.
    changed: bool,
}

impl PrefetchTable {
    /// Notes that a worker is told; says whether it had not been before.
    pub(crate) fn tell(&mut self, peer: WorkerPeer, adapter: AdapterId, now: Instant) -> bool {
        self.told.entry(peer).or_default().insert(adapter, now).is_none()
    }

    /// Takes in what a worker lists. What it was told after `told_before` may not have arrived.
    pub(crate) fn confirm(
        &mut self,
        peer: WorkerPeer,
        listed: &[AdapterId],
        told_before: Option<Instant>,
        now: Instant,
    ) {
        if listed.is_empty() && !self.told.contains_key(&peer) {
            return;
        }
        let listed: BTreeSet<_> = listed.iter().take(limits::ADAPTERS_MAX).copied().collect();
        let told = self.told.entry(peer).or_default();
        for &adapter in &listed {
            told.entry(adapter).or_insert(now);
        }
        self.retain(peer, |adapter, &told| {
            listed.contains(adapter) || told_before.is_none_or(|before| told > before)
        });
    }

    /// Forgets what a worker has by now.
    pub(crate) fn arrived(&mut self, peer: WorkerPeer, has: impl Fn(&AdapterId) -> bool) {
        self.retain(peer, |adapter, _| !has(adapter));
    }

    /// Forgets a worker.
    pub(crate) fn forget(&mut self, peer: WorkerPeer) {
        self.changed |= self.told.remove(&peer).is_some();
    }

    /// The workers that fetch `adapter`.
    pub(crate) fn fetchers(&self, adapter: &AdapterId) -> impl Iterator<Item = WorkerPeer> {
        let told = self.told.iter();
        told.filter(|(_, adapters)| adapters.contains_key(adapter)).map(|(&peer, _)| peer)
    }

    /// How many adapters a worker fetches.
    pub(crate) fn count(&self, peer: WorkerPeer) -> usize {
        self.told.get(&peer).map_or(0, BTreeMap::len)
    }

    /// Whether anything has left the table since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn retain(&mut self, peer: WorkerPeer, keep: impl Fn(&AdapterId, &Instant) -> bool) {
        let Some(told) = self.told.get_mut(&peer) else { return };
        let before = told.len();
        told.retain(|adapter, told| keep(adapter, told));
        self.changed |= told.len() < before;
        if told.is_empty() {
            self.told.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PEER: WorkerPeer = WorkerPeer::new(1);

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn the_table_follows_what_the_worker_lists() {
        let (mut table, start) = (PrefetchTable::default(), Instant::now());
        let [one, other] = [b"one", b"two"].map(|name| AdapterId::of(name));
        assert!(table.tell(PEER, one, start) && !table.tell(PEER, one, start));
        table.confirm(PEER, &[], start.checked_sub(Duration::from_millis(1)), start);
        assert_eq!(table.count(PEER), 1, "the message may be on its way");
        table.confirm(PEER, &[other], Some(start), start);
        assert_eq!(table.fetchers(&one).count(), 0, "the worker did not take it");
        assert_eq!(table.fetchers(&other).collect::<Vec<_>>(), [PEER], "an earlier broker asked");
        assert!(table.take_changed() && !table.take_changed());
        table.arrived(PEER, |adapter| *adapter == other);
        assert_eq!(table.count(PEER), 0);
        assert!(table.take_changed());
    }
}
