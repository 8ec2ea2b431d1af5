//! The way of an encode: admitted, queued, given to a worker.
//!
//! ```text
//!           ┌─ equal one finished ──▶ answered from the cache
//! encode ───┼─ equal one under way ─▶ waits for the same task
//!           └─▶ Queued ── dispatch ──▶ InFlight ── done ──▶ answered
//!                 ▲  │                  │  │
//!                 │  └─ refused ─▶ …    │  └─ nobody waits, too many losses ──▶ …
//!                 └──── worker lost ────┘
//! ```

use std::{collections::BTreeSet, time::Instant};

use protocol::{
    AdapterId, Envelope, ErrorCode, Failure, ModelDigest, ModelName, RequestDigest, frames, limits,
    worker::{CancelWork, Work},
};

use super::{micros, millis, suspects::Suspicion};
use crate::{
    Broker,
    answers::{Tenant, meaning},
    blobs::BlobIndex,
    command::Command,
    cost::Shape,
    encode::EncodeHead,
    in_flight::{Estimate, Given},
    peer::{ClientPeer, WorkerPeer},
    queue::{Entry, QueueFull, QueueLimits},
    requests::{ReplyTo, Request, RequestKey, expired},
    routing::{Ask, Decision, Needed},
    tasks::{Dispatched, Parked, Task, TaskKey},
    workers::{Standing, Worker},
};

