//! Random events, and what must hold after each of them.
//!
//! * A request is answered once, by its deadline, and nobody who left is written to.
//! * What was accepted and not answered waits for a task, and that is queued or in flight, and
//!   not both. No two tasks compute the same.
//! * No worker has more than its slots.
//! * An answer comes from a dispatch for an equal request, and carries the id of the one who asked.
//! * No worker is asked twice at a time to serve a model, and a registered name stands for one
//!   digest.
//! * What is stored and announced of models' files stays within the budget.

mod happenings;
mod registering;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use happenings::{Operation, What, WorkerOperation, operation};
use proptest::{collection::vec, prelude::*};
use protocol::{
    BlobDigest, Envelope, ErrorCode, Failure, Header, RequestId, frames,
    reply::UploadLoraReply,
    request::{Cancel, ClipEncode, EvictLora, Heartbeat, UploadFormat, UploadLora, UploadOp},
    worker::{
        Alive, CancelWork, Disconnect, Done, Fetch, Inventory, Ready, Register, Registered, Work,
    },
};
use registering::{answer_to, register, registration};

use crate::{
    BlobCommand, BlobEvent, Broker, ClientPeer, Command, Config, Limits, WorkerPeer,
    tasks::TaskKey,
    testing::{blob, encode, id, model, outcome},
};

/// Slots of every worker.
const SLOTS: u32 = 2;
const CLIENTS: u8 = 3;
const WORKERS: u8 = 3;
const ADAPTERS: [&str; 3] = ["a", "b", "uploaded"];
const MODELS: [&str; 3] = ["sd15", "xl", "turbo"];
const MODEL_STORE: u64 = 25;

/// An answer that says what was asked.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Reply {
    id: RequestId,
    asked: String,
    receipt: BTreeMap<String, String>,
}

impl Header for Reply {
    const KIND: &'static str = "clip_encode_reply";
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_answered_once_and_in_time(
        operations in vec(operation(), 1..120),
        registered in any::<bool>(),
    ) {
        let mut world = World::new();
        if registered {
            let found = BlobEvent::FoundRegistration(registration("xl"));
            world.broker.handle_blob(found, world.now);
        }
        for operation in operations {
            world.happens(operation);
            world.check();
        }
        world.passes(Duration::from_mins(10));
        world.check();
        prop_assert!(world.due.is_empty(), "unanswered at the end: {:?}", world.due);
    }
}

/// Everything around the broker.
struct World {
    broker: Broker,
    now: Instant,
    clients: BTreeMap<u8, ClientPeer>,
    workers: BTreeMap<u8, TestWorker>,
    peers: u64,
    serial: u64,
    /// Requests that are to be answered, and by when.
    due: BTreeMap<(ClientPeer, RequestId), Instant>,
    /// What was asked in them.
    asked: BTreeMap<(ClientPeer, RequestId), String>,
    uploads: BTreeMap<u8, protocol::UploadId>,
    store: Vec<BlobCommand>,
}

struct TestWorker {
    peer: WorkerPeer,
    epoch: u64,
    /// Dispatches, and the requests that they are for.
    held: BTreeMap<u64, ClipEncode>,
    /// Models that it was asked to serve, by ticket.
    asked: BTreeMap<u64, Register>,
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn new() -> Self {
        let now = Instant::now();
        let limits = Limits {
            queued_max: 4,
            store_bytes_max: 20,
            model_store_bytes_max: MODEL_STORE,
            registrations_open_max: 2,
            ..Limits::default()
        };
        let config = Config::try_new(limits).unwrap();
        Self {
            broker: Broker::new(config, 7, now),
            now,
            clients: BTreeMap::new(),
            workers: BTreeMap::new(),
            peers: 0,
            serial: 0,
            due: BTreeMap::new(),
            asked: BTreeMap::new(),
            uploads: BTreeMap::new(),
            store: Vec::new(),
        }
    }

