//! The broker's process: the real core between simulated connections and a simulated disk.
//!
//! This is the one file of the simulator that knows how a broker core is driven. It keeps the order
//! of the real event loop: one event in, all commands out, then the next time to wake.

use std::collections::{BTreeMap, BTreeSet};

use broker_core::{Broker, ClientPeer, Command, Config, Limits, WorkerPeer};
use bytes::Bytes;
use protocol::{
    Envelope, Header, RequestId, frames,
    reply::{ListLorasReply, REPLY_KINDS, StatusReply},
    request::{Heartbeat, ListLoras, Status},
    worker::{Alive, Ready, Work},
};

use crate::{
    blob_store::BlobStore,
    catalog::Content,
    env::Env,
    event::{Connection, End, Inside, Node},
    ledger::Giver,
    mutant::Mutant,
    time::{Clock, Time},
    wire::describe,
};

/// The connection of the simulator's own questions.
const PROBE: ClientPeer = ClientPeer::new(u64::MAX);

/// The broker, dead or alive, and its disk.
#[derive(Debug)]
pub(crate) struct BrokerProcess {
    pub(crate) life: u32,
    pub(crate) store: BlobStore,
    running: Option<Running>,
}

/// A broker that lives.
#[derive(Debug)]
struct Running {
    core: Broker,
    clock: Clock,
    armed: Option<Time>,
    /// Connections on which something arrived; the socket knows no others.
    clients: BTreeMap<ClientPeer, Connection>,
    workers: BTreeMap<WorkerPeer, Connection>,
    /// Requests that arrived and are not answered, by connection.
    owed: BTreeMap<Connection, BTreeMap<RequestId, u32>>,
    /// Processes whose ends journals have told of, for I4.
    told: BTreeSet<u64>,
    /// For [`Mutant::LostDispatch`]: what each worker was ever sent.
    sent: BTreeMap<u64, BTreeSet<u64>>,
    /// For [`Mutant::StaleResidency`]: the first revision of each worker's process.
    first_revisions: BTreeMap<u64, u64>,
}

impl BrokerProcess {
    /// A broker that does not run yet, with these adapters on its disk.
    pub(crate) fn new(adapters: &[Content]) -> Self {
        Self { life: 0, store: BlobStore::holding(adapters), running: None }
    }

    /// Whether the process runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the process; what is on the disk is all that it knows.
    pub(crate) fn start(&mut self, env: &mut Env) {
        self.life += 1;
        let clock = env.clock();
        let now = clock.show(env.now);
        let limits = Limits { queued_max: env.plan.queued_max, ..Limits::default() };
        let config = Config::try_new(limits).expect("the plan's limits fit together");
        let mut core = Broker::new(config, env.random.next(), now);
        for found in self.store.found() {
            core.handle_blob(found, now);
        }
        self.running = Some(Running {
            core,
            clock,
            armed: None,
            clients: BTreeMap::new(),
            workers: BTreeMap::new(),
            owed: BTreeMap::new(),
            told: BTreeSet::new(),
            sent: BTreeMap::new(),
            first_revisions: BTreeMap::new(),
        });
        self.flush(env);
    }

    /// Kills the process. Returns whether it ran; the kernel closes its connections.
    pub(crate) fn kill(&mut self) -> bool {
        self.life += 1;
        self.store.crash();
        self.running.take().is_some()
    }

    /// A message came.
    pub(crate) fn message(&mut self, connection: Connection, frames: Vec<Bytes>, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        let now = running.clock.show(env.now);
        match env.network.node(connection) {
            Node::Client(_) => {
                running.clients.insert(client(connection), connection);
                running.note_request(connection, &frames);
                running.core.handle_client(client(connection), frames, now);
            }
            Node::Worker(_) => {
                running.workers.insert(worker(connection), connection);
                env.ledger.lives.insert(connection, self.life);
                running.note_journal(&frames);
                let frames = running.mutate(frames, env.mutant);
                running.core.handle_worker(worker(connection), frames, now);
            }
            Node::Broker => {}
        }
        self.flush(env);
    }

