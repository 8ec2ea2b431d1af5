//! The way of an encode: admitted, queued, given to a worker, answered.
//!
//! ```text
//! encode ──▶ Queued ── dispatch ──▶ InFlight ── done ──▶ answered
//!              ▲  │                  │  │
//!              │  └─ refused ─▶ …    │  └─ expired, cancelled, too many losses ──▶ answered
//!              └──── worker lost ────┘
//! ```

use std::{collections::BTreeSet, time::Instant};

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, Failure, ModelDigest, ModelName, frames, limits,
    worker::{CancelWork, Work},
};

use super::millis;
use crate::{
    Broker,
    command::Command,
    encode::EncodeHead,
    peer::WorkerPeer,
    queue::QueueFull,
    requests::{ReplyTo, Request, RequestKey},
    routing::{self, Candidate},
    workers::{Standing, Worker},
};

/// What is to be done with a request that waits.
enum Verdict {
    /// A worker can do it.
    Ready,
    /// A worker may come that can.
    Wait,
    /// It will not be done.
    Refuse(Failure),
}

impl Broker {
    /// Admits a request: from here on it is answered once, within its budget.
    pub(super) fn encode(
        &mut self,
        from: &ReplyTo,
        envelope: &Envelope,
        now: Instant,
    ) -> Result<(), Failure> {
        if let Some(reason) = &self.draining {
            return Err(self.overloaded(&format!("the broker is draining: {reason}")));
        }
        let request = self.request(from, envelope, now)?;
        if request.budget.is_zero() {
            return Err(request.expired("arriving"));
        }
        if let Verdict::Refuse(failure) = self.verdict(&request) {
            return Err(failure);
        }
        let bytes = request.bytes();
        let admitted = self.queue.admit(bytes);
        admitted.map_err(|full: QueueFull| self.overloaded(&full.to_string()))?;

        self.counters.accepted += 1;
        for adapter in &request.adapters {
            self.blobs.touch(adapter);
        }
        let key = self.requests.insert(request);
        self.queue.insert(key, bytes);
        self.dispatch(now);
        Ok(())
    }

    /// Gives workers what they have room for, in the order of arrival.
    pub(super) fn dispatch(&mut self, now: Instant) {
        let mut last = None;
        // Every event comes here, so a long queue for one model must cost little per request.
        let mut full: Vec<(ModelName, Option<ModelDigest>)> = Vec::new();
        while let Some(key) = self.queue.next(last) {
            last = Some(key);
            if !self.has_free_slot() {
                break;
            }
            let Some(request) = self.requests.get(key) else { continue };
            if request.deadline() <= now {
                self.expire(key);
                continue;
            }
            let (model, digest) = (&request.model, request.model_digest);
            if full.iter().any(|(name, asked)| name == model && *asked == digest) {
                continue;
            }
            if self.is_full(model, digest) {
                full.push((model.clone(), digest));
                continue;
            }
            match self.verdict(request) {
                Verdict::Ready => {
                    if let Some(peer) = routing::pick(&self.candidates(request)) {
                        self.send_work(key, peer, now);
                    }
                }
                Verdict::Wait => {}
                Verdict::Refuse(failure) => self.answer_failure(key, failure),
            }
        }
    }

    /// Answers what nobody will ever do, now that the farm has come together.
    pub(super) fn refuse_hopeless(&mut self) {
        let mut last = None;
        while let Some(key) = self.queue.next(last) {
            last = Some(key);
            let verdict = self.requests.get(key).map(|request| self.verdict(request));
            if let Some(Verdict::Refuse(failure)) = verdict {
                self.answer_failure(key, failure);
            }
        }
    }

    /// Forwards a worker's answer, unless nobody waits for it any more.
    pub(super) fn complete(&mut self, key: RequestKey, answer: Vec<Bytes>, failed: bool) {
        let Some(request) = self.requests.remove(key) else { return };
        let mut answer = answer.into_iter();
        let Some(header) = answer.next() else {
            let message = "the worker answered without a reply".to_owned();
            self.counters.failed += 1;
            return self.fail(&request.reply_to, Failure::new(ErrorCode::Internal, message));
        };
        if failed {
            self.counters.failed += 1;
        } else {
            self.counters.answered += 1;
        }
        self.reply_frames(&request.reply_to, frames::frames_of(header, answer.collect()));
    }

