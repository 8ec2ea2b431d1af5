//! A worker's process: the real scheduler, registry and fetches around simulated lanes and a disk.
//!
//! This is the one file of the simulator that knows how a worker core is driven; it does what
//! `worker/src/service.rs` does, with virtual time and without tensors.

mod journal;
mod lanes;
mod leaving;
mod loading;
mod outbox;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, ExecutionMode, Failure, Header, ModelName, frames, header,
    limits,
    reply::ModelInfo,
    request::ClipEncode,
    worker::{Announce, Blob, Busy, CancelWork, Evict, Fetch, NoBlob, Prefetch, Released, Work},
};
use worker_core::{
    ChunkRequest, Command, Config, DispatchId, Fetches, Needs, Origin, Place, Scheduler,
};

use self::leaving::Leaving;
use crate::{
    catalog::Catalog,
    dealer::Dealer,
    env::Env,
    event::{Connection, Inside, Node},
    executor::Job,
    mutant::Mutant,
    time::{Clock, Span, Time},
};

use self::journal::Journal;

const HEARTBEAT: Span = Span::from_millis(500);

/// A worker, dead or alive.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    index: usize,
    pub(crate) life: u32,
    /// The cache on disk, which outlives the process.
    disk: BTreeMap<AdapterId, Bytes>,
    /// The journal, which outlives the process as well.
    journal: Journal,
    running: Option<Running>,
}

/// A worker that lives.
#[derive(Debug)]
struct Running {
    owner: (Node, u32),
    epoch: u64,
    slots: usize,
    models: BTreeMap<ModelName, ModelInfo>,
    clock: Clock,
    armed: Option<Time>,
    dealer: Dealer,
    scheduler: Scheduler,
    fetches: Fetches,
    /// What has arrived of adapters that are on their way.
    partial: BTreeMap<AdapterId, Vec<u8>>,
    /// What the tensors that are kept under a name really are.
    tensors: BTreeMap<AdapterId, AdapterId>,
    /// Models whose weights are in memory.
    weights: BTreeSet<ModelName>,
    /// What has just arrived, until it is known whether it is written to disk.
    unsaved: Option<(AdapterId, Bytes)>,
    work: BTreeMap<DispatchId, Item>,
    lanes: BTreeMap<DispatchId, Job>,
    /// For [`Mutant::PreviousStack`].
    previous: Vec<AdapterId>,
    announced_revision: Option<u64>,
    leaving: Option<Leaving>,
    /// Whether the broker has said that others have what it held.
    is_released: bool,
    /// When what it holds last changed.
    changed: (u64, Time),
}

/// What becomes of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Lives,
    /// It died of what it ran.
    Crashed,
    /// It was told to stop and has left.
    Left,
}

/// Adapters that are fetched at a time, as a real worker has it.
const FETCHES_MAX: usize = 4;

/// A request in hand.
#[derive(Debug)]
struct Item {
    request: ClipEncode,
    attempt: u32,
    deadline: Instant,
    connection: Option<Connection>,
    /// What is asked for, and how it is to run.
    given: Option<Busy>,
    /// What is written into the journal.
    busy: Option<Busy>,
}

impl WorkerProcess {
    /// A worker that does not run yet.
    pub(crate) fn new(index: usize) -> Self {
        let (disk, journal) = (BTreeMap::new(), Journal::default());
        Self { index, life: 0, disk, journal, running: None }
    }

    /// Whether the process runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the process; what is on its disk is all that it knows.
    pub(crate) fn start(&mut self, env: &mut Env) {
        self.life += 1;
        let owner = (Node::Worker(self.index), self.life);
        let served = if env.plan.serves_refiner(self.index) { 2 } else { 1 };
        let models = &Catalog::get().models[..served];
        let config = Config {
            lanes: env.plan.lanes,
            tiers: env.plan.tiers,
            model_budget_bytes: env.plan.model_budget_bytes,
        };
        let mut scheduler = Scheduler::new(config);
        let mut weights = BTreeSet::new();
        for model in models {
            let kept = scheduler.register_model(model.name.clone(), model.bytes);
            if kept.expect("the plan leaves room for every model alone") {
                weights.insert(model.name.clone());
            }
        }
        self.disk
            .retain(|adapter, bytes| scheduler.handle_disk_found(*adapter, bytes.len() as u64));
        env.later(HEARTBEAT, owner, Inside::Heartbeat);
        let epoch = env.random.next();
        self.journal.begin(epoch, env.now);
        self.running = Some(Running {
            owner,
            epoch,
            slots: env.plan.lanes + 1,
            models: models.iter().map(|model| (model.name.clone(), model.clone())).collect(),
            clock: env.clock(),
            armed: None,
            dealer: Dealer::new(owner, env),
            scheduler,
            fetches: Fetches::new(FETCHES_MAX),
            partial: BTreeMap::new(),
            tensors: BTreeMap::new(),
            weights,
            unsaved: None,
            work: BTreeMap::new(),
            lanes: BTreeMap::new(),
            previous: Vec::new(),
            announced_revision: None,
            leaving: None,
            is_released: false,
            changed: (0, env.now),
        });
    }

