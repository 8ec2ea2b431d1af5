//! Messages of workers: announcing, living, answering, fetching and leaving.

use std::{collections::BTreeSet, time::Instant};

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, Header, InvalidHeader,
    request::Heartbeat,
    worker::{Alive, Announce, Disconnect, Done, Fetch, Inventory, Ready},
};

use crate::{
    Broker,
    command::Notice,
    cost::Tier,
    in_flight::Finished,
    peer::WorkerPeer,
    residency::Report,
    routing::LaneInfo,
    tasks::{Dispatched, TaskKey},
    workers::Worker,
};

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
        self.lose(peer, "the connection closed", now);
        self.dispatch(now);
    }

    pub(super) fn lose_silent_workers(&mut self, now: Instant) {
        for peer in self.workers.silent(self.limits().worker_silence, now) {
            self.lose(peer, "it was silent for too long", now);
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
            Disconnect::KIND => self.worker_left(peer, &envelope.read()?, now),
            kind => {
                let reason = format!("unknown kind `{kind:.80}`");
                self.notice(Notice::WorkerGarbage { peer, reason });
            }
        }
        Ok(())
    }

    fn worker_ready(&mut self, peer: WorkerPeer, ready: &Ready, now: Instant) {
        match self.workers.named(&ready.worker) {
            Some(known) if known != peer => self.replace(known, peer, ready, now),
            _ => {}
        }
        if self.workers.get(peer).is_some_and(|known| known.epoch != ready.epoch) {
            self.lose(peer, "another process announced itself on its connection", now);
        }
        let is_new = self.workers.get(peer).is_none();
        let worker = Worker::new(ready, self.limits().slots_max, now);
        if is_new {
            self.notice(Notice::WorkerReady {
                worker: worker.name.clone(),
                peer,
                slots: worker.slots,
                models: worker.models.len(),
            });
        }
        self.record_deaths(&worker.name, &ready.died_with, now);
        for model in &worker.models {
            self.answers.forget_others(&model.name, model.digest);
        }
        let info = LaneInfo {
            name: &worker.name,
            models: &ready.models,
            slots: worker.slots,
            draining: worker.draining,
        };
        self.routes.insert(peer, info);
        self.routes.set_health(peer, self.outliers.health(peer));
        self.workers.insert(peer, worker, now);
        self.record_inventory(peer, ready.revision, ready.inventory.clone());
        self.reconcile(peer, &ready.in_flight, now);
        self.tell(peer, &Heartbeat {});
        self.dispatch(now);
    }

    /// Takes in what a worker holds. What work in hand needs is being loaded, listed or not.
    fn record_inventory(&mut self, peer: WorkerPeer, revision: u64, inventory: Inventory) {
        let tasks = self.in_flight.of_worker(peer).filter_map(|(_, key)| self.tasks.get(key));
        let expected: Vec<AdapterId> = tasks.flat_map(|task| &task.adapters).copied().collect();
        self.routes.set_inventory(peer, &inventory, expected);
        self.residency.record(peer, Report::new(revision, inventory));
    }

    /// A worker of a known name announces itself on another connection.
    fn replace(&mut self, old: WorkerPeer, new: WorkerPeer, ready: &Ready, now: Instant) {
        if self.workers.get(old).is_some_and(|known| known.epoch == ready.epoch) {
            // The same process has reconnected: it keeps what it lists, the rest got lost.
            let listed: BTreeSet<_> = ready.in_flight.iter().copied().collect();
            let dispatches: Vec<_> = self.in_flight.of_worker(old).collect();
            for (dispatch, key) in dispatches {
                if listed.contains(&dispatch) {
                    let task = self.tasks.get_mut(key).expect("what is in flight is known");
                    task.dispatched = task.dispatched.map(|d| Dispatched { peer: new, ..d });
                } else {
                    self.in_flight.finish(old, dispatch, now);
                    self.retry(key, now);
                }
            }
            self.in_flight.move_worker(old, new);
            self.outliers.rename(old, new);
            self.workers.remove(old);
            self.routes.remove(old);
            self.residency.forget(old);
        } else {
            self.lose(old, "a newer process has its name", now);
        }
        self.workers.supersede(old);
    }

    fn worker_alive(&mut self, peer: WorkerPeer, alive: Alive, now: Instant) {
        let Some(worker) = self.workers.get_mut(peer) else { return };
        if worker.epoch != alive.epoch {
            return self.tell(peer, &Announce {});
        }
        if worker.draining != alive.draining {
            worker.draining = alive.draining;
            self.routes.set_draining(peer, alive.draining);
            let worker = worker.name.clone();
            self.notice(Notice::WorkerDraining { worker, draining: alive.draining });
        }
        match alive.inventory {
            Some(inventory) => self.record_inventory(peer, alive.revision, inventory),
            None if !self.residency.is_current(peer, alive.revision) => {
                self.tell(peer, &Announce {});
            }
            None => {}
        }
        self.reconcile(peer, &alive.in_flight, now);
        self.tell(peer, &Heartbeat {});
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
            self.worker_failed(peer, now);
            self.retry(key, now);
        }
        self.refresh_busy(peer);
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
            if let Some(finished) = self.in_flight.finish(peer, done.dispatch, now) {
                self.refresh_busy(peer);
                self.judge_answer(peer, &done, now);
                if let Some(key) = finished.task {
                    self.learn(peer, key, &finished, &done);
                    self.complete(key, peer, envelope.attachments, done.failed, now);
                }
            }
            self.dispatch(now);
        }
        Ok(())
    }

    /// Whether an answer speaks for or against the worker. Most errors are the request's fault.
    fn judge_answer(&mut self, peer: WorkerPeer, done: &Done, now: Instant) {
        match done.failed {
            None => self.worker_succeeded(peer),
            Some(ErrorCode::Internal) => self.worker_failed(peer, now),
            Some(_) => {}
        }
    }

    /// Learns what requests and loads cost from a request that succeeded.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn learn(&mut self, peer: WorkerPeer, key: TaskKey, finished: &Finished, done: &Done) {
        let Some(task) = self.tasks.get(key).filter(|_| done.failed.is_none()) else { return };
        let expected_us = self.costs.compute_us(&task.shape);
        let took_us = finished.service_us as f64;
        let is_time = |ms: &f64| ms.is_finite() && *ms >= 0.0;
        let is_measured = |us: &f64| *us >= 1.0;
        let told_us = done.compute_ms.filter(is_time).map(|ms| ms * 1000.0);
        let compute_us = told_us.or((!finished.loading.any).then_some(took_us));
        if let Some(us) = compute_us.filter(is_measured) {
            if let Some(average_us) = self.costs.observed_us(&task.shape) {
                self.routes.observe_speed(peer, us, average_us);
            }
            self.costs.observe_compute(&task.shape, us);
        }
        let load_us = done.load_ms.filter(is_time).map(|ms| ms * 1000.0);
        let rest_us = (took_us - told_us.unwrap_or(expected_us as f64)).max(0.0);
        if let Some((tier, bytes)) = finished.loading.from.filter(|(tier, _)| *tier > Tier::Device)
        {
            self.costs.observe_load(tier, bytes, load_us.unwrap_or(rest_us));
        }
    }

    fn worker_left(&mut self, peer: WorkerPeer, left: &Disconnect, now: Instant) {
        if self.workers.get(peer).is_none_or(|worker| worker.epoch != left.epoch) {
            return;
        }
        self.hand_over(peer);
        self.dispatch(now);
    }

    /// A worker is gone and nobody knows why, unless it was draining.
    fn lose(&mut self, peer: WorkerPeer, reason: &'static str, now: Instant) {
        let Some(worker) = self.workers.get(peer) else { return };
        if worker.draining {
            return self.hand_over(peer);
        }
        let Some(worker) = self.workers.remove(peer) else { return };
        self.forget_worker(peer);
        self.counters.workers_lost += 1;
        let keys = self.in_flight.remove_worker(peer);
        self.notice(Notice::WorkerLost {
            worker: worker.name.clone(),
            reason,
            in_flight: keys.len(),
        });
        for key in keys {
            self.retry_suspect(key, &worker, now);
        }
    }

    /// A worker leaves in peace: what it had goes to others without blame.
    fn hand_over(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.remove(peer) else { return };
        self.forget_worker(peer);
        let keys = self.in_flight.remove_worker(peer);
        self.notice(Notice::WorkerLeft { worker: worker.name, handed_over: keys.len() });
        for key in keys {
            self.requeue(key);
        }
    }

    fn forget_worker(&mut self, peer: WorkerPeer) {
        self.residency.forget(peer);
        self.routes.remove(peer);
        self.outliers.forget(peer);
    }
}