    fn happens(&mut self, operation: Operation) {
        use Operation as Op;
        match operation {
            Op::Encode { client, id, what, budget_ms, known_model } => {
                let What { prompt, adapter, no_cache } = what;
                let adapters: Vec<_> =
                    adapter.iter().map(|&index| ADAPTERS[usize::from(index)]).collect();
                let model = if known_model { "sd15" } else { "flux" }.parse().unwrap();
                let request = ClipEncode {
                    id: format!("encode-{id}").parse().unwrap(),
                    model,
                    budget_ms: Some(budget_ms),
                    no_cache,
                    ..encode(&format!("prompt {prompt}").replace(' ', "-"), &adapters)
                };
                let due = Duration::from_millis(u64::from(budget_ms));
                let peer = self.client(client);
                self.asked.entry((peer, request.id.clone())).or_insert(asked(&request));
                self.asks(client, request.id.clone(), due, frames::frames(&request, vec![]));
            }
            Op::Cancel { client, id } => {
                let request = format!("encode-{id}").parse().unwrap();
                let id = self.fresh_id();
                let header = Cancel { id: id.clone(), request };
                self.asks(client, id, Duration::ZERO, frames::frames(&header, vec![]));
            }
            Op::Upload { client, step, offset, model_file } => {
                self.uploads(client, (step, offset), model_file);
            }
            Op::Register { client, id, model, budget_ms, uploaded } => {
                let due = Duration::from_millis(u64::from(budget_ms));
                let request = register(id, MODELS[usize::from(model)], budget_ms, uploaded);
                self.asks(client, request.id.clone(), due, frames::frames(&request, vec![]));
            }
            Op::Evict { client, adapter, delete } => {
                let id_of = self.fresh_id();
                let adapters = vec![id(ADAPTERS[usize::from(adapter)])];
                let header = EvictLora { id: id_of.clone(), adapters, delete };
                self.asks(client, id_of, STORE, frames::frames(&header, vec![]));
            }
            Op::ClientLeaves { client } => {
                if let Some(peer) = self.clients.remove(&client) {
                    self.due.retain(|(owner, _), _| *owner != peer);
                    self.asked.retain(|(owner, _), _| *owner != peer);
                    self.uploads.remove(&client);
                    self.broker.handle_client_gone(peer, self.now);
                }
            }
            Op::ClientGarbage { client, frames } => {
                let peer = self.client(client);
                let frames = frames.into_iter().map(Bytes::from).collect();
                self.broker.handle_client(peer, frames, self.now);
            }
            Op::StoreAnswers { well } => self.store_answers(well),
            Op::StoreFinds { adapter } => {
                let found = BlobEvent::Found(blob(ADAPTERS[usize::from(adapter)]));
                self.broker.handle_blob(found, self.now);
            }
            Op::TimePasses { ms } => self.passes(Duration::from_millis(ms)),
            Op::Worker { worker, does } => self.worker_does(worker, does),
        }
        self.collect();
    }

