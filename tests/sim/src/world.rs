//! One run: the processes of a farm, and the loop that gives them one event after the other.

use protocol::AdapterId;

use crate::{
    broker::BrokerProcess,
    catalog::Catalog,
    client::ClientProcess,
    env::Env,
    event::{Arrival, Connection, End, Event, Inside, Node},
    faults::Action,
    ledger::{Counts, RECOVERY, Violation},
    mutant::Mutant,
    plan::Plan,
    random::Random,
    time::{Span, Time},
    trace::Line,
    wire::describe,
    worker::Fate,
};

/// Time after the last fault in which everything must have been answered.
const CALM: Span = Span::from_secs(10);

/// Two heartbeats: the time in which the broker must know what a worker holds.
const CONVERGENCE: Span = Span::from_secs(1);

/// How a run ended.
#[derive(Debug)]
pub struct Report {
    /// Tells runs apart: the same seed gives the same hash.
    pub hash: u64,
    /// What the run did.
    pub counts: Counts,
    /// Time that passed in the run, in microseconds.
    pub virtual_us: u64,
    /// The first broken promise, if any.
    pub violation: Option<Violation>,
    /// What happened, line by line, when that was asked for.
    pub(crate) lines: Vec<Line>,
}

/// A farm and the world around it.
#[derive(Debug)]
struct World {
    env: Env,
    broker: BrokerProcess,
    workers: Vec<WorkerSlot>,
    clients: Vec<ClientSlot>,
    broker_pause: Pause,
}

type WorkerSlot = (crate::worker::WorkerProcess, Pause);
type ClientSlot = (ClientProcess, Pause);

/// What waits for a stopped process.
#[derive(Debug, Default)]
struct Pause {
    is_stopped: bool,
    waiting: Vec<Event>,
}

/// Runs the farm that `seed` stands for until it is calm or breaks a promise.
pub(crate) fn run(seed: u64, mutant: Option<Mutant>, keeps_lines: bool) -> Report {
    let mut random = Random::new(seed);
    let plan = Plan::new(mutant, &mut random);
    let mut world = World::new(plan, random, keeps_lines);
    world.run();
    let Env { trace, ledger, now, .. } = world.env;
    Report {
        hash: trace.hash(),
        counts: ledger.counts,
        virtual_us: now.micros(),
        violation: ledger.violation,
        lines: trace.into_lines(),
    }
}

impl World {
    fn new(plan: Plan, random: Random, keeps_lines: bool) -> Self {
        let mut env = Env::new(plan, random, keeps_lines);
        let stored = &Catalog::get().adapters[..env.plan.stored];
        let mut uploads = vec![Vec::new(); env.plan.clients];
        for adapter in env.plan.stored..env.plan.adapters {
            uploads[env.random.below(env.plan.clients)].push(adapter);
        }
        let workers = (0..env.plan.workers).map(crate::worker::WorkerProcess::new);
        let clients = uploads.into_iter().enumerate();
        let clients = clients.map(|(index, uploads)| ClientProcess::new(index, uploads));
        Self {
            broker: BrokerProcess::new(stored),
            workers: workers.map(|worker| (worker, Pause::default())).collect(),
            clients: clients.map(|client| (client, Pause::default())).collect(),
            broker_pause: Pause::default(),
            env,
        }
    }

    fn run(&mut self) {
        for planned in std::mem::take(&mut self.env.plan.faults) {
            self.env.events.plan(planned.at, Event::Act(planned.action));
        }
        for node in self.everybody() {
            self.act(Action::Start(node));
        }
        let mut probe = self.env.plan.calm + RECOVERY + CONVERGENCE;
        while self.env.ledger.violation.is_none() {
            let end = self.env.ledger.calm_since + CALM;
            match self.env.events.next(end.min(probe)) {
                Some((at, event)) => {
                    self.env.now = at;
                    self.handle(event);
                }
                None if probe < end => {
                    self.env.now = probe;
                    probe = probe + CONVERGENCE;
                    self.check_residency();
                }
                None => {
                    self.env.now = end;
                    return self.check_end();
                }
            }
        }
    }

    /// Gives an event to whom it concerns, unless that process is stopped.
    fn handle(&mut self, event: Event) {
        if let Event::Act(action) = event {
            if action.can_lose_work() {
                self.env.ledger.struck = self.env.now;
            }
            return self.act(action);
        }
        let node = self.concerned(&event);
        if let Event::Inside { life, .. } = event
            && life != self.life(node)
        {
            return;
        }
        if self.pause(node).is_stopped {
            return self.pause(node).waiting.push(event);
        }
        match event {
            Event::Arrive { connection, at, what } => {
                let link = (&mut self.env.events, self.env.now);
                if let Some(what) = self.env.network.arrive(connection, at, what, link) {
                    self.arrived(connection, at, what);
                }
            }
            Event::Release { connection, at } => {
                for what in self.env.network.release(connection, at) {
                    if self.env.network.is_open(connection, at) {
                        self.arrived(connection, at, what);
                    }
                }
            }
            Event::Inside { what, .. } => self.inside(node, what),
            Event::Act(_) => {}
        }
    }