    /// Kills the process. Returns the connection that it had.
    pub(crate) fn kill(&mut self, now: Time) -> Option<Connection> {
        self.life += 1;
        self.journal.end(now);
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
            running.broker_says(&envelope, &mut self.journal, env);
        }
        running.settle(&mut self.disk, &mut self.journal, env);
    }

    /// A connection was closed.
    pub(crate) fn gone(&mut self, connection: Connection, env: &mut Env) {
        if let Some(running) = &mut self.running {
            running.dealer.lost(connection, env);
        }
    }

    /// Tells the process to stop.
    pub(crate) fn terminate(&self, env: &mut Env) {
        if let Some(running) = &self.running {
            env.later(Span::ZERO, running.owner, Inside::Terminate);
        }
    }

    /// Something happened inside. Returns whether the process ends of it.
    pub(crate) fn inside(&mut self, what: Inside, env: &mut Env) -> Fate {
        let Some(running) = &mut self.running else { return Fate::Lives };
        let now = running.clock.show(env.now);
        match what {
            Inside::Connect => running.dealer.connect(env),
            Inside::Connected => {
                if running.dealer.connected(env) {
                    running.is_released = false;
                    running.announce(&self.journal, env);
                    running.fetches.handle_reconnect(now);
                }
            }
            Inside::Liveness => {
                running.dealer.check_liveness(env);
            }
            Inside::Heartbeat => {
                running.alive(env);
                env.later(HEARTBEAT, running.owner, Inside::Heartbeat);
            }
            Inside::Timeout => {
                running.armed = None;
                running.scheduler.handle_timeout(now);
                running.fetches.handle_timeout(now);
            }
            Inside::Executed(dispatch) => running.executed(dispatch, &mut self.journal, env),
            Inside::Crashed(dispatch) => return running.crashed(dispatch, env),
            Inside::Terminate => running.stop(env),
            Inside::Leave => {
                if running.leave(env) {
                    return Fate::Left;
                }
            }
            Inside::Verified(bytes) => running.loaded(bytes, Origin::Broker, env),
            Inside::DiskRead(adapter) => match self.disk.get(&adapter) {
                Some(bytes) => running.loaded(bytes.clone(), Origin::Disk, env),
                None => running.scheduler.handle_disk_lost(adapter),
            },
            Inside::ModelLoaded(model) => {
                running.weights.insert(model.clone());
                running.scheduler.handle_model_loaded(&model, now);
            }
            Inside::Ask | Inside::Upload | Inside::Stored => {}
        }
        running.settle(&mut self.disk, &mut self.journal, env);
        Fate::Lives
    }

    /// The adapters that it really holds in memory, by id, unless that changed within `calm`.
    pub(crate) fn resident(&self, calm: Span, now: Time) -> Option<Vec<AdapterId>> {
        let running = self.running.as_ref()?;
        let (_, changed) = running.changed;
        let registry = running.scheduler.registry();
        let held: BTreeSet<_> = registry.on_device().chain(registry.on_host()).collect();
        (now.since(changed) >= calm).then(|| held.into_iter().collect())
    }

    /// Whether nothing is owed.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.scheduler.is_idle())
    }
}

