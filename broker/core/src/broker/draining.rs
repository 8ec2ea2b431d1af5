//! Workers and a broker that take nothing new: on an operator's order or because they stop.
//!
//! What a draining worker alone has in memory, and what was used lately of that, goes to the
//! workers that requests for it would go to next. When they have it, the worker is told that
//! nothing but work in hand keeps it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use protocol::{
    AdapterId, ErrorCode, Failure, ModelName, WorkerName, limits,
    reply::DrainReply,
    request::Drain,
    worker::{DrainWorker, Released},
};

use crate::{Broker, command::Notice, peer::WorkerPeer, requests::ReplyTo, workers::Worker};

/// What was used within this time is handed over.
const HOT: Duration = Duration::from_mins(10);

/// Adapters that one worker hands over; those used last.
const HANDED_OVER_MAX: usize = 64;

/// The reason of an operator who gives none.
const NO_REASON: &str = "an operator drains it";

impl Broker {
    /// An operator has a worker or this broker drain, or serve again.
    pub(super) fn drain_on_order(
        &mut self,
        from: &ReplyTo,
        request: Drain,
        now: Instant,
    ) -> Result<(), Failure> {
        let Drain { worker, reason, undo, .. } = request;
        let reason = reason.unwrap_or_else(|| NO_REASON.to_owned());
        if reason.len() > limits::REASON_BYTES_MAX {
            let (bytes, max) = (reason.len(), limits::REASON_BYTES_MAX);
            let message = format!("`reason` has {bytes} bytes: at most {max} are accepted");
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        let in_flight = match &worker {
            Some(worker) if undo => self.undo_drain_of(worker, now)?,
            Some(worker) => self.order_drain_of(worker, reason, now)?,
            None => {
                self.drain_broker((!undo).then_some(reason))?;
                self.in_flight.wanted()
            }
        };
        let in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
        let id = from.id.clone();
        self.reply(from, &DrainReply { id, worker, draining: !undo, in_flight });
        self.dispatch(now);
        Ok(())
    }

    /// A worker says whether it drains, and why; an operator's order stands above that.
    pub(super) fn note_draining(
        &mut self,
        peer: WorkerPeer,
        draining: bool,
        reason: Option<String>,
        now: Instant,
    ) {
        let Some(worker) = self.workers.get_mut(peer) else { return };
        let ordered = self.drains.ordered(&worker.name, worker.epoch).map(str::to_owned);
        let reason = ordered.or_else(|| {
            reason.filter(|reason| draining && reason.len() <= limits::REASON_BYTES_MAX)
        });
        let draining = draining || reason.is_some();
        let changes = worker.draining != draining;
        worker.draining = draining;
        worker.drain_reason.clone_from(&reason);
        if changes {
            let worker = worker.name.clone();
            self.notice(Notice::WorkerDraining { worker, draining, reason });
        }
        self.routes.set_draining(peer, draining);
        if changes && draining {
            self.prefetches.forget(peer); // It gives up what nobody needs.
        }
        if !draining {
            self.drains.forget(peer);
        } else if changes || !self.drains.peers().any(|known| known == peer) {
            self.begin_handover(peer, now);
        }
        self.release(peer);
    }

    /// Tells draining workers that may leave by now.
    pub(super) fn release_drained(&mut self) {
        for peer in self.drains.peers().collect::<Vec<_>>() {
            self.release(peer);
        }
    }

    /// Tells a new connection of a process what an operator ordered.
    pub(super) fn repeat_order(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.get(peer) else { return };
        let reason = self.drains.ordered(&worker.name, worker.epoch).map(str::to_owned);
        if let Some(reason) = reason {
            self.tell(peer, &DrainWorker { reason: Some(reason), undo: false });
        }
    }

    /// Why a request for `model` waits although workers serve it: all of them drain.
    pub(super) fn why_nobody(&self, model: &ModelName) -> Option<String> {
        let workers = || self.workers.iter().filter(|(_, worker)| worker.serves(model, None));
        if workers().next().is_none() || workers().any(|(_, worker)| !worker.draining) {
            return None;
        }
        let mut draining: Vec<_> = workers().map(|(_, worker)| worker.describe_drain()).collect();
        draining.sort_unstable();
        Some(format!("every worker that serves `{model}` drains: {}", draining.join(", ")))
    }

    fn order_drain_of(
        &mut self,
        name: &WorkerName,
        reason: String,
        now: Instant,
    ) -> Result<usize, Failure> {
        let (peer, worker) = self.find_worker(name)?;
        let epoch = worker.epoch;
        self.drains.order(name.clone(), epoch, reason.clone());
        self.tell(peer, &DrainWorker { reason: Some(reason.clone()), undo: false });
        self.note_draining(peer, true, Some(reason), now);
        Ok(self.in_flight.load(peer))
    }

    fn undo_drain_of(&mut self, name: &WorkerName, now: Instant) -> Result<usize, Failure> {
        let (peer, _) = self.find_worker(name)?;
        self.drains.undo(name);
        self.tell(peer, &DrainWorker { reason: None, undo: true });
        self.note_draining(peer, false, None, now);
        self.ask_for_missing(peer);
        Ok(self.in_flight.load(peer))
    }

    /// Takes nothing new for `reason`, or takes requests again.
    fn drain_broker(&mut self, reason: Option<String>) -> Result<(), Failure> {
        if self.stopping {
            if reason.is_some() {
                return Ok(());
            }
            let message = "the broker was told to stop and ends soon: start it again instead";
            return Err(Failure::new(ErrorCode::InvalidRequest, message));
        }
        if reason.is_some() {
            self.answer_all_warms();
        }
        self.draining.clone_from(&reason);
        self.notice(Notice::BrokerDraining { reason });
        Ok(())
    }

    fn find_worker(&self, name: &WorkerName) -> Result<(WorkerPeer, &Worker), Failure> {
        let peer = self.workers.named(name);
        let found = peer.and_then(|peer| Some((peer, self.workers.get(peer)?)));
        found.ok_or_else(|| {
            let mut known: Vec<_> =
                self.workers.iter().map(|(_, worker)| format!("`{}`", worker.name)).collect();
            known.sort_unstable();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let message = format!("there is no worker `{name}`: the farm has {known}");
            Failure::new(ErrorCode::InvalidRequest, message)
        })
    }

    /// Has other workers fetch what requests will miss when this one is gone.
    fn begin_handover(&mut self, leaving: WorkerPeer, now: Instant) {
        let mut handed_over = BTreeSet::new();
        if self.draining.is_none() {
            for (adapter, model) in self.hot_alone(leaving, now) {
                let model = model.or_else(|| self.most_served());
                if model.is_some_and(|model| self.pass_on(adapter, &model, leaving, now)) {
                    handed_over.insert(adapter);
                }
            }
        }
        let name = self.workers.get(leaving).map(|worker| worker.name.clone());
        if let Some(worker) = name.filter(|_| !handed_over.is_empty()) {
            self.notice(Notice::HandingOver { worker, adapters: handed_over.len() });
        }
        self.drains.hand_over(leaving, handed_over);
    }

    /// What a worker alone has in memory and was used lately, the last used first, with the model
    /// that it was used with. Of the time before the broker's start nothing is known: it counts as
    /// the moment of the start.
    fn hot_alone(&self, leaving: WorkerPeer, now: Instant) -> Vec<(AdapterId, Option<ModelName>)> {
        let stays = |peer: WorkerPeer| {
            peer != leaving && self.workers.get(peer).is_some_and(|worker| !worker.draining)
        };
        let Some(report) = self.residency.report(leaving) else { return Vec::new() };
        let alone =
            report.in_memory().filter(|adapter| !self.residency.holders(adapter).any(stays));
        let used = alone.map(|adapter| {
            let last = self.heat.last(adapter);
            (last.map_or(self.started, |last| last.at), *adapter, last)
        });
        let mut hot: Vec<_> = used.filter(|(at, ..)| *at + HOT > now).collect();
        hot.sort_by(|(a, ..), (b, ..)| b.cmp(a));
        let hot = hot.into_iter().take(HANDED_OVER_MAX);
        hot.map(|(_, adapter, last)| (adapter, last.map(|last| last.model.clone()))).collect()
    }

    fn release(&mut self, peer: WorkerPeer) {
        let prefetches = &self.prefetches;
        if self.drains.is_released(peer, |adapter| prefetches.fetchers(adapter).next().is_some()) {
            self.tell(peer, &Released {});
        }
    }
}
