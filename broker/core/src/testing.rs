//! A farm for tests: a broker whose events and commands read like sentences.
//!
//! Clients and workers have names, time passes only when a test says so, and every command is
//! shown as one line such as `gpu-0 <- work r1` or `c1 <- error r1 unknown_lora`. Heartbeats and
//! notices are left out.

mod show;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{
    AdapterId, Dtype, Envelope, ErrorCode, ExecutionMode, Failure, Family, Fidelity, Header,
    ModelDigest, Receipt, Times, frames,
    reply::{ClipEncodeReply, Counters, ModelInfo, StatusReply, UploadLoraReply},
    request::{ClipEncode, EncodeOptions, Heartbeat, Prompt, StackEntry, Status, UploadFormat},
    worker::{
        Alive, CancelWork, Disconnect, Done, Evict, Inventory, NoBlob, Prefetch, Ready, Register,
        Registered, Work,
    },
};

use crate::{
    BlobCommand, BlobEvent, BlobOp, BlobOutcome, Broker, ClientPeer, Command, Config, Limits,
    Notice, StoredBlob, StoredModelFile, Ticket, WorkerPeer,
};
use show::{show_op, show_reply};

/// A broker, and what the test has to remember of the world around it.
pub(crate) struct TestBroker {
    pub(crate) broker: Broker,
    pub(crate) now: Instant,
    /// Commands to the store that no event has answered yet, oldest first.
    pub(crate) store: Vec<BlobCommand>,
    pub(crate) notices: Vec<Notice>,
    /// Messages to clients as they were sent.
    pub(crate) replies: Vec<(String, Vec<Bytes>)>,
    /// The last request that a worker was given.
    pub(crate) last_work: Option<Work>,
    /// The last model that each worker was asked to serve.
    pub(crate) registers: BTreeMap<String, Register>,
    clients: BTreeMap<String, ClientPeer>,
    workers: BTreeMap<String, WorkerPeer>,
    epochs: BTreeMap<String, u64>,
    dispatches: BTreeMap<String, u64>,
    requests: BTreeMap<u64, String>,
    peers: u64,
    shown: Vec<String>,
}

impl TestBroker {
    /// A farm that has come together: the grace period of the start is over.
    pub(crate) fn new() -> Self {
        let mut farm = Self::starting(Limits::default());
        farm.after(Limits::default().startup_grace);
        farm
    }

    /// A broker that has just started.
    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    pub(crate) fn starting(limits: Limits) -> Self {
        let now = Instant::now();
        let config = Config::try_new(limits).expect("the test's limits fit together");
        Self {
            broker: Broker::new(config, 0x5eed, now),
            now,
            store: Vec::new(),
            notices: Vec::new(),
            replies: Vec::new(),
            last_work: None,
            registers: BTreeMap::new(),
            clients: BTreeMap::new(),
            workers: BTreeMap::new(),
            epochs: BTreeMap::new(),
            dispatches: BTreeMap::new(),
            requests: BTreeMap::new(),
            peers: 0,
            shown: Vec::new(),
        }
    }

    /// What the broker wanted done since the last call, line by line.
    pub(crate) fn shown(&mut self) -> Vec<String> {
        std::mem::take(&mut self.shown)
    }

    /// Asserts what the broker wanted done since the last call.
    #[track_caller]
    pub(crate) fn assert_commands(&mut self, expected: &[&str]) {
        assert_eq!(self.shown(), expected);
    }

    /// Lets time pass, waking the broker when it wants to be woken.
    pub(crate) fn after(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(wake) = self.broker.poll_timeout().filter(|&wake| wake <= end) {
            self.now = self.now.max(wake);
            self.broker.handle_timeout(self.now);
            self.collect();
        }
        self.now = end;
    }

    pub(crate) fn client_says<H: Header>(&mut self, client: &str, header: &H) {
        self.client_sends(client, frames::frames(header, Vec::new()));
    }

    pub(crate) fn client_sends(&mut self, client: &str, frames: Vec<Bytes>) {
        let peer = self.client(client);
        self.broker.handle_client(peer, frames, self.now);
        self.collect();
    }

    pub(crate) fn client_leaves(&mut self, client: &str) {
        if let Some(peer) = self.clients.remove(client) {
            self.broker.handle_client_gone(peer, self.now);
            self.collect();
        }
    }

    /// `client` asks for `request` with model `sd15` and these adapters.
    pub(crate) fn encode(&mut self, client: &str, request: &str, adapters: &[&str]) {
        self.client_says(client, &encode(request, adapters));
    }