    fn worker_does(&mut self, worker: u8, operation: WorkerOperation) {
        use WorkerOperation as Op;
        match operation {
            Op::Starts { inventory } => self.worker_starts(worker, inventory),
            Op::Lives { honest, draining } => {
                let Some(TestWorker { epoch, held, .. }) = self.workers.get(&worker) else {
                    return;
                };
                let in_flight = if honest { held.keys().copied().collect() } else { vec![] };
                let alive = Alive { epoch: *epoch, in_flight, draining, ..Alive::default() };
                self.worker_says(worker, frames::frames(&alive, vec![]));
            }
            Op::Answers { right_epoch, well } => {
                let Some(test_worker) = self.workers.get_mut(&worker) else { return };
                let Some((dispatch, request)) = test_worker.held.pop_first() else { return };
                let epoch = test_worker.epoch + u64::from(!right_epoch);
                let asked = asked(&request);
                let reply = Reply { id: request.id.clone(), asked, receipt: BTreeMap::new() };
                let failure = Failure::new(ErrorCode::Internal, "the device is on fire");
                let (reply, failed) = if well {
                    (protocol::header::write(&reply), None)
                } else {
                    let reply = failure.into_reply(Some(request.id));
                    (protocol::header::write(&reply), Some(ErrorCode::Internal))
                };
                let done = Done { epoch, dispatch, failed, ..Done::default() };
                self.worker_says(worker, frames::frames(&done, vec![reply.into()]));
            }
            Op::Registers { answer } => {
                let Some(test_worker) = self.workers.get_mut(&worker) else { return };
                let Some((ticket, asked)) = test_worker.asked.pop_first() else { return };
                let answer = answer_to(&asked, answer);
                let (model, failure) = (answer.clone().ok(), answer.err());
                let registered = Registered { epoch: test_worker.epoch, ticket, model, failure };
                self.worker_says(worker, frames::frames(&registered, vec![]));
            }
            Op::Fetches { adapter } => {
                let adapter = id(ADAPTERS[usize::from(adapter)]);
                let fetch = Fetch { blob: adapter.into(), offset: 0, length: 1 };
                self.worker_says(worker, frames::frames(&fetch, vec![]));
            }
            Op::Leaves { politely } => {
                let Some(&TestWorker { peer, epoch, .. }) = self.workers.get(&worker) else {
                    return;
                };
                if politely {
                    self.worker_says(worker, frames::frames(&Disconnect { epoch }, vec![]));
                }
                self.workers.remove(&worker);
                self.broker.handle_worker_gone(peer, self.now);
            }
            Op::Reconnects => {
                self.peers += 1;
                let Some(test_worker) = self.workers.get_mut(&worker) else { return };
                test_worker.peer = WorkerPeer::new(self.peers);
                test_worker.asked.clear();
                let ready = test_worker.ready(worker, [0; 3]);
                self.worker_says(worker, frames::frames(&ready, vec![]));
            }
            Op::Garbage { frames } => {
                let frames = frames.into_iter().map(Bytes::from).collect();
                self.worker_says(worker, frames);
            }
        }
    }

    fn worker_starts(&mut self, worker: u8, inventory: [u8; 3]) {
        self.peers += 1;
        self.serial += 1;
        let peer = WorkerPeer::new(self.peers);
        let (held, asked) = (BTreeMap::new(), BTreeMap::new());
        let test_worker = TestWorker { peer, epoch: self.serial * 2, held, asked };
        let ready = test_worker.ready(worker, inventory);
        self.workers.insert(worker, test_worker);
        self.worker_says(worker, frames::frames(&ready, vec![]));
    }

    fn uploads(&mut self, client: u8, (step, offset): (u8, u64), model_file: bool) {
        let upload = self.uploads.get(&client).cloned();
        let op = match (step, upload) {
            (0, _) | (_, None) if model_file => UploadOp::Begin {
                size: 10, // As the file that the store makes of it.
                format: UploadFormat::Model,
                digest: (offset > 1).then(|| BlobDigest::of(b"shared")),
                label: None,
            },
            (0, _) | (_, None) => {
                let digest = (offset > 1).then(|| BlobDigest::of(b"shared"));
                UploadOp::Begin { size: 3, format: UploadFormat::Lora, digest, label: None }
            }
            (1, Some(upload)) => UploadOp::Chunk { upload, offset },
            (2, Some(upload)) => UploadOp::Commit { upload },
            (_, Some(upload)) => UploadOp::Abort { upload, keep: offset.is_multiple_of(2) },
        };
        let id = self.fresh_id();
        let header = UploadLora { id: id.clone(), op };
        let attachments = vec![Bytes::from_static(b"x")];
        self.asks(client, id, STORE, frames::frames(&header, attachments));
    }