    /// A connection was closed.
    pub(crate) fn gone(&mut self, connection: Connection, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        running.owed.remove(&connection);
        let now = running.clock.show(env.now);
        let (client, worker) = (client(connection), worker(connection));
        if running.clients.remove(&client).is_some() {
            running.core.handle_client_gone(client, now);
        }
        if running.workers.remove(&worker).is_some() {
            running.core.handle_worker_gone(worker, now);
        }
        self.flush(env);
    }

    /// The core wanted to be woken.
    pub(crate) fn timeout(&mut self, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        running.armed = None;
        let now = running.clock.show(env.now);
        if running.core.poll_timeout().is_some_and(|wake| wake <= now) {
            running.core.handle_timeout(now);
        }
        self.flush(env);
    }

    /// The disk has done its oldest command.
    pub(crate) fn stored(&mut self, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        let now = running.clock.show(env.now);
        for event in self.store.done(self.life, env) {
            running.core.handle_blob(event, now);
        }
        self.flush(env);
    }

    /// What the broker believes about adapters, asked as a client asks.
    pub(crate) fn loras(&mut self, env: &mut Env) -> Option<ListLorasReply> {
        self.ask(&ListLoras { id: probe_id() }, env)
    }

    /// How the broker says it is.
    pub(crate) fn status(&mut self, env: &mut Env) -> Option<StatusReply> {
        self.ask(&Status { id: probe_id() }, env)
    }

    /// Whether nobody waits for anything at this broker.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.core.is_idle())
    }

    fn ask<H: Header, R: Header>(&mut self, question: &H, env: &mut Env) -> Option<R> {
        let running = self.running.as_mut()?;
        let now = running.clock.show(env.now);
        running.core.handle_client(PROBE, frames::frames(question, Vec::new()), now);
        let mut answer = None;
        let mut others = Vec::new();
        while let Some(command) = running.core.poll_command() {
            match command {
                Command::SendClient { to: PROBE, ref frames } => {
                    let frames = frames.clone();
                    answer = Envelope::open(frames).ok().and_then(|envelope| envelope.read().ok());
                }
                Command::SendClient { .. }
                | Command::SendWorker { .. }
                | Command::Blob(_)
                | Command::Notice(_) => others.push(command),
            }
        }
        for command in others {
            self.perform(command, env);
        }
        self.arm(env);
        answer
    }

    fn flush(&mut self, env: &mut Env) {
        while let Some(command) =
            self.running.as_mut().and_then(|running| running.core.poll_command())
        {
            self.perform(command, env);
        }
        self.arm(env);
    }

    fn arm(&mut self, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        let Some(wake) = running.core.poll_timeout() else { return };
        let wake = running.clock.when(wake).max(env.now);
        if running.armed.is_none_or(|armed| wake < armed) {
            running.armed = Some(wake);
            env.later(wake.since(env.now), (Node::Broker, self.life), Inside::Timeout);
        }
    }

    fn perform(&mut self, command: Command, env: &mut Env) {
        let Some(running) = &mut self.running else { return };
        match command {
            Command::SendClient { to, frames } => {
                let Some(&connection) = running.clients.get(&to) else { return };
                running.note_reply(connection, &frames, env);
                env.send(connection, End::Router, frames);
            }
            Command::SendWorker { to, frames } => {
                let Some(&connection) = running.workers.get(&to) else { return };
                running.check_work(&frames, self.life, env);
                if env.mutant == Some(Mutant::LostDispatch) {
                    running.remember_work(env.network.node(connection).number(), &frames);
                }
                env.send(connection, End::Router, frames);
            }
            Command::Blob(command) => self.store.take(command, self.life, env),
            Command::Notice(notice) => {
                env.trace.note(env.now, [20, 0, 0], || (None, format!("broker: {notice:?}")));
            }
        }
    }
}

impl Running {
    /// Notes that an answer is owed.
    fn note_request(&mut self, connection: Connection, frames: &[Bytes]) {
        if let Some(id) = request_id(frames) {
            *self.owed.entry(connection).or_default().entry(id).or_default() += 1;
        }
    }