    fn arrived(&mut self, connection: Connection, at: End, what: Arrival) {
        let node = self.env.network.node(connection);
        self.note_arrival(connection, at, &what);
        let env = &mut self.env;
        match what {
            Arrival::Message(frames) => match (at, node) {
                (End::Router, _) => self.broker.message(connection, frames, env),
                (End::Dealer, Node::Worker(index)) => {
                    self.workers[index].0.message(connection, frames, env);
                }
                (End::Dealer, Node::Client(index)) => {
                    self.clients[index].0.message(connection, frames, env);
                }
                (End::Dealer, Node::Broker) => {}
            },
            Arrival::Closed => {
                env.network.closed(connection, at);
                match (at, node) {
                    (End::Router, _) => self.broker.gone(connection, env),
                    (End::Dealer, Node::Worker(index)) => {
                        self.workers[index].0.gone(connection, env);
                    }
                    (End::Dealer, Node::Client(index)) => {
                        self.clients[index].0.gone(connection, env);
                    }
                    (End::Dealer, Node::Broker) => {}
                }
            }
        }
    }

    fn inside(&mut self, node: Node, what: Inside) {
        let env = &mut self.env;
        match (node, what) {
            (Node::Broker, Inside::Timeout) => self.broker.timeout(env),
            (Node::Broker, Inside::Stored) => self.broker.stored(env),
            (Node::Broker, _) => {}
            (Node::Worker(index), what) => {
                let fate = self.workers[index].0.inside(what, env);
                if fate != Fate::Lives {
                    self.act(Action::Kill(node));
                    let restart =
                        self.env.random.log_span(Span::from_millis(50), Span::from_secs(1));
                    let back = self.env.now + restart;
                    if fate == Fate::Left {
                        self.env.ledger.stopped(back);
                    }
                    self.env.events.plan(back, Event::Act(Action::Start(node)));
                }
            }
            (Node::Client(index), what) => self.clients[index].0.inside(&what, env),
        }
    }

    /// Changes the world.
    fn act(&mut self, action: Action) {
        let now = self.env.now;
        if now > Time::ZERO {
            self.env.ledger.counts.faults += 1;
        }
        self.env.trace.note(now, [1, 0, 0], || (None, format!("{action:?}")));
        match action {
            Action::Kill(node) => self.kill(node),
            Action::Terminate(index) => self.workers[index].0.terminate(&mut self.env),
            Action::Start(node) => self.start(node),
            Action::Pause(node) => {
                self.pause(node).is_stopped = self.is_alive(node);
                self.env.broker_takes_connections = self.broker_takes_connections();
            }
            Action::Resume(node) => self.resume(node),
            Action::Block(node, ends) => self.env.network.block(node, &ends),
            Action::Unblock(node, ends) => {
                self.env.network.unblock(node, &ends, (&mut self.env.events, now));
            }
            Action::Reset(node) => {
                let connection = match node {
                    Node::Worker(index) => self.workers[index].0.connection(),
                    Node::Client(index) => self.clients[index].0.connection(),
                    Node::Broker => None,
                };
                if let Some(connection) = connection {
                    self.env.network.reset(connection, (&mut self.env.events, now));
                }
            }
            Action::SlowLink(node, extra) => self.env.network.slow(node, extra),
            Action::SlowDisk(is_slow) => self.env.disk.is_slow = is_slow,
            Action::FullDisk(is_full) => self.env.disk.is_full = is_full,
        }
    }

    /// Kills a process; the kernel closes its connections.
    fn kill(&mut self, node: Node) {
        *self.pause(node) = Pause::default();
        let env = &mut self.env;
        match node {
            Node::Broker => {
                if self.broker.kill() {
                    env.network.close_all(End::Router, (&mut env.events, env.now));
                }
            }
            Node::Worker(index) => {
                if let Some(connection) = self.workers[index].0.kill(env.now) {
                    env.close(connection, End::Dealer);
                }
            }
            Node::Client(index) => {
                if let Some(connection) = self.clients[index].0.kill(env) {
                    env.close(connection, End::Dealer);
                }
            }
        }
        self.env.broker_takes_connections = self.broker_takes_connections();
    }

    fn start(&mut self, node: Node) {
        if self.is_alive(node) {
            return;
        }
        let env = &mut self.env;
        match node {
            Node::Broker => self.broker.start(env),
            Node::Worker(index) => self.workers[index].0.start(env),
            Node::Client(index) => {
                self.clients[index].0.awake = env.now;
                self.clients[index].0.start(env);
            }
        }
        self.env.broker_takes_connections = self.broker_takes_connections();
    }

    /// Continues a stopped process: everything that waited for it happens now, in its order.
    fn resume(&mut self, node: Node) {
        let pause = std::mem::take(self.pause(node));
        if let Node::Client(index) = node {
            self.clients[index].0.awake = self.env.now;
        }
        self.env.broker_takes_connections = self.broker_takes_connections();
        for event in pause.waiting {
            self.handle(event);
        }
    }

