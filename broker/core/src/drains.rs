//! Who drains on an operator's order, and what draining workers hand over before they leave.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{AdapterId, WorkerName};

use crate::peer::WorkerPeer;

/// The orders, and the hand-overs under way.
#[derive(Debug, Default)]
pub(crate) struct Drains {
    /// The process that was told to drain, by its worker's name, and why. A restarted process
    /// serves again.
    ordered: BTreeMap<WorkerName, (u64, String)>,
    /// What other workers were told to fetch because this one drains.
    handovers: BTreeMap<WorkerPeer, BTreeSet<AdapterId>>,
}

impl Drains {
    /// An operator wants the process to drain.
    pub(crate) fn order(&mut self, worker: WorkerName, epoch: u64, reason: String) {
        self.ordered.insert(worker, (epoch, reason));
    }

    /// An operator wants the worker to serve again.
    pub(crate) fn undo(&mut self, worker: &WorkerName) {
        self.ordered.remove(worker);
    }

    /// Why an operator wants the process to drain, if one does. An order to an earlier process of
    /// the worker is forgotten.
    pub(crate) fn ordered(&mut self, worker: &WorkerName, epoch: u64) -> Option<&str> {
        if self.ordered.get(worker).is_some_and(|(ordered, _)| *ordered != epoch) {
            self.ordered.remove(worker);
        }
        self.ordered.get(worker).map(|(_, reason)| reason.as_str())
    }

    /// A worker hands over what it alone has.
    pub(crate) fn hand_over(&mut self, peer: WorkerPeer, adapters: BTreeSet<AdapterId>) {
        self.handovers.insert(peer, adapters);
    }

    /// Forgets a hand-over: the worker is gone or serves again.
    pub(crate) fn forget(&mut self, peer: WorkerPeer) {
        self.handovers.remove(&peer);
    }

    /// Whether a draining worker may leave: nothing that it handed over is still under way.
    pub(crate) fn is_released(
        &self,
        peer: WorkerPeer,
        is_fetched: impl Fn(&AdapterId) -> bool,
    ) -> bool {
        self.handovers.get(&peer).is_some_and(|adapters| !adapters.iter().any(is_fetched))
    }

    /// The workers that hand over.
    pub(crate) fn peers(&self) -> impl Iterator<Item = WorkerPeer> {
        self.handovers.keys().copied()
    }
}