    fn asks(&mut self, client: u8, id: RequestId, due: Duration, frames: Vec<Bytes>) {
        let peer = self.client(client);
        self.due.entry((peer, id)).or_insert(self.now + due);
        self.broker.handle_client(peer, frames, self.now);
    }

    fn store_answers(&mut self, well: bool) {
        if self.store.is_empty() {
            return;
        }
        let BlobCommand { ticket, op } = self.store.remove(0);
        let broken = || Failure::new(ErrorCode::Internal, "the disk is on fire");
        let result = if well { Ok(outcome(&op)) } else { Err(broken()) };
        self.broker.handle_blob(BlobEvent::Done { ticket, result }, self.now);
    }

    fn passes(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(wake) = self.broker.poll_timeout().filter(|&wake| wake <= end) {
            self.now = self.now.max(wake);
            self.broker.handle_timeout(self.now);
            self.collect();
        }
        self.now = end;
    }

    fn client(&mut self, client: u8) -> ClientPeer {
        self.peers += 1;
        *self.clients.entry(client).or_insert(ClientPeer::new(self.peers))
    }

    fn worker_says(&mut self, worker: u8, frames: Vec<Bytes>) {
        if let Some(worker) = self.workers.get(&worker) {
            self.broker.handle_worker(worker.peer, frames, self.now);
        }
    }

    fn fresh_id(&mut self) -> RequestId {
        self.serial += 1;
        format!("step-{}", self.serial).parse().unwrap()
    }

    fn collect(&mut self) {
        while let Some(command) = self.broker.poll_command() {
            match command {
                Command::SendClient { to, frames } => self.client_gets(to, frames),
                Command::SendWorker { to, frames } => self.worker_gets(to, frames),
                Command::Blob(command) => self.store.push(command),
                Command::Notice(_) => {}
            }
        }
    }

    fn client_gets(&mut self, to: ClientPeer, frames: Vec<Bytes>) {
        let envelope = Envelope::open(frames).unwrap();
        if envelope.is::<Heartbeat>() {
            return;
        }
        let client = self.clients.iter().find(|&(_, &peer)| peer == to);
        let client = *client.expect("nobody who left is written to").0;
        let Some(id) = envelope.peek.id.clone() else { return };
        if id.as_str() != "7" {
            let due = self.due.remove(&(to, id.clone()));
            let asked = self.asked.remove(&(to, id.clone()));
            if envelope.is::<Reply>() {
                let reply: Reply = envelope.read().unwrap();
                assert_eq!(Some(reply.asked), asked, "`{id}` has the answer to something else");
            }
            let due = due.unwrap_or_else(|| panic!("`{id}` was answered twice"));
            assert!(self.now <= due, "`{id}` was answered late");
        }
        if envelope.is::<UploadLoraReply>() {
            let reply: UploadLoraReply = envelope.read().unwrap();
            match reply.upload {
                Some(upload) => drop(self.uploads.insert(client, upload)),
                None => drop(self.uploads.remove(&client)),
            }
        }
    }

    fn worker_gets(&mut self, to: WorkerPeer, frames: Vec<Bytes>) {
        let Some(worker) = self.workers.values_mut().find(|worker| worker.peer == to) else {
            return;
        };
        let envelope = Envelope::open(frames).unwrap();
        match envelope.peek.kind.as_str() {
            Work::KIND => {
                let Work { dispatch, .. } = envelope.read().unwrap();
                let request = protocol::header::read(&envelope.attachments[0]).unwrap();
                worker.held.insert(dispatch, request);
            }
            Register::KIND => {
                let register: Register = envelope.read().unwrap();
                let mut asked = worker.asked.values();
                assert!(asked.all(|asked| asked.name != register.name), "asked twice at a time");
                worker.asked.insert(register.ticket, register);
            }
            CancelWork::KIND => {
                let CancelWork { dispatch } = envelope.read().unwrap();
                worker.held.remove(&dispatch);
            }
            _ => {}
        }
    }

