//! Running suspects alone: a worker is chosen, emptied, and given nothing else.

use std::time::Instant;

use protocol::Failure;

use crate::{
    Broker,
    isolation::Suspect,
    tasks::{Dispatched, TaskKey},
};

/// What deaths of workers mean for the next try of a task.
pub(super) enum Suspicion {
    /// Nothing.
    None,
    /// A worker has the same request, and after the first death one at a time is enough.
    Busy,
    /// The next try is the one that decides, so it runs alone.
    Last,
    /// There is no next try.
    Proved(Failure),
}

impl Broker {
    pub(super) fn suspicion(&self, key: TaskKey, now: Instant) -> Suspicion {
        let Some(task) = self.tasks.get(key) else { return Suspicion::None };
        if self.strikes.died(&task.digest, now).len() == 0 {
            return Suspicion::None;
        }
        if let Err(failure) = self.check_quarantine(&task.digest, now) {
            return Suspicion::Proved(failure);
        }
        if self.in_flight.is_in_hand(&task.digest) {
            return Suspicion::Busy;
        }
        let is_last = self.strikes.is_suspect(&task.digest, now);
        if is_last { Suspicion::Last } else { Suspicion::None }
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
            Some(None) if is_able && is_empty => match self.suspicion(task, now) {
                Suspicion::None | Suspicion::Last => self.send_work(task, decision, estimate, now),
                Suspicion::Busy => {}
                Suspicion::Proved(failure) => {
                    self.isolation.release(peer);
                    self.routes.set_kept(peer, false);
                    self.fail_task(task, &failure);
                }
            },
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