    /// Puts back what a worker had. With `blame`, the request may be the reason for the loss.
    pub(super) fn requeue(&mut self, key: RequestKey, blame: Option<&Worker>) {
        let losses_max = self.limits().losses_max;
        let Some(request) = self.requests.get_mut(key) else { return };
        request.dispatched = None;
        if let Some(worker) = blame {
            request.losses += 1;
            request.died_on.insert((worker.name.clone(), worker.epoch));
        }
        if request.losses >= losses_max {
            let failure = worker_lost(request);
            return self.answer_failure(key, failure);
        }
        let bytes = request.bytes();
        self.counters.requeued += 1;
        self.queue.insert(key, bytes);
    }

    /// Takes a request back from the queue or from its worker, unanswered.
    pub(super) fn withdraw(&mut self, key: RequestKey) -> Option<Request> {
        let request = self.requests.remove(key)?;
        self.queue.remove(key);
        if let Some((peer, dispatch)) = request.dispatched {
            self.in_flight.abandon(peer, dispatch);
            self.tell(peer, &CancelWork { dispatch });
        }
        Some(request)
    }

    pub(super) fn expire_requests(&mut self, now: Instant) {
        for key in self.requests.expired(now) {
            self.expire(key);
        }
    }

    /// Answers everything that is left, because the process ends.
    pub(super) fn answer_rest(&mut self, reason: &str) {
        for key in self.requests.pending() {
            let failure = self.overloaded(reason);
            self.answer_failure(key, failure);
        }
        for to in self.jobs.let_go() {
            let failure = self.overloaded(reason);
            self.fail(&to, failure);
        }
    }

    pub(super) fn overloaded(&self, reason: &str) -> Failure {
        let retry_after_ms = millis(self.limits().retry_after);
        let message = format!("{reason}; try again in {retry_after_ms} ms");
        Failure {
            retry_after_ms: Some(retry_after_ms),
            ..Failure::new(ErrorCode::Overloaded, message)
        }
    }

    fn request(
        &self,
        from: &ReplyTo,
        envelope: &Envelope,
        now: Instant,
    ) -> Result<Request, Failure> {
        let head = EncodeHead::read(envelope)?;
        let budget_ms = head.budget_ms.unwrap_or_else(|| millis(self.limits().budget_default));
        let mut payload = Vec::with_capacity(1 + envelope.attachments.len());
        payload.push(envelope.header.clone());
        payload.extend(envelope.attachments.iter().cloned());
        Ok(Request {
            reply_to: from.clone(),
            adapters: head.adapters(),
            model: head.model,
            model_digest: head.model_digest,
            payload,
            received: now,
            budget: std::time::Duration::from_millis(u64::from(
                budget_ms.min(limits::BUDGET_MS_MAX),
            )),
            attempts: 0,
            died_on: BTreeSet::new(),
            losses: 0,
            dispatched: None,
        })
    }