    /// I7: what the broker believes is what workers hold.
    fn check_residency(&mut self) {
        let Some(reply) = self.broker.loras(&mut self.env) else { return };
        for (index, (worker, _)) in self.workers.iter().enumerate() {
            let Some(held) = worker.resident(CONVERGENCE, self.env.now) else { continue };
            let name = Node::Worker(index).to_string();
            let lists = |lora: &&protocol::reply::LoraInfo| {
                lora.workers.iter().any(|worker| worker.as_str() == name)
            };
            let believed: Vec<AdapterId> =
                reply.loras.iter().filter(lists).map(|lora| lora.adapter).collect();
            if believed != held {
                let (believed, held) = (believed.len(), held.len());
                let what = format!("{name} holds {held} adapters, and the broker knows {believed}");
                return self.env.ledger.violate("I7", None, what, self.env.now);
            }
        }
    }

    /// What must be true when nothing happens any more.
    fn check_end(&mut self) {
        let now = self.env.now;
        self.env.ledger.close(now);
        self.check_residency();
        for (client, _) in &self.clients {
            if let Some(adapter) = client.uploads.first() {
                let what = format!("adapter {adapter} could not be uploaded in the calm");
                self.env.ledger.violate("I6", None, what, now);
            }
        }
        for &adapter in &self.env.ledger.known {
            if !self.broker.store.holds(&Catalog::get().adapters[adapter].id) {
                self.env.ledger.violation.get_or_insert(Violation {
                    invariant: "I6",
                    request: None,
                    what: format!("adapter {adapter} was uploaded and is gone"),
                    at_us: now.micros(),
                });
            }
        }
        self.check_credit();
    }

    /// I5: when nobody waits, nothing is taken.
    fn check_credit(&mut self) {
        let now = self.env.now;
        let Some(status) = self.broker.status(&mut self.env) else { return };
        let taken: u32 = status.workers.iter().map(|worker| worker.in_flight).sum();
        if taken > 0 || status.queued > 0 || !self.broker.is_idle() {
            let what =
                format!("nobody waits, yet {taken} slots are taken, {} queued", status.queued);
            self.env.ledger.violate("I5", None, what, now);
        }
        if status.workers.len() != self.workers.len() {
            let what = format!("the broker knows {} workers", status.workers.len());
            self.env.ledger.violate("I6", None, what, now);
        }
        for (worker, _) in &self.workers {
            if !worker.is_idle() {
                self.env.ledger.violate("I5", None, "a worker is busy for nobody", now);
            }
        }
    }

    fn note_arrival(&mut self, connection: Connection, at: End, what: &Arrival) {
        let node = self.env.network.node(connection);
        let (end, bytes) = match what {
            Arrival::Message(frames) => (at, frames.iter().map(bytes::Bytes::len).sum::<usize>()),
            Arrival::Closed => (at, 0),
        };
        let event = [2 + u64::from(end == End::Router), connection.0 as u64, bytes as u64];
        self.env.trace.note(self.env.now, event, || {
            let (from, to) = match at {
                End::Router => (node, Node::Broker),
                End::Dealer => (Node::Broker, node),
            };
            let (request, words) = match what {
                Arrival::Message(frames) => describe(frames),
                Arrival::Closed => (None, "closed".to_owned()),
            };
            (request, format!("{from} -> {to} [{}]: {words}", connection.0))
        });
    }

    fn concerned(&self, event: &Event) -> Node {
        match event {
            Event::Arrive { connection, at: End::Dealer, .. }
            | Event::Release { connection, at: End::Dealer } => self.env.network.node(*connection),
            Event::Arrive { .. } | Event::Release { .. } | Event::Act(_) => Node::Broker,
            Event::Inside { node, .. } => *node,
        }
    }

    fn pause(&mut self, node: Node) -> &mut Pause {
        match node {
            Node::Broker => &mut self.broker_pause,
            Node::Worker(index) => &mut self.workers[index].1,
            Node::Client(index) => &mut self.clients[index].1,
        }
    }

    fn life(&self, node: Node) -> u32 {
        match node {
            Node::Broker => self.broker.life,
            Node::Worker(index) => self.workers[index].0.life,
            Node::Client(index) => self.clients[index].0.life,
        }
    }

    fn is_alive(&self, node: Node) -> bool {
        match node {
            Node::Broker => self.broker.is_alive(),
            Node::Worker(index) => self.workers[index].0.is_alive(),
            Node::Client(index) => self.clients[index].0.is_alive(),
        }
    }

    fn broker_takes_connections(&self) -> bool {
        self.broker.is_alive() && !self.broker_pause.is_stopped
    }

    fn everybody(&self) -> Vec<Node> {
        let workers = (0..self.workers.len()).map(Node::Worker);
        let clients = (0..self.clients.len()).map(Node::Client);
        [Node::Broker].into_iter().chain(workers).chain(clients).collect()
    }
}
