//! Running suspects alone: a worker is chosen, emptied, and given nothing else.

use std::time::Instant;

use crate::{
    Broker,
    isolation::Suspect,
    tasks::{Dispatched, TaskKey},
};

impl Broker {
    /// Whether the next try of a task is the one that decides.
    pub(super) fn is_suspect(&self, key: TaskKey, now: Instant) -> bool {
        let Some(task) = self.tasks.get(key) else { return false };
        self.strikes.is_suspect(&task.digest, now)
    }

    /// Chooses a worker for a suspect, unless too many are kept for others. It is given the task
    /// when it has nothing else.
    pub(super) fn isolate(&mut self, key: TaskKey, now: Instant) {
        let most = (self.workers.iter().count() / 2).max(1);
        if self.isolation.has(key) || self.isolation.len() >= most {
            return;
        }
        let Some((decision, estimate)) = self.decide(key, now) else { return };
        self.routes.set_kept(decision.peer, true);
        self.isolation.keep(Suspect { task: key, decision, estimate });
        self.tend_suspects(now);
    }

    /// Gives suspects the workers that have become empty, and frees workers of suspects that are
    /// done with.
    pub(super) fn tend_suspects(&mut self, now: Instant) {
        for suspect in self.isolation.suspects() {
            self.tend_suspect(suspect, now);
        }
    }

    fn tend_suspect(&mut self, suspect: Suspect, now: Instant) {
        let Suspect { task, decision, estimate } = suspect;
        let peer = decision.peer;
        let is_able = self.workers.get(peer).is_some_and(|worker| !worker.draining);
        let is_empty = self.in_flight.load(peer) == 0;
        match self.tasks.get(task).map(|task| task.dispatched) {
            Some(Some(Dispatched { peer: at, .. })) if at == peer => {}
            Some(None) if is_able && is_empty => self.send_work(task, decision, estimate, now),
            Some(None) if is_able => {}
            // Nobody waits for it any more, and it may still run.
            None if is_able && !is_empty => {}
            _ => {
                self.isolation.release(peer);
                self.routes.set_kept(peer, false);
            }
        }
    }
}