    /// Checks that an answer is owed. I1 at the broker: never more answers than questions.
    fn note_reply(&mut self, connection: Connection, frames: &[Bytes], env: &mut Env) {
        let Some(id) = request_id(frames) else { return };
        let owed = self.owed.entry(connection).or_default();
        match owed.get_mut(&id) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) => {
                owed.remove(&id);
            }
            None => {
                let what = format!("the broker answered {} unasked", describe(frames).1);
                env.ledger.violate("I1", Some(&id), what, env.now);
            }
        }
    }

    /// Notes what a worker's journal tells.
    fn note_journal(&mut self, frames: &[Bytes]) {
        let envelope = Envelope::open(frames.to_vec()).ok();
        let envelope = envelope.filter(Envelope::is::<Ready>);
        if let Some(Ok(ready)) = envelope.map(|envelope| envelope.read::<Ready>()) {
            self.told.extend(ready.died_with.iter().map(|death| death.epoch));
        }
    }

    /// I4: what is known to kill is given to nobody.
    fn check_work(&self, frames: &[Bytes], life: u32, env: &mut Env) {
        if env.ledger.counts.poisoned == 0 {
            return;
        }
        let envelope = Envelope::open(frames.to_vec()).ok();
        let envelope = envelope.filter(Envelope::is::<Work>);
        let work = envelope.and_then(|envelope| envelope.read::<Work>().ok());
        if let Some(Work { key: Some(key), alone, .. }) = work {
            env.ledger.given(key, alone, Giver { life, told: &self.told }, env.now);
        }
    }

    fn remember_work(&mut self, node: u64, frames: &[Bytes]) {
        let work = Envelope::open(frames.to_vec()).ok().and_then(|envelope| {
            envelope.is::<Work>().then(|| envelope.read::<Work>().ok()).flatten()
        });
        if let Some(work) = work {
            self.sent.entry(node).or_default().insert(work.dispatch);
        }
    }

    /// What the broker is made to believe that a worker said.
    fn mutate(&mut self, frames: Vec<Bytes>, mutant: Option<Mutant>) -> Vec<Bytes> {
        let is_concerned = matches!(mutant, Some(Mutant::LostDispatch | Mutant::StaleResidency));
        let Some(envelope) = is_concerned.then(|| Envelope::open(frames.clone()).ok()).flatten()
        else {
            return frames;
        };
        let lies = mutant == Some(Mutant::LostDispatch);
        let all: Vec<_> = self.sent.values().flatten().copied().collect();
        if envelope.is::<Ready>()
            && let Ok(mut ready) = envelope.read::<Ready>()
        {
            if lies {
                ready.in_flight = all;
            } else {
                let first = self.first_revisions.entry(ready.epoch).or_insert(ready.revision);
                if *first != ready.revision {
                    ready.inventory.device.clear();
                }
            }
            return frames::frames(&ready, Vec::new());
        }
        if envelope.is::<Alive>()
            && let Ok(mut alive) = envelope.read::<Alive>()
        {
            if lies {
                alive.in_flight = all;
            } else if let Some(&first) = self.first_revisions.get(&alive.epoch) {
                (alive.revision, alive.inventory) = (first, None);
                alive.resident_digest = None;
            }
            return frames::frames(&alive, Vec::new());
        }
        frames
    }
}

fn client(connection: Connection) -> ClientPeer {
    ClientPeer::new(connection.0 as u64)
}

fn worker(connection: Connection) -> WorkerPeer {
    WorkerPeer::new(connection.0 as u64)
}

fn probe_id() -> RequestId {
    "probe".parse().expect("a plain word")
}

/// The id of a request or of a reply; heartbeats have none.
fn request_id(frames: &[Bytes]) -> Option<RequestId> {
    let header = frames.get(1)?;
    let peek = protocol::header::peek(header).ok()?;
    let is_heartbeat = peek.kind == Heartbeat::KIND;
    debug_assert!(is_heartbeat || peek.id.is_some() || REPLY_KINDS.contains(&&*peek.kind));
    peek.id
}