/// What is to be done with a task that waits.
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
        let head = EncodeHead::read(envelope)?;
        let budget_ms = head.budget_ms.unwrap_or_else(|| millis(self.limits().budget_default));
        let budget_ms = u64::from(budget_ms.min(limits::BUDGET_MS_MAX));
        let budget = std::time::Duration::from_millis(budget_ms);
        if budget.is_zero() {
            return Err(expired(budget, "arriving"));
        }
        let task = task(from, head, envelope, now);
        let verdict = self.verdict(&task);
        if let Verdict::Refuse(failure) = verdict {
            return Err(failure);
        }
        self.check_quarantine(&task.digest, now)?;
        if matches!(verdict, Verdict::Ready) && self.answer_from_cache(from, &task, now) {
            return Ok(());
        }
        for adapter in &task.adapters {
            self.blobs.touch(adapter);
        }
        let request = |task| Request { reply_to: from.clone(), task, received: now, budget };
        let equal = self.tasks.equal_to(&task.digest).filter(|_| task.is_shared);
        if let Some(equal) = equal {
            self.check_followers()?;
            self.join(equal, request(equal));
            return Ok(());
        }
        let entry = self.entry(&task, from.client);
        self.admit(&entry, budget, now)?;
        self.counters.accepted += 1;
        let task = self.tasks.insert(task);
        let key = self.requests.insert(request(task));
        self.enqueue(task, entry, key);
        self.dispatch(now);
        Ok(())
    }

    /// Gives workers what they have room for, in the order of the queue.
    pub(super) fn dispatch(&mut self, now: Instant) {
        self.expire_requests(now);
        self.tend_suspects(now);
        let mut next = self.queue.next_model(None);
        while let Some(model) = next {
            self.dispatch_model(&model, now);
            next = self.queue.next_model(Some(&model));
        }
    }

    /// Every event comes here, so a long queue must cost little: nothing is looked at while no
    /// worker of the model has room, and what waits for a certain worker is passed over.
    fn dispatch_model(&mut self, model: &ModelName, now: Instant) {
        let mut last = None;
        while self.routes.has_room(model) {
            let Some(place) = self.queue.next(model, last) else { break };
            last = Some(place);
            self.try_dispatch(place.1, now);
        }
        self.routes.clear_pledges();
    }

    fn try_dispatch(&mut self, key: TaskKey, now: Instant) {
        let Some(task) = self.tasks.get(key) else { return };
        if let Some(Parked { peer, work_us, until }) = task.parked
            && now < until
            && self.routes.is_worth_waiting(peer)
        {
            return self.routes.pledge(peer, work_us);
        }
        match self.verdict(task) {
            Verdict::Ready => {}
            Verdict::Wait => return,
            Verdict::Refuse(failure) => return self.fail_task(key, &failure),
        }
        match self.suspicion(key, now) {
            Suspicion::None => {}
            Suspicion::Busy => return,
            Suspicion::Last => return self.isolate(key, now),
            Suspicion::Proved(failure) => return self.fail_task(key, &failure),
        }
        let Some((decision, estimate)) = self.decide(key, now) else { return };
        if decision.free {
            self.send_work(key, decision, estimate, now);
        } else if let Some(task) = self.tasks.get_mut(key) {
            let (peer, work_us) = (decision.peer, estimate.work_us);
            task.parked = Some(Parked { peer, work_us, until: now + Parked::PATIENCE });
            self.routes.pledge(peer, work_us);
        }
    }

    /// The worker that a task goes to or waits for. One that has a slot free is to be given it.
    pub(super) fn decide(&mut self, key: TaskKey, now: Instant) -> Option<(Decision, Estimate)> {
        let task = self.tasks.get(key)?;
        let adapters = needed(&self.blobs, &task.adapters);
        let died = self.strikes.died(&task.digest, now);
        let died_here = |(name, epoch): &(_, _)| {
            let mut workers = self.workers.iter();
            let same = |(_, worker): &(_, &Worker)| worker.name == *name && worker.epoch == *epoch;
            workers.find(same).map(|(peer, _)| peer)
        };
        let died_on: Vec<WorkerPeer> = died.filter_map(died_here).collect();
        let ask = Ask {
            shape: &task.shape,
            digest: task.model_digest,
            adapters: &adapters,
            died_on: &died_on,
            number: key.number(),
        };
        let now_us = micros(now.saturating_duration_since(self.started));
        let decision = self.routes.decide(&ask, &self.costs, now_us)?;
        let loading = self.routes.loading(&decision, &adapters);
        if decision.free {
            self.routes.given(decision.peer, &ask);
        }
        Some((decision, Estimate { work_us: decision.score.work(), loading }))
    }

    pub(super) fn send_work(
        &mut self,
        key: TaskKey,
        decision: Decision,
        estimate: Estimate,
        now: Instant,
    ) {
        let peer = decision.peer;
        let due = self.due(key).unwrap_or(now);
        self.queue.take(key);
        let alone = self.isolation.is_kept(peer);
        let task = self.tasks.get_mut(key).expect("what waits is known");
        let given = Given { task: key, digest: task.digest, alone, estimate };
        let dispatch = self.in_flight.begin(peer, given, now);
        if task.attempts == 0 {
            self.retries.earn();
        }
        task.attempts += 1;
        task.parked = None;
        task.dispatched = Some(Dispatched { peer, dispatch, due });
        for adapter in &task.adapters {
            self.heat.touch(*adapter, &task.shape.model, now);
        }
        let work = Work {
            dispatch,
            attempt: task.attempts,
            queued_ms: millis(now.saturating_duration_since(task.received)),
            budget_ms: millis(due.saturating_duration_since(now)),
            key: Some(task.digest),
            alone,
        };
        let frames = frames::frames(&work, task.payload.clone());
        self.commands.push_back(Command::SendWorker { to: peer, frames });
        self.refresh_busy(peer);
    }

    /// Tells routing what a worker has in hand.
    pub(super) fn refresh_busy(&mut self, peer: WorkerPeer) {
        self.routes.set_busy(peer, self.in_flight.busy(peer, self.started));
    }

    /// When the last answer of a task is due.
    pub(super) fn due(&self, key: TaskKey) -> Option<Instant> {
        let waiting = &self.tasks.get(key)?.waiting;
        waiting.iter().filter_map(|&request| Some(self.requests.get(request)?.deadline())).max()
    }

    /// Answers what nobody will ever do, now that the farm has come together.
    pub(super) fn refuse_hopeless(&mut self) {
        let waiting: Vec<_> = self.queue.keys().collect();
        for key in waiting {
            let verdict = self.tasks.get(key).map(|task| self.verdict(task));
            if let Some(Verdict::Refuse(failure)) = verdict {
                self.fail_task(key, &failure);
            }
        }
    }

    /// Takes a request back, unanswered. Its task goes on if somebody else waits for it.
    pub(super) fn withdraw(&mut self, key: RequestKey) -> Option<Request> {
        let request = self.requests.remove(key)?;
        let Some(task) = self.tasks.get_mut(request.task) else { return Some(request) };
        task.waiting.remove(&key);
        match task.waiting.first().copied() {
            None => drop(self.drop_task(request.task)),
            Some(heir) => self.bequeath(request.task, request.reply_to.client, heir),
        }
        Some(request)
    }

    /// What a client had asked for waits on behalf of the next one who asked for it.
    fn bequeath(&mut self, task: TaskKey, from: ClientPeer, heir: RequestKey) {
        let Some(heir) = self.requests.get(heir).map(|heir| heir.reply_to.client) else { return };
        if heir == from || self.queue.owner(task) != Some(from) {
            return;
        }
        if let Some(entry) = self.queue.remove(task) {
            let start = self.queue.insert(task, Entry { client: heir, start: None, ..entry });
            if let Some(task) = self.tasks.get_mut(task) {
                task.start = Some(start);
            }
        }
    }

    /// Stops computing what nobody waits for.
    pub(super) fn drop_task(&mut self, key: TaskKey) -> Option<Task> {
        let task = self.tasks.remove(key)?;
        self.queue.remove(key);
        if let Some(Dispatched { peer, dispatch, .. }) = task.dispatched {
            self.in_flight.abandon(peer, dispatch);
            self.tell(peer, &CancelWork { dispatch });
        }
        Some(task)
    }

    pub(super) fn expire_requests(&mut self, now: Instant) {
        for key in self.requests.expired(now) {
            self.expire(key);
        }
    }

    fn expire(&mut self, key: RequestKey) {
        let task = self.requests.get(key).and_then(|request| self.tasks.get(request.task));
        let dispatched = task.and_then(|task| task.dispatched);
        let why = task.and_then(|task| self.why_nobody(&task.shape.model));
        let Some(request) = self.withdraw(key) else { return };
        let worker = dispatched.and_then(|dispatched| self.workers.get(dispatched.peer));
        let failure = if let Some(worker) = worker {
            request.expired(&format!("at worker `{}`", worker.name))
        } else {
            let why = why.map(|why| format!(": {why}")).unwrap_or_default();
            request.expired(&format!("waiting for a worker{why}"))
        };
        self.counters.failed += 1;
        self.fail(&request.reply_to, failure);
    }

    /// Refuses a request that would wait longer than the queue or its own budget allows.
    fn admit(
        &mut self,
        entry: &Entry,
        budget: std::time::Duration,
        now: Instant,
    ) -> Result<(), Failure> {
        let now_us = micros(now.saturating_duration_since(self.started));
        let (workers, soonest_us) = self.routes.capacity(&entry.model, now_us);
        let limits = self.queue_limits();
        let admitted = self.queue.admit(entry, limits, workers);
        admitted.map_err(|full: QueueFull| {
            let room_us = self.queue.room_us(entry, limits, workers);
            let why = self.why_nobody(&entry.model).map(|why| format!("; {why}"));
            let reason = format!("{full}{}", why.unwrap_or_default());
            self.full(&reason, (workers > 0).then_some(room_us))
        })?;
        if workers == 0 {
            return Ok(()); // Nobody knows how long it takes until a worker comes.
        }
        let queued_us = self.queue.wait_us(&entry.model, entry.client, workers);
        let wait_us = soonest_us.saturating_add(queued_us);
        let budget_us = micros(budget);
        if wait_us > budget_us {
            let reason = format!(
                "it would wait for about {} ms, which is more than its budget of {} ms",
                wait_us / 1000,
                budget.as_millis()
            );
            return Err(self.full(&reason, Some(wait_us - budget_us)));
        }
        Ok(())
    }

    /// The answer when the farm is full; there is room again after about `room_us`.
    pub(super) fn full(&mut self, reason: &str, room_us: Option<u64>) -> Failure {
        self.counters.refused_overload += 1;
        let Some(room_us) = room_us else { return self.overloaded(reason) };
        let retry_after_ms = u32::try_from(room_us / 1000).unwrap_or(u32::MAX);
        let retry_after_ms = retry_after_ms.clamp(RETRY_MS_MIN, RETRY_MS_MAX);
        overloaded(reason, retry_after_ms)
    }

    pub(super) fn overloaded(&self, reason: &str) -> Failure {
        overloaded(reason, millis(self.limits().retry_after))
    }

    fn queue_limits(&self) -> QueueLimits {
        let limits = self.limits();
        QueueLimits {
            count: limits.queued_max,
            bytes: limits.queued_bytes_max,
            us_per_worker: self.settled.then(|| micros(limits.queued_time_max)),
        }
    }

    /// How a task waits.
    pub(super) fn entry(&self, task: &Task, client: ClientPeer) -> Entry {
        Entry {
            model: task.shape.model.clone(),
            client,
            cost_us: self.costs.compute_us(&task.shape),
            bytes: task.bytes(),
            start: task.start,
        }
    }

    fn enqueue(&mut self, key: TaskKey, entry: Entry, request: RequestKey) {
        let start = self.queue.insert(key, entry);
        let task = self.tasks.get_mut(key).expect("it was just inserted");
        task.start = Some(start);
        task.waiting.insert(request);
    }

    /// Whether the task can be done now, later or never.
    fn verdict(&self, task: &Task) -> Verdict {
        let (model, digest) = (&task.shape.model, task.model_digest);
        let served = self.routes.serves(model, digest);
        if served && task.adapters.iter().all(|adapter| self.blobs.contains(adapter)) {
            return Verdict::Ready;
        }
        match self.workers.standing(model, digest) {
            Standing::Away | Standing::OtherDigest(_) | Standing::Unknown if !self.settled => {
                Verdict::Wait
            }
            Standing::Served | Standing::Away => self.adapters_verdict(task),
            Standing::OtherDigest(known) => Verdict::Refuse(other_digest(model, digest, &known)),
            Standing::Unknown => Verdict::Refuse(self.unknown_model(model)),
        }
    }

    /// The verdict once the model is known: can its workers get every adapter?
    fn adapters_verdict(&self, task: &Task) -> Verdict {
        let unstored = || task.adapters.iter().filter(|adapter| !self.blobs.contains(adapter));
        let Some(first) = unstored().next() else {
            let served = self.routes.serves(&task.shape.model, task.model_digest);
            return if served { Verdict::Ready } else { Verdict::Wait };
        };
        let holds =
            |worker: WorkerPeer| unstored().all(|adapter| self.routes.holds(worker, adapter));
        let serves = |worker: &Worker| worker.serves(&task.shape.model, task.model_digest);
        if self.workers.iter().any(|(peer, worker)| serves(worker) && holds(peer)) {
            return Verdict::Ready;
        }
        if !self.settled {
            return Verdict::Wait;
        }
        let unknown = unstored().find(|adapter| !self.is_known(adapter)).unwrap_or(first);
        Verdict::Refuse(unknown_lora(unknown))
    }

    pub(super) fn unknown_model(&self, model: &ModelName) -> Failure {
        if self.workers.first_ready().is_none() {
            return self.overloaded("no worker has announced itself since the broker started");
        }
        let known: Vec<_> = self.workers.known_models().map(|name| format!("`{name}`")).collect();
        let known = if known.is_empty() { "no model".to_owned() } else { known.join(", ") };
        let message = format!("no worker serves model `{model}`: the farm serves {known}");
        Failure::new(ErrorCode::UnknownModel, message)
    }
}

