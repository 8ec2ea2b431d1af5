//! Messages of workers: announcing, living, answering and leaving.

use std::{collections::BTreeSet, time::Instant};

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, Header, InvalidHeader, ModelName,
    request::Heartbeat,
    worker::{
        Alive, Announce, CancelWork, Death, Disconnect, Done, Fetch, Inventory, Ready, Registered,
    },
};

use crate::{
    Broker,
    command::Notice,
    cost::Tier,
    in_flight::{Finished, Lost},
    peer::WorkerPeer,
    residency::Report,
    routing::LaneInfo,
    tasks::{Dispatched, TaskKey},
    workers::Worker,
};

/// How a worker was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Closed,
    Silent,
    OtherProcess,
    Replaced,
}

impl Loss {
    const fn reason(self) -> &'static str {
        match self {
            Self::Closed => "the connection closed",
            Self::Silent => "it was silent for too long",
            Self::OtherProcess => "another process announced itself on its connection",
            Self::Replaced => "a newer process has its name",
        }
    }

    /// Whether the process is gone: one that is silent may live behind a broken network.
    const fn is_death(self) -> bool {
        !matches!(self, Self::Silent)
    }
}

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
        self.lose(peer, Loss::Closed, now);
        self.dispatch(now);
    }

    pub(super) fn lose_silent_workers(&mut self, now: Instant) {
        for peer in self.workers.silent(self.limits().worker_silence, now) {
            self.lose(peer, Loss::Silent, now);
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
            Some(known) if known != peer => self.replace(known, peer, ready, now),
            _ => {}
        }
        if self.workers.get(peer).is_some_and(|known| known.epoch != ready.epoch) {
            self.lose_told(peer, Loss::OtherProcess, &ready.died_with, now);
        }
        let is_new = self.workers.get(peer).is_none();
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
        self.workers.insert(peer, Worker { refused, ..worker }, now);
        self.apply_registrations(peer);
        self.repeat_order(peer);
        let process = (ready.worker.clone(), ready.epoch);
        self.strikes.acquit(&process);
        self.deaths.revive(&process);
        self.record_deaths(&ready.worker, &ready.died_with, now);
        self.route_to(peer);
        self.record_inventory(peer, ready.revision, ready.inventory.clone());
        self.note_draining(peer, ready.draining, None, now);
        self.reconcile(peer, &ready.in_flight, now);
        self.call_off(peer, &ready.in_flight);
        self.tell(peer, &Heartbeat {});
        self.ask_for_missing(peer);
        self.dispatch(now);
    }

    /// Makes a worker known to routing, with the models that it serves.
    fn route_to(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.get(peer) else { return };
        for model in &worker.models {
            self.answers.forget_others(&model.name, model.digest);
        }
        let models: Vec<_> = worker.models.iter().cloned().collect();
        let Worker { name, slots, draining, .. } = worker;
        let info = LaneInfo { name, models: &models, slots: *slots, draining: *draining };
        self.routes.insert(peer, info);
        self.routes.set_health(peer, self.outliers.health(peer));
        self.routes.set_kept(peer, self.isolation.is_kept(peer));
    }

    /// Takes in what a worker holds. What work in hand needs is being loaded, listed or not.
    fn record_inventory(&mut self, peer: WorkerPeer, revision: u64, inventory: Inventory) {
        let tasks = self.in_flight.of_worker(peer).filter_map(|(_, key)| self.tasks.get(key));
        let expected: Vec<AdapterId> = tasks.flat_map(|task| &task.adapters).copied().collect();
        self.routes.set_inventory(peer, &inventory, expected);
        self.residency.record(peer, Report::new(revision, inventory));
        self.note_prefetched(peer);
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
            self.registrations_lost(old, &ready.worker);
            self.outliers.rename(old, new);
            self.isolation.rename(old, new);
            self.workers.remove(old);
            self.routes.remove(old);
            self.residency.forget(old);
            self.prefetches.forget(old);
            self.drains.forget(old);
        } else {
            self.lose_told(old, Loss::Replaced, &ready.died_with, now);
        }
        self.workers.supersede(old);
    }

    fn worker_alive(&mut self, peer: WorkerPeer, alive: Alive, now: Instant) {
        let Some(worker) = self.workers.get_mut(peer) else { return };
        if worker.epoch != alive.epoch {
            return self.tell(peer, &Announce {});
        }
        let drained = worker.draining;
        match alive.inventory {
            Some(inventory) => self.record_inventory(peer, alive.revision, inventory),
            None if !self.residency.is_current(peer, alive.revision, alive.resident_digest) => {
                self.tell(peer, &Announce {});
            }
            None => {}
        }
        let told_before = now.checked_sub(self.limits().dispatch_lost);
        self.prefetches.confirm(peer, &alive.prefetching, told_before, now);
        self.note_draining(peer, alive.draining, alive.drain_reason, now);
        self.reconcile(peer, &alive.in_flight, now);
        self.tell(peer, &Heartbeat {});
        if drained && self.workers.get(peer).is_some_and(|worker| !worker.draining) {
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
    fn lose(&mut self, peer: WorkerPeer, how: Loss, now: Instant) {
        self.lose_told(peer, how, &[], now);
    }

    /// A worker is gone, and its next process may tell what it was busy with.
    fn lose_told(&mut self, peer: WorkerPeer, how: Loss, told: &[Death], now: Instant) {
        let Some(worker) = self.workers.get(peer) else { return };
        if worker.draining {
            return self.hand_over(peer);
        }
        let Some(worker) = self.workers.remove(peer) else { return };
        self.forget_worker(peer);
        self.counters.workers_lost += 1;
        let lost = self.in_flight.remove_worker(peer);
        self.notice(Notice::WorkerLost {
            worker: worker.name.clone(),
            reason: how.reason(),
            in_flight: lost.len(),
        });
        let process = (worker.name.clone(), worker.epoch);
        self.deaths.lose(process, lost.iter().map(|lost| lost.digest).collect());
        let told = told.iter().find(|death| death.epoch == worker.epoch);
        for lost in lost {
            let busy = told.map(|told| told.busy_with.iter().any(|busy| busy.key == lost.digest));
            if busy == Some(false) {
                if let Some(task) = lost.task {
                    self.retry(task, now);
                }
                continue;
            }
            let alone = lost.alone && how.is_death();
            self.retry_suspect(Lost { alone, ..lost }, &worker, now);
        }
        self.registrations_lost(peer, &worker.name);
    }

    /// A worker leaves in peace: what it had goes to others without blame.
    fn hand_over(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.remove(peer) else { return };
        self.forget_worker(peer);
        let lost = self.in_flight.remove_worker(peer);
        let keys: Vec<_> = lost.into_iter().filter_map(|lost| lost.task).collect();
        let handed_over = keys.len();
        self.notice(Notice::WorkerLeft { worker: worker.name.clone(), handed_over });
        for key in keys {
            self.requeue(key);
        }
        self.registrations_lost(peer, &worker.name);
    }

    fn forget_worker(&mut self, peer: WorkerPeer) {
        self.residency.forget(peer);
        self.prefetches.forget(peer);
        self.drains.forget(peer);
        self.routes.remove(peer);
        self.outliers.forget(peer);
        self.isolation.release(peer);
    }
}
