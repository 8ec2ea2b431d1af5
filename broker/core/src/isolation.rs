//! Suspects that run alone.
//!
//! When workers die, whatever they had in hand becomes suspect, and most of it is innocent. The
//! last try decides: a suspect gets a worker to itself, so that a death convicts it and nobody
//! else, and an answer clears it. A worker is kept free for its suspect from the moment it is
//! chosen, or a busy farm would never have one.

use std::collections::BTreeMap;

use crate::{in_flight::Estimate, peer::WorkerPeer, routing::Decision, tasks::TaskKey};

/// Which worker is kept for which suspect.
#[derive(Debug, Default)]
pub(crate) struct Isolation {
    kept: BTreeMap<WorkerPeer, Suspect>,
}

/// A task that is to run alone, and what was decided for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Suspect {
    pub(crate) task: TaskKey,
    pub(crate) decision: Decision,
    pub(crate) estimate: Estimate,
}

impl Isolation {
    /// Keeps the decided worker for `suspect` alone.
    pub(crate) fn keep(&mut self, suspect: Suspect) {
        self.kept.insert(suspect.decision.peer, suspect);
    }

    /// The worker is like any other again.
    pub(crate) fn release(&mut self, worker: WorkerPeer) {
        self.kept.remove(&worker);
    }

    /// Whether a worker is kept for a suspect.
    pub(crate) fn is_kept(&self, worker: WorkerPeer) -> bool {
        self.kept.contains_key(&worker)
    }

    /// Whether a worker is kept for `task`.
    pub(crate) fn has(&self, task: TaskKey) -> bool {
        self.kept.values().any(|suspect| suspect.task == task)
    }

    /// The same worker has another connection.
    pub(crate) fn rename(&mut self, from: WorkerPeer, to: WorkerPeer) {
        if let Some(suspect) = self.kept.remove(&from) {
            let decision = Decision { peer: to, ..suspect.decision };
            self.kept.insert(to, Suspect { decision, ..suspect });
        }
    }

    /// Every suspect, by its worker's connection.
    pub(crate) fn suspects(&self) -> Vec<Suspect> {
        self.kept.values().copied().collect()
    }

    /// How many workers are kept.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }
}