    pub(crate) fn worker_says<H: Header>(&mut self, worker: &str, header: &H) {
        self.worker_sends(worker, frames::frames(header, Vec::new()));
    }

    pub(crate) fn worker_sends(&mut self, worker: &str, frames: Vec<Bytes>) {
        let peer = self.worker(worker);
        self.broker.handle_worker(peer, frames, self.now);
        self.collect();
    }

    /// A new process announces itself with two slots and model `sd15`, which it has loaded.
    pub(crate) fn ready(&mut self, worker: &str, resident: &[&str]) {
        self.begin_process(worker);
        let ready = self.announcement(worker, resident);
        self.worker_says(worker, &ready);
    }

    /// `worker` is another process from now on, on another connection.
    pub(crate) fn begin_process(&mut self, worker: &str) {
        self.workers.remove(worker);
        *self.epochs.entry(worker.to_owned()).or_default() += 1;
    }

    /// What [`TestBroker::ready`] says.
    pub(crate) fn announcement(&self, worker: &str, resident: &[&str]) -> Ready {
        Ready {
            worker: worker.parse().unwrap(),
            epoch: self.epochs.get(worker).copied().unwrap_or_default(),
            pid: 1,
            version: "0".to_owned(),
            device: "cpu".to_owned(),
            slots: 2,
            models: vec![model("sd15")],
            revision: 0,
            inventory: Inventory {
                device: ids(resident),
                models: vec!["sd15".parse().unwrap()],
                ..Inventory::default()
            },
            in_flight: Vec::new(),
            draining: false,
            died_with: Vec::new(),
        }
    }

    /// A heartbeat of `worker`, which holds `in_flight` and whose resident set did not change.
    pub(crate) fn alive(&mut self, worker: &str, in_flight: &[&str]) {
        let alive = self.heartbeat(worker, in_flight);
        self.worker_says(worker, &alive);
    }

    /// What [`TestBroker::alive`] says.
    pub(crate) fn heartbeat(&self, worker: &str, in_flight: &[&str]) -> Alive {
        let in_flight = in_flight.iter().map(|request| self.dispatch(request)).collect();
        let epoch = self.epochs[worker];
        Alive { epoch, in_flight, ..Alive::default() }
    }

    /// `worker` answers `request`.
    pub(crate) fn done(&mut self, worker: &str, request: &str) {
        self.done_by_epoch(worker, request, self.epochs[worker]);
    }

    pub(crate) fn done_by_epoch(&mut self, worker: &str, request: &str, epoch: u64) {
        let reply = Bytes::from(format!("reply to {request}"));
        let done =
            Done { epoch, dispatch: self.dispatch(request), failed: None, ..Done::default() };
        self.worker_sends(worker, frames::frames(&done, vec![reply, Bytes::from_static(b"cond")]));
    }

    /// `worker` answers `request` with embeddings that bear its name, and a receipt.
    pub(crate) fn answers(&mut self, worker: &str, request: &str) {
        let reply =
            frames::frames(&reply_to(request), vec![Bytes::from(format!("cond {request}"))]);
        let done = Done {
            epoch: self.epochs[worker],
            dispatch: self.dispatch(request),
            ..Done::default()
        };
        self.worker_sends(worker, frames::frames(&done, reply[1..].to_vec()));
    }

    /// `worker` answers `request` with an error.
    pub(crate) fn fails(&mut self, worker: &str, request: &str, code: ErrorCode) {
        let failure = Failure::new(code, "it did not work");
        let reply = protocol::header::write(&failure.into_reply(Some(request.parse().unwrap())));
        let done = Done {
            epoch: self.epochs[worker],
            dispatch: self.dispatch(request),
            failed: Some(code),
            ..Done::default()
        };
        self.worker_sends(worker, frames::frames(&done, vec![reply.into()]));
    }

    /// What happened since the start.
    pub(crate) fn counters(&mut self) -> Counters {
        self.client_says("counting", &Status { id: "count".parse().unwrap() });
        self.shown.pop();
        self.last_reply::<StatusReply>().counters
    }

    pub(crate) fn worker_dies(&mut self, worker: &str) {
        if let Some(peer) = self.workers.remove(worker) {
            self.broker.handle_worker_gone(peer, self.now);
            self.collect();
        }
    }

    pub(crate) fn disconnect(&mut self, worker: &str) {
        let epoch = self.epochs[worker];
        self.worker_says(worker, &Disconnect { epoch });
    }

