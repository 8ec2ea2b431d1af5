//! A worker's process: the real scheduler, registry and fetches around a simulated executor.
//!
//! This is the one file of the simulator that knows how a worker core is driven; it does what
//! `worker/src/service.rs` does, with virtual time and without tensors.

use std::collections::BTreeMap;

use bytes::Bytes;
use protocol::{
    AdapterId, AdapterReceipt, Dtype, Envelope, ErrorCode, ErrorReply, ExecutionMode, Failure,
    Fidelity, Header, ModelName, Receipt, RequestId, TensorRef, Times, frames, header,
    reply::{ClipEncodeReply, ConditioningRef, ModelInfo},
    request::ClipEncode,
    worker::{
        Alive, Announce, Blob, CancelWork, Done, Evict, Fetch, Inventory, NoBlob, Ready, Work,
    },
};
use worker_core::{ChunkRequest, Command, DispatchId, Fetches, Progress, RunDispatch, Scheduler};

use crate::{
    catalog::{Catalog, answer},
    client::is_poison,
    dealer::Dealer,
    env::Env,
    event::{Connection, Inside, Node},
    mutant::Mutant,
    time::{Clock, Span, Time},
};

const HEARTBEAT: Span = Span::from_millis(500);

/// Requests that a worker takes at once.
const SLOTS: usize = 2;

/// A worker, dead or alive.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    index: usize,
    pub(crate) life: u32,
    running: Option<Running>,
}

/// A worker that lives.
#[derive(Debug)]
struct Running {
    owner: (Node, u32),
    epoch: u64,
    models: BTreeMap<ModelName, ModelInfo>,
    clock: Clock,
    armed: Option<Time>,
    dealer: Dealer,
    scheduler: Scheduler,
    fetches: Fetches,
    /// What the tensors that are kept under a name really are.
    tensors: BTreeMap<AdapterId, AdapterId>,
    work: BTreeMap<DispatchId, Item>,
    /// What the executor has, with the tensors that it was given.
    executing: Option<(DispatchId, Vec<AdapterId>)>,
    /// For [`Mutant::PreviousStack`].
    previous: Vec<AdapterId>,
    announced_revision: Option<u64>,
    /// When the resident set last changed.
    changed: (u64, Time),
}

/// A request in hand.
#[derive(Debug)]
struct Item {
    request: ClipEncode,
    attempt: u32,
    deadline: std::time::Instant,
    connection: Option<Connection>,
}

impl WorkerProcess {
    /// A worker that does not run yet.
    pub(crate) fn new(index: usize) -> Self {
        Self { index, life: 0, running: None }
    }

    /// Whether the process runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the process.
    pub(crate) fn start(&mut self, env: &mut Env) {
        self.life += 1;
        let owner = (Node::Worker(self.index), self.life);
        let served = if env.plan.serves_refiner(self.index) { 2 } else { 1 };
        let models = &Catalog::get().models[..served];
        let clock = env.clock();
        env.later(HEARTBEAT, owner, Inside::Heartbeat);
        self.running = Some(Running {
            owner,
            epoch: env.random.next(),
            models: models.iter().map(|model| (model.name.clone(), model.clone())).collect(),
            clock,
            armed: None,
            dealer: Dealer::new(owner, env),
            scheduler: Scheduler::new(env.plan.adapter_budget_bytes),
            fetches: Fetches::default(),
            tensors: BTreeMap::new(),
            work: BTreeMap::new(),
            executing: None,
            previous: Vec::new(),
            announced_revision: None,
            changed: (0, env.now),
        });
    }

    /// Kills the process. Returns the connection that it had.
    pub(crate) fn kill(&mut self) -> Option<Connection> {
        self.life += 1;
        self.running.take()?.dealer.connection()
    }

    /// The connection in use.
    pub(crate) fn connection(&self) -> Option<Connection> {
        self.running.as_ref()?.dealer.connection()
    }

    /// A message of the broker came.
    pub(crate) fn message(&mut self, connection: Connection, frames: Vec<Bytes>, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        if running.dealer.connection() != Some(connection) {
            return;
        }
        running.dealer.heard(env);
        if let Ok(envelope) = Envelope::open(frames) {
            running.broker_says(&envelope, env);
        }
        running.settle(env);
    }

    /// A connection was closed.
    pub(crate) fn gone(&mut self, connection: Connection, env: &mut Env) {
        if let Some(running) = &mut self.running {
            running.dealer.lost(connection, env);
        }
    }

