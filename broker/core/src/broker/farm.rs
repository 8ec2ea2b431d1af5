//! Messages of workers: announcing, living, answering and leaving.

use std::{collections::BTreeSet, time::Instant};

use bytes::Bytes;
use protocol::{
    Envelope, Header, InvalidHeader, ModelName,
    request::Heartbeat,
    worker::{Alive, Announce, CancelWork, Disconnect, Done, Fetch, Ready, Registered},
};

use crate::{Broker, command::Notice, peer::WorkerPeer, residency::Report, workers::Worker};

impl Broker {
    pub(super) fn worker_message(&mut self, peer: WorkerPeer, frames: Vec<Bytes>, now: Instant) {
        if self.workers.is_superseded(peer) {
            return;
        }
        let envelope = match Envelope::open(frames) {
            Ok(envelope) => envelope,
            Err(error) => {
                let reason = error.to_string();
                return self.notice(Notice::WorkerGarbage { peer, reason });
            }
        };
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.heard = now;
        } else if !envelope.is::<Ready>() {
            self.tell(peer, &Announce {});
        }
        if let Err(error) = self.worker_event(peer, envelope, now) {
            self.notice(Notice::WorkerGarbage { peer, reason: error.to_string() });
        }
    }

    pub(super) fn worker_gone(&mut self, peer: WorkerPeer, now: Instant) {
        self.workers.forget_superseded(peer);
        self.lose(peer, "the connection closed");
        self.dispatch(now);
    }

    pub(super) fn lose_silent_workers(&mut self, now: Instant) {
        for peer in self.workers.silent(self.limits().worker_silence, now) {
            self.lose(peer, "it was silent for too long");
        }
    }

    fn worker_event(
        &mut self,
        peer: WorkerPeer,
        envelope: Envelope,
        now: Instant,
    ) -> Result<(), InvalidHeader> {
        match envelope.peek.kind.as_str() {
            Ready::KIND => self.worker_ready(peer, &envelope.read()?, now),
            Alive::KIND => self.worker_alive(peer, envelope.read()?, now),
            Done::KIND => self.worker_done(peer, envelope, now)?,
            Fetch::KIND => self.worker_fetch(peer, &envelope.read()?, now),
            Registered::KIND => self.worker_registered(peer, envelope.read()?, now),
            Disconnect::KIND => self.worker_left(peer, &envelope.read()?, now),
            kind => {
                let reason = format!("unknown kind `{kind:.80}`");
                self.notice(Notice::WorkerGarbage { peer, reason });
            }
        }
        Ok(())
    }

    fn worker_ready(&mut self, peer: WorkerPeer, ready: &Ready, now: Instant) {
        let refused = self.refused_by(ready);
        let rejected = self.rejected_models(ready, &refused);
        match self.workers.named(&ready.worker) {
            Some(known) if known != peer => self.replace(known, peer, ready),
            _ => {}
        }
        if self.workers.get(peer).is_some_and(|known| known.epoch != ready.epoch) {
            self.lose(peer, "another process announced itself on its connection");
        }
        let is_new = self.workers.get(peer).is_none();
        let last_used = self.workers.get(peer).map_or(0, |known| known.last_used);

        let mut worker = Worker::new(ready, self.limits().slots_max, now);
        worker.models.retain(|model| !rejected.contains(model));
        if is_new {
            self.notice(Notice::WorkerReady {
                worker: worker.name.clone(),
                peer,
                slots: worker.slots,
                models: worker.models.len(),
            });
        }
        self.workers.insert(peer, Worker { last_used, refused, ..worker }, now);
        self.apply_registrations(peer);
        self.residency.record(peer, Report::new(ready.revision, ready.inventory.clone()));
        self.reconcile(peer, &ready.in_flight, now);
        self.call_off(peer, &ready.in_flight);
        self.tell(peer, &Heartbeat {});
        self.ask_for_missing(peer);
        self.dispatch(now);
    }

    /// Cancels what a worker holds and was not given by this broker, or not since it was last lost:
    /// nobody waits for it, and it takes the slots of what somebody waits for.
    fn call_off(&mut self, peer: WorkerPeer, listed: &[u64]) {
        for &dispatch in listed {
            if !self.in_flight.has(peer, dispatch) {
                self.tell(peer, &CancelWork { dispatch });
            }
        }
    }

    /// The registered models that the same process could not serve before.
    fn refused_by(&self, ready: &Ready) -> BTreeSet<ModelName> {
        let known = self.workers.named(&ready.worker).and_then(|peer| self.workers.get(peer));
        let same = known.filter(|known| known.epoch == ready.epoch);
        same.map(|known| known.refused.clone()).unwrap_or_default()
    }

    /// A worker of a known name announces itself on another connection.
    fn replace(&mut self, old: WorkerPeer, new: WorkerPeer, ready: &Ready) {
        if self.workers.get(old).is_some_and(|known| known.epoch == ready.epoch) {
            // The same process has reconnected: it keeps what it lists, the rest got lost.
            let listed: BTreeSet<_> = ready.in_flight.iter().copied().collect();
            let dispatches: Vec<_> = self.in_flight.of_worker(old).collect();
            for (dispatch, key) in dispatches {
                if listed.contains(&dispatch) {
                    let request = self.requests.get_mut(key).expect("what is in flight is known");
                    request.dispatched = Some((new, dispatch));
                } else {
                    self.in_flight.finish(old, dispatch);
                    self.requeue(key, None);
                }
            }
            self.in_flight.move_worker(old, new);
            self.registrations_lost(old, &ready.worker);
            self.workers.remove(old);
            self.residency.forget(old);
        } else {
            self.lose(old, "a newer process has its name");
        }
        self.workers.supersede(old);
    }

    fn worker_alive(&mut self, peer: WorkerPeer, alive: Alive, now: Instant) {
        let Some(worker) = self.workers.get_mut(peer) else { return };
        if worker.epoch != alive.epoch {
            return self.tell(peer, &Announce {});
        }
        let resumes = worker.draining && !alive.draining;
        if worker.draining != alive.draining {
            worker.draining = alive.draining;
            let worker = worker.name.clone();
            self.notice(Notice::WorkerDraining { worker, draining: alive.draining });
        }
        match alive.inventory {
            Some(inventory) => {
                self.residency.record(peer, Report::new(alive.revision, inventory));
            }
            None if !self.residency.is_current(peer, alive.revision) => {
                self.tell(peer, &Announce {});
            }
            None => {}
        }
        self.reconcile(peer, &alive.in_flight, now);
        self.tell(peer, &Heartbeat {});
        if resumes {
            self.ask_for_missing(peer);
        }
        self.dispatch(now);
    }

    /// Puts back what a worker should hold and does not: it never got there.
    fn reconcile(&mut self, peer: WorkerPeer, listed: &[u64], now: Instant) {
        let listed = listed.iter().copied().collect();
        let sent_before = now.checked_sub(self.limits().dispatch_lost);
        for (dispatch, key) in self.in_flight.reconcile(peer, &listed, sent_before) {
            if let Some(worker) = self.workers.get(peer).map(|worker| worker.name.clone()) {
                self.notice(Notice::DispatchLost { worker, dispatch });
            }
            // It may be late and not lost: then the worker lets go of it as soon as it arrives, so
            // that it is not computed twice and the worker never has more than its slots.
            self.tell(peer, &CancelWork { dispatch });
            self.requeue(key, None);
        }
    }

    fn worker_done(
        &mut self,
        peer: WorkerPeer,
        envelope: Envelope,
        now: Instant,
    ) -> Result<(), InvalidHeader> {
        let done: Done = envelope.read()?;
        if self.workers.get(peer).is_some_and(|worker| worker.epoch == done.epoch) {
            // Nobody waits for an unknown dispatch: it was cancelled, expired or given to another.
            if let Some(key) = self.in_flight.finish(peer, done.dispatch) {
                self.complete(key, envelope.attachments, done.failed.is_some());
            }
            self.dispatch(now);
        }
        Ok(())
    }

    fn worker_left(&mut self, peer: WorkerPeer, left: &Disconnect, now: Instant) {
        if self.workers.get(peer).is_none_or(|worker| worker.epoch != left.epoch) {
            return;
        }
        self.hand_over(peer);
        self.dispatch(now);
    }

    /// A worker is gone and nobody knows why, unless it was draining.
    fn lose(&mut self, peer: WorkerPeer, reason: &'static str) {
        let Some(worker) = self.workers.get(peer) else { return };
        if worker.draining {
            return self.hand_over(peer);
        }
        let Some(worker) = self.workers.remove(peer) else { return };
        self.residency.forget(peer);
        self.counters.workers_lost += 1;
        let keys = self.in_flight.remove_worker(peer);
        self.notice(Notice::WorkerLost {
            worker: worker.name.clone(),
            reason,
            in_flight: keys.len(),
        });
        for key in keys {
            self.requeue(key, Some(&worker));
        }
        self.registrations_lost(peer, &worker.name);
    }

    /// A worker leaves in peace: what it had goes to others without blame.
    fn hand_over(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.remove(peer) else { return };
        self.residency.forget(peer);
        let keys = self.in_flight.remove_worker(peer);
        let handed_over = keys.len();
        self.notice(Notice::WorkerLeft { worker: worker.name.clone(), handed_over });
        for key in keys {
            self.requeue(key, None);
        }
        self.registrations_lost(peer, &worker.name);
    }
}