    /// `worker` goes on with the same process on a new connection.
    pub(crate) fn reconnect(&mut self, worker: &str) {
        self.workers.remove(worker);
    }

    /// `worker` answers what it was asked to serve last.
    pub(crate) fn registered(&mut self, worker: &str, answer: Result<ModelInfo, Failure>) {
        let Register { ticket, .. } = self.registers[worker];
        let epoch = self.epochs[worker];
        let (model, failure) = match answer {
            Ok(model) => (Some(model), None),
            Err(failure) => (None, Some(failure)),
        };
        self.worker_says(worker, &Registered { epoch, ticket, model, failure });
    }

    /// The dispatch that `request` was given last.
    pub(crate) fn dispatch(&self, request: &str) -> u64 {
        self.dispatches[request]
    }

    /// The store holds an adapter of 10 bytes.
    pub(crate) fn stored(&mut self, name: &str) {
        self.blob_event(BlobEvent::Found(blob(name)));
    }

    /// The store answers its oldest command.
    pub(crate) fn store_answers(&mut self, outcome: BlobOutcome) {
        let ticket = self.store.remove(0).ticket;
        self.blob_event(BlobEvent::Done { ticket, result: Ok(outcome) });
    }

    /// The store answers every command with success, as long as there are any.
    pub(crate) fn store_works(&mut self) {
        while !self.store.is_empty() {
            let BlobCommand { ticket, op } = self.store.remove(0);
            self.blob_event(BlobEvent::Done { ticket, result: Ok(outcome(&op)) });
        }
    }

    pub(crate) fn blob_event(&mut self, event: BlobEvent) {
        self.broker.handle_blob(event, self.now);
        self.collect();
    }

    /// The upload that the last reply to `client` names.
    pub(crate) fn last_upload(&self) -> protocol::UploadId {
        let reply: UploadLoraReply = self.last_reply();
        reply.upload.expect("an upload is open")
    }

    /// The last message to a client.
    pub(crate) fn last_reply<H: Header>(&self) -> H {
        let (_, frames) = self.replies.last().expect("a reply was sent");
        Envelope::open(frames.clone()).unwrap().read().unwrap()
    }

    fn client(&mut self, name: &str) -> ClientPeer {
        self.peers += 1;
        *self.clients.entry(name.to_owned()).or_insert(ClientPeer::new(self.peers))
    }

    fn worker(&mut self, name: &str) -> WorkerPeer {
        self.peers += 1;
        *self.workers.entry(name.to_owned()).or_insert(WorkerPeer::new(self.peers))
    }

    /// Does what the broker wants done.
    pub(crate) fn collect(&mut self) {
        while let Some(command) = self.broker.poll_command() {
            match command {
                Command::SendClient { to, frames } => self.collect_reply(to, frames),
                Command::SendWorker { to, frames } => self.collect_work(to, frames),
                Command::Blob(command) => {
                    self.shown.push(format!("store <- {}", show_op(&command.op)));
                    self.store.push(command);
                }
                Command::Notice(notice) => self.notices.push(notice),
            }
        }
    }

    fn collect_reply(&mut self, to: ClientPeer, frames: Vec<Bytes>) {
        let gone = || format!("({to})");
        let client = self.clients.iter().find(|&(_, &peer)| peer == to);
        let client = client.map_or_else(gone, |(name, _)| name.clone());
        self.shown.push(format!("{client} <- {}", show_reply(&frames)));
        self.replies.push((client, frames));
    }

    fn collect_work(&mut self, to: WorkerPeer, frames: Vec<Bytes>) {
        let gone = || format!("({to})");
        let worker = self.workers.iter().find(|&(_, &peer)| peer == to);
        let worker = worker.map_or_else(gone, |(name, _)| name.clone());
        let envelope = Envelope::open(frames).unwrap();
        let line = match envelope.peek.kind.as_str() {
            Heartbeat::KIND => return,
            Work::KIND => {
                let work: Work = envelope.read().unwrap();
                let dispatch = work.dispatch;
                self.last_work = Some(work);
                let id = request_id(&envelope.attachments[0]);
                self.dispatches.insert(id.clone(), dispatch);
                self.requests.insert(dispatch, id.clone());
                format!("work {id}")
            }
            CancelWork::KIND => {
                let CancelWork { dispatch } = envelope.read().unwrap();
                let request = self.requests.get(&dispatch).map_or("(unknown)", String::as_str);
                format!("cancel_work {request}")
            }
            Evict::KIND => {
                let Evict { adapters } = envelope.read().unwrap();
                format!("evict {}", adapters.len())
            }
            Prefetch::KIND => {
                format!("prefetch {}", envelope.read::<Prefetch>().unwrap().adapters.len())
            }
            Register::KIND => {
                let register: Register = envelope.read().unwrap();
                let line = format!("register {}", register.name);
                self.registers.insert(worker.clone(), register);
                line
            }
            NoBlob::KIND => {
                let NoBlob { reason, .. } = envelope.read().unwrap();
                format!("no_blob: {reason}")
            }
            kind => kind.to_owned(),
        };
        self.shown.push(format!("{worker} <- {line}"));
    }
}