    /// Something happened inside. Returns whether the process has killed itself.
    pub(crate) fn inside(&mut self, what: Inside, env: &mut Env) -> bool {
        let Some(running) = &mut self.running else { return false };
        match what {
            Inside::Connect => running.dealer.connect(env),
            Inside::Connected => {
                if running.dealer.connected(env) {
                    running.announce(env);
                    for chunk in running.fetches.ask_again(true, running.clock.show(env.now)) {
                        running.fetch(chunk, env);
                    }
                }
            }
            Inside::Liveness => {
                running.dealer.check_liveness(env);
            }
            Inside::Heartbeat => {
                running.alive(env);
                env.later(HEARTBEAT, running.owner, Inside::Heartbeat);
            }
            Inside::Timeout => running.timeout(env),
            Inside::Executed(dispatch) => running.executed(dispatch, env),
            Inside::Crashed(dispatch) => return running.crashed(dispatch, env),
            Inside::Verified(bytes) => running.verified(&bytes, env),
            Inside::Ask | Inside::Upload | Inside::Stored(_) => {}
        }
        running.settle(env);
        false
    }

    /// The adapters that it really holds, unless that changed within `calm`.
    pub(crate) fn resident(&self, calm: Span, now: Time) -> Option<Vec<AdapterId>> {
        let running = self.running.as_ref()?;
        let (_, changed) = running.changed;
        (now.since(changed) >= calm).then(|| running.scheduler.registry().resident().collect())
    }

    /// Whether nothing is owed.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.scheduler.is_idle())
    }
}

impl Running {
    fn broker_says(&mut self, envelope: &Envelope, env: &mut Env) {
        let now = self.clock.show(env.now);
        match envelope.peek.kind.as_str() {
            Work::KIND => {
                if let Ok(work) = envelope.read::<Work>() {
                    self.work(&work, &envelope.attachments, env);
                }
            }
            CancelWork::KIND => {
                if let Ok(CancelWork { dispatch }) = envelope.read() {
                    self.work.remove(&DispatchId(dispatch));
                    self.scheduler.handle_cancel(DispatchId(dispatch), now);
                    self.alive(env);
                }
            }
            Blob::KIND => {
                if let (Ok(blob), [chunk]) = (envelope.read::<Blob>(), &*envelope.attachments) {
                    match self.fetches.handle_chunk(&blob, chunk, now) {
                        Ok(Progress::More(chunks)) => {
                            for chunk in chunks {
                                self.fetch(chunk, env);
                            }
                        }
                        Ok(Progress::Complete(bytes)) => {
                            let after =
                                env.random.log_span(Span::from_micros(50), Span::from_millis(5));
                            env.later(after, self.owner, Inside::Verified(bytes.into()));
                        }
                        Ok(Progress::Ignored) => {}
                        Err(bad) => {
                            let failure = Failure::new(ErrorCode::Internal, bad.to_string());
                            self.fetch_failed(blob.blob.into(), &failure);
                        }
                    }
                }
            }
            NoBlob::KIND => {
                if let Ok(NoBlob { blob, reason }) = envelope.read()
                    && self.fetches.is_under_way(&blob)
                {
                    let failure = Failure::new(ErrorCode::UnknownLora, reason);
                    self.fetch_failed(blob.into(), &failure);
                }
            }
            Evict::KIND => {
                if let Ok(Evict { adapters }) = envelope.read() {
                    if env.mutant == Some(Mutant::EvictsPinned) {
                        self.tensors.retain(|adapter, _| !adapters.contains(adapter));
                    }
                    self.scheduler.handle_evict(&adapters);
                }
            }
            Announce::KIND => self.announce(env),
            _ => {}
        }
    }

    fn work(&mut self, work: &Work, attachments: &[Bytes], env: &mut Env) {
        let dispatch = DispatchId(work.dispatch);
        if self.scheduler.is_wanted(dispatch) {
            return;
        }
        let Some(request) =
            attachments.first().and_then(|frame| header::read::<ClipEncode>(frame).ok())
        else {
            return env.ledger.violate("I2", None, "work without a request", env.now);
        };
        if !self.models.contains_key(&request.model) {
            let failure = Failure::new(ErrorCode::UnknownModel, "this worker lacks the model");
            return self.fail(dispatch, Some(request.id), failure, env);
        }
        let now = self.clock.show(env.now);
        let deadline = now + std::time::Duration::from_millis(u64::from(work.budget_ms));
        let adapters = request.stack.iter().map(|entry| entry.adapter).collect();
        let connection = self.dealer.connection();
        let item = Item { request, attempt: work.attempt, deadline, connection };
        self.work.insert(dispatch, item);
        // I5: a broker gives no more than the worker has slots for.
        let held = self.work.values().filter(|item| item.connection == connection).count();
        if held > SLOTS {
            let what = format!("worker {} was given {held} requests at once", self.owner.0);
            env.ledger.violate("I5", None, what, env.now);
        }
        self.scheduler.handle_work(dispatch, &adapters, deadline, now);
    }