    fn send_work(&mut self, key: RequestKey, peer: WorkerPeer, now: Instant) {
        let dispatch = self.in_flight.begin(peer, key, now);
        self.queue.remove(key);
        self.dispatched += 1;
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.last_used = self.dispatched;
        }
        let request = self.requests.get_mut(key).expect("what waits is known");
        request.attempts += 1;
        request.dispatched = Some((peer, dispatch));
        let work = Work {
            dispatch,
            attempt: request.attempts,
            queued_ms: millis(now.saturating_duration_since(request.received)),
            budget_ms: millis(request.deadline().saturating_duration_since(now)),
            key: None,
        };
        let frames = frames::frames(&work, request.payload.clone());
        self.commands.push_back(Command::SendWorker { to: peer, frames });
    }

    fn expire(&mut self, key: RequestKey) {
        let Some(request) = self.withdraw(key) else { return };
        let worker = request.dispatched.and_then(|(peer, _)| self.workers.get(peer));
        let failure = match worker {
            Some(worker) => request.expired(&format!("at worker `{}`", worker.name)),
            None => request.expired("waiting for a worker"),
        };
        self.counters.failed += 1;
        self.fail(&request.reply_to, failure);
    }

    fn answer_failure(&mut self, key: RequestKey, failure: Failure) {
        if let Some(request) = self.withdraw(key) {
            self.counters.failed += 1;
            self.fail(&request.reply_to, failure);
        }
    }

    fn has_free_slot(&self) -> bool {
        let free = |(peer, worker): (WorkerPeer, &Worker)| {
            !worker.draining && self.in_flight.load(peer) < worker.slots
        };
        self.workers.iter().any(free)
    }

    /// Whether workers serve the model and none of them has room.
    fn is_full(&self, model: &ModelName, digest: Option<ModelDigest>) -> bool {
        let takes = |worker: &Worker| !worker.draining && worker.serves(model, digest);
        let mut serving = self.workers.iter().filter(|(_, worker)| takes(worker)).peekable();
        serving.peek().is_some()
            && serving.all(|(peer, worker)| self.in_flight.load(peer) >= worker.slots)
    }

    /// Whether the request can be done now, later or never.
    fn verdict(&self, request: &Request) -> Verdict {
        let Request { model, model_digest, .. } = request;
        match self.workers.standing(model, *model_digest) {
            Standing::Away | Standing::OtherDigest(_) | Standing::Unknown if !self.settled => {
                Verdict::Wait
            }
            Standing::Served | Standing::Away => self.adapters_verdict(request),
            Standing::OtherDigest(known) => {
                Verdict::Refuse(other_digest(model, *model_digest, &known))
            }
            Standing::Unknown => Verdict::Refuse(self.unknown_model(model)),
        }
    }

    /// The verdict once the model is known: can its workers get every adapter?
    fn adapters_verdict(&self, request: &Request) -> Verdict {
        let unstored = || request.adapters.iter().filter(|adapter| !self.blobs.contains(adapter));
        let Some(first) = unstored().next() else {
            let standing = self.workers.standing(&request.model, request.model_digest);
            return if standing == Standing::Served { Verdict::Ready } else { Verdict::Wait };
        };
        if self.workers.iter().any(|(peer, worker)| self.is_able(peer, worker, request)) {
            return Verdict::Ready;
        }
        if !self.settled {
            return Verdict::Wait;
        }
        let unknown = unstored().find(|adapter| !self.is_known(adapter)).unwrap_or(first);
        Verdict::Refuse(unknown_lora(unknown))
    }

    /// Whether a worker serves the request's model and holds or can fetch all its adapters.
    fn is_able(&self, peer: WorkerPeer, worker: &Worker, request: &Request) -> bool {
        let available = |adapter: &AdapterId| {
            self.blobs.contains(adapter) || self.residency.holds(peer, adapter)
        };
        worker.serves(&request.model, request.model_digest)
            && request.adapters.iter().all(available)
    }

    fn candidates(&self, request: &Request) -> Vec<Candidate> {
        let candidate = |(peer, worker): (WorkerPeer, &Worker)| Candidate {
            peer,
            able: self.is_able(peer, worker, request),
            draining: worker.draining,
            died_here: request
                .died_on
                .iter()
                .any(|(name, epoch)| *name == worker.name && *epoch == worker.epoch),
            load: self.in_flight.load(peer),
            slots: worker.slots,
            holds: request.adapters.iter().filter(|a| self.residency.holds(peer, a)).count(),
            last_used: worker.last_used,
        };
        self.workers.iter().map(candidate).collect()
    }

    fn unknown_model(&self, model: &ModelName) -> Failure {
        if self.workers.first_ready().is_none() {
            return self.overloaded("no worker has announced itself since the broker started");
        }
        let known: Vec<_> = self.workers.known_models().map(|name| format!("`{name}`")).collect();
        let known = if known.is_empty() { "no model".to_owned() } else { known.join(", ") };
        let message = format!("no worker serves model `{model}`: the farm serves {known}");
        Failure::new(ErrorCode::UnknownModel, message)
    }
}

fn other_digest(
    model: &ModelName,
    asked: Option<ModelDigest>,
    known: &BTreeSet<ModelDigest>,
) -> Failure {
    let asked = asked.map(|digest| digest.to_string()).unwrap_or_default();
    let known: Vec<_> = known.iter().map(|digest| format!("`{digest}`")).collect();
    let message = format!(
        "model `{model}` does not have digest `{asked}` here: the farm serves {}",
        known.join(", ")
    );
    Failure::new(ErrorCode::UnknownModel, message)
}

fn unknown_lora(adapter: &AdapterId) -> Failure {
    let message = format!("the farm does not hold adapter `{adapter}`: upload it first");
    Failure::new(ErrorCode::UnknownLora, message)
}

fn worker_lost(request: &Request) -> Failure {
    let names: Vec<_> = request.died_on.iter().map(|(name, _)| format!("`{name}`")).collect();
    let message = format!(
        "{} workers were lost while they had the request ({}): it is not tried again",
        request.losses,
        names.join(", ")
    );
    Failure::new(ErrorCode::WorkerLost, message)
}