/// Advice on when to try again is at least and at most this.
const RETRY_MS_MIN: u32 = 10;
const RETRY_MS_MAX: u32 = 10_000;

/// The task of a request, which nobody waits for yet.
fn task(from: &ReplyTo, head: EncodeHead, envelope: &Envelope, now: Instant) -> Task {
    let (digest, is_map): (RequestDigest, bool) =
        meaning(Tenant::ONLY, &envelope.header, &envelope.attachments);
    let mut payload = Vec::with_capacity(1 + envelope.attachments.len());
    payload.push(envelope.header.clone());
    payload.extend(envelope.attachments.iter().cloned());
    let adapters = head.adapters();
    Task {
        digest,
        is_shared: is_map && !head.no_cache,
        payload_id: from.id.clone(),
        payload,
        shape: Shape { chunks: head.chunks(), stack: !adapters.is_empty(), model: head.model },
        model_digest: head.model_digest,
        adapters,
        received: now,
        waiting: BTreeSet::new(),
        start: None,
        attempts: 0,
        dispatched: None,
        parked: None,
    }
}

/// What routing must know of adapters.
pub(super) fn needed<'a>(
    blobs: &BlobIndex,
    adapters: impl IntoIterator<Item = &'a AdapterId>,
) -> Vec<Needed> {
    let size = |adapter| blobs.get(adapter).map(|blob| blob.bytes);
    let adapters = adapters.into_iter();
    adapters.map(|a| Needed { adapter: *a, stored_bytes: size(a) }).collect()
}

fn overloaded(reason: &str, retry_after_ms: u32) -> Failure {
    let message = format!("{reason}; try again in {retry_after_ms} ms");
    let failure = Failure::new(ErrorCode::Overloaded, message);
    Failure { retry_after_ms: Some(retry_after_ms), ..failure }
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

pub(super) fn unknown_lora(adapter: &AdapterId) -> Failure {
    let message = format!("the farm does not hold adapter `{adapter}`: upload it first");
    Failure::new(ErrorCode::UnknownLora, message)
}