    fn verified(&mut self, bytes: &Bytes, env: &mut Env) {
        let really = AdapterId::of(bytes);
        self.tensors.insert(really, really);
        let now = self.clock.show(env.now);
        self.scheduler.handle_loaded(really, bytes.len() as u64, now);
    }

    fn fetch_failed(&mut self, adapter: AdapterId, failure: &Failure) {
        self.fetches.stop(&adapter.into());
        self.scheduler.handle_load_failed(adapter, failure);
    }

    fn timeout(&mut self, env: &mut Env) {
        self.armed = None;
        let now = self.clock.show(env.now);
        self.scheduler.handle_timeout(now);
        for chunk in self.fetches.ask_again(false, now) {
            self.fetch(chunk, env);
        }
    }

    /// Performs what the scheduler wants, and plans when it is woken next.
    fn settle(&mut self, env: &mut Env) {
        while let Some(command) = self.scheduler.poll_command() {
            match command {
                Command::Fetch(adapter) => {
                    let chunk = self.fetches.start(adapter.into(), self.clock.show(env.now));
                    self.fetch(chunk, env);
                }
                Command::Forget(adapter) => {
                    self.tensors.remove(&adapter);
                }
                Command::Run(run) => self.run(&run, env),
                Command::Fail(dispatch, failure) => {
                    let id = self.work.remove(&dispatch).map(|item| item.request.id);
                    self.fail(dispatch, id, failure, env);
                }
            }
        }
        let revision = self.scheduler.registry().revision();
        if self.changed.0 != revision {
            self.changed = (revision, env.now);
        }
        if self.announced_revision.is_some_and(|told| told != revision) {
            self.alive(env);
        }
        let times = [self.scheduler.poll_timeout(), self.fetches.poll_timeout()];
        let Some(wake) = times.into_iter().flatten().min() else { return };
        let wake = self.clock.when(wake).max(env.now);
        if self.armed.is_none_or(|armed| wake < armed) {
            self.armed = Some(wake);
            env.later(wake.since(env.now), self.owner, Inside::Timeout);
        }
    }

    fn run(&mut self, run: &RunDispatch, env: &mut Env) {
        let Some(item) = self.work.get(&run.dispatch) else {
            return env.ledger.violate("I2", None, "a run without its request", env.now);
        };
        let id = &item.request.id;
        if item.deadline <= self.clock.show(env.now) {
            let what = "the executor was given what had expired at the worker".to_owned();
            env.ledger.violate("I3", Some(id), what, env.now);
        }
        let nothing = AdapterId::from_bytes([0; 32]);
        let really = |adapter| self.tensors.get(&adapter).copied().unwrap_or(nothing);
        let stack: Vec<_> = item.request.stack.iter().map(|entry| really(entry.adapter)).collect();
        let time = env.random.log_span(env.plan.service.0, env.plan.service.1);
        let what = if is_poison(&item.request) {
            Inside::Crashed(run.dispatch)
        } else {
            Inside::Executed(run.dispatch)
        };
        let node = self.owner.0;
        env.trace.note(env.now, [30, node.number(), time.micros()], || {
            (Some(id.to_string()), format!("{node}: runs {:x} for {time}", run.dispatch.0))
        });
        let used = match env.mutant {
            Some(Mutant::PreviousStack) if self.previous.len() == stack.len() => {
                std::mem::replace(&mut self.previous, stack)
            }
            Some(Mutant::PreviousStack) => {
                self.previous.clone_from(&stack);
                stack
            }
            _ => stack,
        };
        self.executing = Some((run.dispatch, used));
        env.later(time, self.owner, what);
    }

    fn executed(&mut self, dispatch: DispatchId, env: &mut Env) {
        let taken = self.executing.take_if(|(executing, _)| *executing == dispatch);
        if self.scheduler.is_wanted(dispatch)
            && let (Some((_, stack)), Some(item)) = (taken, self.work.remove(&dispatch))
        {
            let frames = self.reply(&item, &stack);
            self.done(dispatch, None, frames, env);
        }
        self.scheduler.handle_finished(dispatch, self.clock.show(env.now));
    }