impl Running {
    fn broker_says(&mut self, envelope: &Envelope, journal: &mut Journal, env: &mut Env) {
        let now = self.clock.show(env.now);
        match envelope.peek.kind.as_str() {
            Work::KIND => {
                if let Ok(work) = envelope.read::<Work>() {
                    self.work(&work, &envelope.attachments, env);
                    self.note_loading(DispatchId(work.dispatch), journal);
                }
            }
            CancelWork::KIND => {
                if let Ok(CancelWork { dispatch }) = envelope.read() {
                    self.work.remove(&DispatchId(dispatch));
                    self.scheduler.handle_cancel(DispatchId(dispatch), now);
                    self.note_end(DispatchId(dispatch), journal);
                    self.alive(env);
                }
            }
            Blob::KIND => {
                if let (Ok(blob), [chunk]) = (envelope.read::<Blob>(), &*envelope.attachments) {
                    self.blob(&blob, chunk, env);
                }
            }
            NoBlob::KIND => {
                if let Ok(NoBlob { blob, reason }) = envelope.read()
                    && self.fetches.is_wanted(&blob)
                {
                    let failure = Failure::new(ErrorCode::UnknownLora, reason);
                    self.load_failed(blob.into(), &failure, now);
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
            Prefetch::KIND => {
                if let Ok(Prefetch { adapters }) = envelope.read()
                    && self.leaving.is_none()
                {
                    self.scheduler.handle_prefetch(&adapters);
                }
            }
            Released::KIND => self.is_released = true,
            Announce::KIND => self.announce(journal, env),
            _ => {}
        }
    }

    fn work(&mut self, work: &Work, attachments: &[Bytes], env: &mut Env) {
        let dispatch = DispatchId(work.dispatch);
        if self.scheduler.is_wanted(dispatch) || self.lanes.contains_key(&dispatch) {
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
        let deadline = now + Duration::from_millis(u64::from(work.budget_ms));
        let needs = Needs {
            model: request.model.clone(),
            exclusive: request.options.mode == Some(ExecutionMode::Locking),
            adapters: request.stack.iter().map(|entry| entry.adapter).collect(),
        };
        let connection = self.dealer.connection();
        let given = work.key.map(|key| Busy { key, alone: work.alone });
        let busy = given.filter(|_| env.mutant != Some(Mutant::EmptyJournal));
        let attempt = work.attempt;
        let item = Item { request, attempt, deadline, connection, given, busy };
        self.work.insert(dispatch, item);
        // I5: a broker gives no more than the worker has slots for.
        let held = self.work.values().filter(|item| item.connection == connection).count();
        if held > self.slots {
            let what = format!("{} was given {held} requests at once", self.owner.0);
            env.ledger.violate("I5", None, what, env.now);
        }
        self.scheduler.handle_work(dispatch, needs, deadline, now);
    }

    /// Performs what the scheduler wants, and plans when it is woken next.
    fn settle(
        &mut self,
        disk: &mut BTreeMap<AdapterId, Bytes>,
        journal: &mut Journal,
        env: &mut Env,
    ) {
        while let Some(command) = self.scheduler.poll_command() {
            self.perform(command, disk, journal, env);
        }
        self.unsaved = None;
        while let Some(ChunkRequest { blob, offset, length }) = self.fetches.poll_request() {
            self.dealer.send(frames::frames(&Fetch { blob, offset, length }, Vec::new()), env);
        }
        let revision = self.scheduler.revision();
        if self.changed.0 != revision {
            self.changed = (revision, env.now);
        }
        if self.announced_revision.is_some_and(|told| told != revision) {
            self.alive(env);
        }
        self.look_out(env);
        let times = [self.scheduler.poll_timeout(), self.fetches.poll_timeout()];
        let Some(wake) = times.into_iter().flatten().min() else { return };
        let wake = self.clock.when(wake).max(env.now);
        if self.armed.is_none_or(|armed| wake < armed) {
            self.armed = Some(wake);
            env.later(wake.since(env.now), self.owner, Inside::Timeout);
        }
    }

    fn perform(
        &mut self,
        command: Command,
        disk: &mut BTreeMap<AdapterId, Bytes>,
        journal: &mut Journal,
        env: &mut Env,
    ) {
        let now = self.clock.show(env.now);
        match command {
            Command::Fetch(adapter) => {
                self.fetches.start(adapter.into(), limits::UPLOAD_BYTES_MAX, now);
            }
            Command::Prefetch(adapter) => {
                self.fetches.start_background(adapter.into(), limits::UPLOAD_BYTES_MAX, now);
            }
            Command::StopFetch(adapter) => self.stop_fetch(adapter, now),
            Command::ReadDisk(adapter) => {
                if env.random.chance(0.01) {
                    disk.remove(&adapter); // It is rotten, which the digest tells.
                }
                let after = env.random.log_span(Span::from_micros(100), Span::from_millis(10));
                env.later(after, self.owner, Inside::DiskRead(adapter));
            }
            Command::WriteDisk(adapter) => {
                match self.unsaved.take_if(|(unsaved, _)| *unsaved == adapter) {
                    Some((adapter, bytes)) => drop(disk.insert(adapter, bytes)),
                    None => self.scheduler.handle_disk_lost(adapter),
                }
            }
            Command::Promote(_) | Command::Demote(_) | Command::Interrupt(_) => {}
            Command::Forget(adapter, Place::Memory) => drop(self.tensors.remove(&adapter)),
            Command::Forget(adapter, Place::Disk) => drop(disk.remove(&adapter)),
            Command::LoadModel(model) => {
                let after = env.random.log_span(Span::from_millis(5), Span::from_millis(100));
                env.later(after, self.owner, Inside::ModelLoaded(model));
            }
            Command::UnloadModel(model) => drop(self.weights.remove(&model)),
            Command::Run(run) => self.run(&run, journal, env),
            Command::Fail(dispatch, failure) => {
                let id = self.work.remove(&dispatch).map(|item| item.request.id);
                self.fail(dispatch, id, failure, env);
                self.note_end(dispatch, journal);
            }
        }
    }
}