/// A request for model `sd15` with these adapters and the default budget, equal to no other one.
pub(crate) fn encode(request: &str, adapters: &[&str]) -> ClipEncode {
    let entry = |adapter| StackEntry { adapter, strength_patch: 1.0, strength_model: 1.0 };
    ClipEncode {
        id: request.parse().unwrap(),
        model: "sd15".parse().unwrap(),
        model_digest: None,
        prompts: vec![Prompt {
            text: Some(format!("a cat called {request}")),
            ..Prompt::default()
        }],
        stack: ids(adapters).into_iter().map(entry).collect(),
        options: EncodeOptions::default(),
        budget_ms: None,
        no_cache: false,
        requires: Vec::new(),
    }
}

/// The answer to `request`.
fn reply_to(request: &str) -> ClipEncodeReply {
    let receipt = Receipt {
        model: "sd15".parse().unwrap(),
        model_digest: model("sd15").digest,
        weights_dtype: Dtype::Float16,
        stack: Vec::new(),
        hook_stacks: Vec::new(),
        mode: ExecutionMode::Functional,
        fidelity: Fidelity::Comfyui,
        merged_weights: None,
        worker: "gpu-0".parse().unwrap(),
        attempts: 1,
        times: Times::default(),
        cache: None,
        warnings: Vec::new(),
    };
    ClipEncodeReply { id: request.parse().unwrap(), results: Vec::new(), receipt }
}

/// The model that workers call `name`.
pub(crate) fn model(name: &str) -> ModelInfo {
    ModelInfo {
        name: name.parse().unwrap(),
        digest: ModelDigest::of(name.as_bytes()),
        family: Family::Sd15,
        weights_dtype: Dtype::Float16,
        bytes: 1,
        chunk_tokens: BTreeMap::new(),
    }
}

/// A file of a model of 10 bytes.
pub(crate) fn model_file(name: &str) -> StoredModelFile {
    let blob = protocol::BlobDigest::of(name.as_bytes());
    StoredModelFile { blob, bytes: 10, label: Some(name.to_owned()) }
}

pub(crate) fn id(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}

pub(crate) fn ids(names: &[&str]) -> Vec<AdapterId> {
    names.iter().map(|name| id(name)).collect()
}

/// An adapter of 10 bytes, made from the file `NAME.safetensors`.
pub(crate) fn blob(name: &str) -> StoredBlob {
    let raw = protocol::BlobDigest::of(format!("{name}.safetensors").as_bytes());
    StoredBlob { adapter: id(name), bytes: 10, label: Some(name.to_owned()), raw: vec![raw] }
}

/// What a store that works makes of a command; every upload becomes the adapter `uploaded`.
pub(crate) fn outcome(op: &BlobOp) -> BlobOutcome {
    match op {
        BlobOp::Begin { .. } => BlobOutcome::Begun { received: 0 },
        BlobOp::Append { .. }
        | BlobOp::Abort { .. }
        | BlobOp::Keep { .. }
        | BlobOp::DropParts { .. }
        | BlobOp::Delete { .. }
        | BlobOp::Remember { .. } => BlobOutcome::Done,
        BlobOp::Commit { format: UploadFormat::Model, .. } => {
            BlobOutcome::CommittedModelFile(model_file("uploaded"))
        }
        BlobOp::Commit { .. } => BlobOutcome::Committed {
            blob: blob("uploaded"),
            report: protocol::reply::KeyReport::default(),
        },
        BlobOp::Read { .. } => {
            BlobOutcome::Read { size: 10, bytes: Bytes::from_static(b"0123456789") }
        }
    }
}

/// A ticket that the broker never gave.
pub(crate) const fn foreign_ticket() -> Ticket {
    Ticket(u64::MAX)
}

fn request_id(header: &Bytes) -> String {
    protocol::header::peek(header).unwrap().id.expect("an encode has an id").to_string()
}