    /// The executor met a poison request: the process is gone.
    fn crashed(&mut self, dispatch: DispatchId, env: &mut Env) -> bool {
        if let Some(item) = self.work.get(&dispatch) {
            env.ledger.crashed(&item.request.id, env.now);
        }
        true
    }

    fn reply(&self, item: &Item, stack: &[AdapterId]) -> Vec<Bytes> {
        let request = &item.request;
        let model = &self.models[&request.model];
        let prompt = request.prompts[0].text.as_deref().unwrap_or_default();
        let value = answer(&model.digest, prompt, request.stack.iter().zip(stack.iter().copied()));
        let tensor =
            |attachment| TensorRef { dtype: Dtype::Float32, shape: vec![1, 2], attachment };
        let receipt = |(entry, source): (&protocol::request::StackEntry, _)| AdapterReceipt {
            adapter: entry.adapter,
            strength_patch: entry.strength_patch,
            strength_model: entry.strength_model,
            applied: 1,
            not_matched: Vec::new(),
            failed: Vec::new(),
            source,
        };
        let sources = std::iter::repeat(protocol::AdapterSource::Resident);
        let reply = ClipEncodeReply {
            id: request.id.clone(),
            results: vec![ConditioningRef { cond: tensor(0), pooled: tensor(1), tokens: None }],
            receipt: Receipt {
                model: model.name.clone(),
                model_digest: model.digest,
                weights_dtype: model.weights_dtype,
                stack: request.stack.iter().zip(sources).map(receipt).collect(),
                hook_stacks: Vec::new(),
                mode: ExecutionMode::Functional,
                fidelity: Fidelity::Comfyui,
                merged_weights: None,
                worker: self.owner.0.to_string().parse().expect("a plain word"),
                attempts: item.attempt,
                times: Times::default(),
                warnings: Vec::new(),
            },
        };
        let value = Bytes::copy_from_slice(&value.to_le_bytes());
        vec![header::write(&reply).into(), value.clone(), value]
    }

    fn fail(&self, dispatch: DispatchId, id: Option<RequestId>, failure: Failure, env: &mut Env) {
        let code = failure.code;
        let reply: ErrorReply = failure.into_reply(id);
        self.done(dispatch, Some(code), vec![header::write(&reply).into()], env);
    }

    fn done(
        &self,
        dispatch: DispatchId,
        failed: Option<ErrorCode>,
        reply: Vec<Bytes>,
        env: &mut Env,
    ) {
        let done = Done { epoch: self.epoch, dispatch: dispatch.0, failed };
        let frames = frames::frames(&done, reply);
        // A `done` that comes twice is allowed: the broker forgets a dispatch with the first.
        if env.random.chance(env.plan.duplicates) {
            self.dealer.send(frames.clone(), env);
        }
        self.dealer.send(frames, env);
    }

    fn announce(&mut self, env: &mut Env) {
        let registry = self.scheduler.registry();
        let ready = Ready {
            worker: self.owner.0.to_string().parse().expect("a plain word"),
            epoch: self.epoch,
            pid: self.owner.1,
            version: "0".to_owned(),
            device: "none".to_owned(),
            slots: u32::try_from(SLOTS).expect("a small number"),
            models: self.models.values().cloned().collect(),
            revision: registry.revision(),
            inventory: self.inventory(),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: false,
        };
        self.announced_revision = Some(ready.revision);
        self.dealer.send(frames::frames(&ready, Vec::new()), env);
    }

    fn alive(&mut self, env: &mut Env) {
        let revision = self.scheduler.registry().revision();
        let changed = self.announced_revision != Some(revision);
        let alive = Alive {
            epoch: self.epoch,
            revision,
            inventory: changed.then(|| self.inventory()),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: false,
        };
        if self.dealer.send(frames::frames(&alive, Vec::new()), env) {
            self.announced_revision = Some(revision);
        }
    }

    fn inventory(&self) -> Inventory {
        Inventory {
            device: self.scheduler.registry().resident().collect(),
            models: self.models.keys().cloned().collect(),
            ..Inventory::default()
        }
    }

    fn fetch(&self, chunk: ChunkRequest, env: &mut Env) {
        let ChunkRequest { blob, offset, length } = chunk;
        self.dealer.send(frames::frames(&Fetch { blob, offset, length }, Vec::new()), env);
    }
}