    fn check(&self) {
        let Broker { requests, tasks, queue, in_flight, workers, routes, .. } = &self.broker;
        let mut wanted: BTreeMap<TaskKey, usize> = BTreeMap::new();
        for key in requests.pending() {
            let request = requests.get(key).unwrap();
            let to = (request.reply_to.client, request.reply_to.id.clone());
            assert!(self.due.contains_key(&to), "{to:?} is kept and nobody waits for it");
            assert!(tasks.get(request.task).unwrap().waiting.contains(&key));
            *wanted.entry(request.task).or_default() += 1;
        }
        for (&key, &waiting) in &wanted {
            let task = tasks.get(key).unwrap();
            assert_eq!(task.waiting.len(), waiting, "a task waits for somebody who left");
            let queued = queue.owner(key).is_some();
            assert_ne!(task.dispatched.is_some(), queued, "queued or in flight");
            if let Some(dispatched) = task.dispatched {
                let peer = dispatched.peer;
                assert!(workers.get(peer).is_some(), "in flight at a live worker");
                let entry = (dispatched.dispatch, key);
                assert!(in_flight.of_worker(peer).any(|other| other == entry));
            }
        }
        assert_eq!(wanted.len(), tasks.len(), "a task that nobody waits for");
        assert_eq!(queue.len() + in_flight.wanted(), tasks.len());
        for (peer, _) in workers.iter() {
            assert_eq!(routes.busy(peer), Some(in_flight.busy(peer, self.broker.started)));
        }
        for (peer, _) in workers.iter() {
            assert!(in_flight.load(peer) <= SLOTS as usize, "more than its slots");
        }
        let late = self.due.iter().find(|(_, due)| **due < self.now);
        assert_eq!(late, None, "unanswered after its deadline");
        let waiting = self.due.keys().filter(|(_, id)| id.as_str().starts_with("encode"));
        assert_eq!(waiting.count(), requests.len(), "an encode is neither kept nor answered");
        self.check_models();
    }

    fn check_models(&self) {
        let Broker { registrations, workers, model_files, uploads, .. } = &self.broker;
        let waiting = self.due.keys().filter(|(_, id)| id.as_str().starts_with("register"));
        let waiters = registrations.waiters().count();
        assert_eq!(waiting.count(), waiters, "a registration is neither kept nor answered");
        for (peer, _) in registrations.asks() {
            assert!(workers.get(peer).is_some(), "asked and not alive");
        }
        for known in registrations.all() {
            let mut served = workers.digests(&known.spec.name).into_iter();
            assert!(served.all(|digest| digest == known.digest), "a name stands for two models");
        }
        let bytes = model_files.bytes() + uploads.announced(true) + uploads.kept.bytes(true);
        assert!(bytes <= MODEL_STORE, "{bytes} bytes of models");
    }
}

impl TestWorker {
    /// Says that it has the adapters that the bits name, which may be true or not.
    fn ready(&self, worker: u8, inventory: [u8; 3]) -> Ready {
        let [device, host, disk] = inventory.map(|bits| {
            let named = (0..).zip(ADAPTERS).filter(|(bit, _)| bits >> bit & 1 == 1);
            named.map(|(_, name)| id(name)).collect()
        });
        Ready {
            worker: format!("gpu-{worker}").parse().unwrap(),
            epoch: self.epoch,
            pid: 1,
            version: "0".to_owned(),
            device: "cpu".to_owned(),
            slots: SLOTS,
            models: vec![model("sd15")],
            revision: 0,
            inventory: Inventory { device, host, disk, models: vec!["xl".parse().unwrap()] },
            in_flight: self.held.keys().copied().collect(),
            draining: false,
            died_with: Vec::new(),
        }
    }
}

/// What a request asks for, as text.
fn asked(request: &ClipEncode) -> String {
    format!("{:?} {:?} {:?}", request.model, request.prompts, request.stack)
}

/// How long a client waits for the blob store.
const STORE: Duration = Duration::from_mins(1);
