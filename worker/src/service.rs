//! The worker's one loop: broker, executor, adapters on their way, and time.
//!
//! It decides nothing: events go into [`Scheduler`], its commands come out and are performed here.

use std::{
    collections::BTreeMap,
    future::Future,
    panic::catch_unwind,
    sync::Arc,
    time::{Duration, Instant},
};

use adapter::PatchSet;
use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, ErrorReply, Failure, Header, ModelName, RequestId, WorkerName,
    frames, header,
    reply::ModelInfo,
    worker::{
        Alive, Announce, Blob, CancelWork, Disconnect, Done, Evict, Fetch, Inventory, NoBlob,
        Ready, Work,
    },
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use transport::{Dealer, DealerEvent, DealerSendErrorKind, DealerSender, Message};
use worker_core::{ChunkRequest, Command, DispatchId, Fetches, Progress, RunDispatch, Scheduler};

use crate::{
    executor::{Executor, Job, Outcome},
    interrupt::Interrupt,
    model::LoadedModel,
    request::Request,
};

/// How often a worker shows that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

/// Requests a worker takes at once: one runs, one is ready to follow, so that the executor never
/// waits for the network.
const SLOTS: u32 = 2;

/// Who this worker is; constant while the process lives.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) worker: WorkerName,
    pub(crate) epoch: u64,
    pub(crate) device: String,
    pub(crate) models: Vec<ModelInfo>,
}

/// Everything the loop holds.
pub(crate) struct Service {
    identity: Identity,
    scheduler: Scheduler,
    fetches: Fetches,
    /// The tensors of the adapters that the scheduler's registry knows as resident.
    adapters: BTreeMap<AdapterId, Arc<PatchSet>>,
    /// The models of this worker.
    models: BTreeMap<ModelName, Arc<LoadedModel>>,
    work: BTreeMap<DispatchId, WorkItem>,
    broker: DealerSender,
    executor: Executor,
    verified: mpsc::UnboundedSender<Verified>,
    announced_revision: Option<u64>,
    draining: bool,
}

/// A request of this worker, until it is given to the executor.
struct WorkItem {
    id: RequestId,
    asked: Option<(Request, Arc<LoadedModel>)>,
    attempt: u32,
    queued_ms: u32,
    interrupt: Interrupt,
}

/// A fetched adapter whose digest was checked.
struct Verified {
    adapter: AdapterId,
    bytes: u64,
    patches: Result<PatchSet, Failure>,
}

/// The socket's thread has failed.
#[derive(Debug, thiserror::Error)]
#[error("the socket's thread ended: see the lines above")]
pub(crate) struct SocketClosed;

impl Service {
    /// Serves until `shutdown` resolves and what is in hand is done, or until `grace` is over.
    pub(crate) async fn serve(
        identity: Identity,
        models: BTreeMap<ModelName, Arc<LoadedModel>>,
        adapter_budget_bytes: u64,
        mut dealer: Dealer,
        mut executor: Executor,
        shutdown: impl Future<Output = ()>,
        grace: Duration,
    ) -> Result<(), SocketClosed> {
        let (verified, mut verifications) = mpsc::unbounded_channel();
        let mut outcomes = executor.take_outcomes();
        let mut service = Self {
            identity,
            scheduler: Scheduler::new(adapter_budget_bytes),
            fetches: Fetches::default(),
            adapters: BTreeMap::new(),
            models,
            work: BTreeMap::new(),
            broker: dealer.sender(),
            executor,
            verified,
            announced_revision: None,
            draining: false,
        };
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut give_up = None;
        tokio::pin!(shutdown);
        loop {
            service.perform_commands();
            if service.draining && service.scheduler.is_idle() {
                tracing::info!("drained, leaving");
                break;
            }
            let timeout = service.next_timeout(give_up);
            tokio::select! {
                biased;
                () = &mut shutdown, if give_up.is_none() => {
                    service.drain();
                    give_up = Some(Instant::now() + grace);
                }
                Some(outcome) = outcomes.recv() => service.handle_outcome(outcome),
                Some(verified) = verifications.recv() => service.handle_verified(verified),
                event = dealer.recv() => service.handle_dealer(event.ok_or(SocketClosed)?),
                _ = heartbeat.tick() => service.send_alive(),
                () = sleep_until(timeout) => service.handle_timeout(),
            }
            if give_up.is_some_and(|at| at <= Instant::now()) {
                tracing::warn!(?grace, "the grace period is over, leaving work behind");
                break;
            }
        }
        service.send(&Disconnect { epoch: service.identity.epoch }, Vec::new());
        dealer.close().await;
        Ok(())
    }

    fn next_timeout(&self, give_up: Option<Instant>) -> Option<Instant> {
        [self.scheduler.poll_timeout(), self.fetches.poll_timeout(), give_up]
            .into_iter()
            .flatten()
            .min()
    }

    fn drain(&mut self) {
        tracing::info!(in_flight = self.work.len(), "draining: taking no new work");
        self.draining = true;
        self.send_alive();
    }

    fn handle_timeout(&mut self) {
        let now = Instant::now();
        self.scheduler.handle_timeout(now);
        for chunk in self.fetches.ask_again(false, now) {
            self.send_fetch(chunk);
        }
    }

    fn handle_dealer(&mut self, event: DealerEvent) {
        match event {
            DealerEvent::Connected => {
                tracing::info!("connected to the broker");
                self.send_ready();
                for chunk in self.fetches.ask_again(true, Instant::now()) {
                    self.send_fetch(chunk);
                }
            }
            DealerEvent::Disconnected => tracing::warn!("lost the broker, reconnecting"),
            DealerEvent::Message(message) => match Envelope::open(message.into_frames()) {
                Ok(envelope) => self.handle_broker(&envelope),
                Err(error) => tracing::warn!(%error, "the broker sent what is no message"),
            },
        }
    }

    fn handle_broker(&mut self, envelope: &Envelope) {
        let handled = match envelope.peek.kind.as_str() {
            Work::KIND => {
                envelope.read().map(|work| self.handle_work(&work, &envelope.attachments))
            }
            CancelWork::KIND => envelope.read().map(|CancelWork { dispatch }| {
                self.work.remove(&DispatchId(dispatch));
                self.scheduler.handle_cancel(DispatchId(dispatch));
                self.send_alive(); // so that the broker knows the slot is free
            }),
            Blob::KIND => {
                envelope.read().map(|blob| self.handle_blob(&blob, &envelope.attachments))
            }
            NoBlob::KIND => envelope.read().map(|NoBlob { blob, reason }| {
                // Late answers to a question asked twice change nothing.
                if self.fetches.is_under_way(&blob) {
                    let failure = Failure::new(ErrorCode::UnknownLora, reason);
                    self.fetch_failed(blob.into(), &failure);
                }
            }),
            Evict::KIND => {
                envelope.read().map(|Evict { adapters }| self.scheduler.handle_evict(&adapters))
            }
            Announce::KIND => envelope.read().map(|Announce {}| self.send_ready()),
            // Its arrival is what counts, and `transport` has noted that; newer kinds are no concern.
            _ => Ok(()),
        };
        if let Err(error) = handled {
            tracing::warn!(kind = envelope.peek.kind, %error, "the broker sent a bad message");
        }
    }

    fn handle_work(&mut self, work: &Work, attachments: &[Bytes]) {
        let now = Instant::now();
        let dispatch = DispatchId(work.dispatch);
        if self.scheduler.is_wanted(dispatch) {
            return; // the broker repeated itself; one answer is enough
        }
        let Some((client_header, attachments)) = attachments.split_first() else {
            tracing::warn!(dispatch = work.dispatch, "work without a request");
            return;
        };
        let id = header::peek(client_header).ok().and_then(|peek| peek.id);
        let decoded = Request::decode(client_header, attachments);
        match decoded.and_then(|request| self.model(&request).map(|model| (request, model))) {
            Ok((request, model)) => {
                let adapters = request.adapters();
                let (attempt, queued_ms) = (work.attempt, work.queued_ms);
                let id = request.id.clone();
                let asked = Some((request, model));
                let item =
                    WorkItem { id, asked, attempt, queued_ms, interrupt: Interrupt::default() };
                self.work.insert(dispatch, item);
                let deadline = now + Duration::from_millis(u64::from(work.budget_ms));
                self.scheduler.handle_work(dispatch, &adapters, deadline, now);
            }
            Err(failure) => self.send_failure(dispatch, id, failure),
        }
    }

    /// The model that `request` names.
    fn model(&self, request: &Request) -> Result<Arc<LoadedModel>, Failure> {
        let unknown = |message| Failure::new(ErrorCode::UnknownModel, message);
        let Some(model) = self.models.get(&request.model) else {
            let known = self.models.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(unknown(format!(
                "no model `{}` here: this worker has {known}",
                request.model
            )));
        };
        match request.model_digest {
            Some(asked) if asked != model.digest => Err(unknown(format!(
                "model `{}` has digest {}, not {asked}",
                model.name, model.digest
            ))),
            _ => Ok(Arc::clone(model)),
        }
    }

    fn handle_blob(&mut self, blob: &Blob, attachments: &[Bytes]) {
        let chunk = attachments.first().map_or(&[][..], |chunk| chunk);
        match self.fetches.handle_chunk(blob, chunk, Instant::now()) {
            Ok(Progress::More(chunks)) => {
                for chunk in chunks {
                    self.send_fetch(chunk);
                }
            }
            Ok(Progress::Complete(bytes)) => self.verify(blob.blob.into(), bytes),
            Ok(Progress::Ignored) => {}
            Err(bad) => {
                let failure = Failure::new(ErrorCode::Internal, bad.to_string());
                self.fetch_failed(blob.blob.into(), &failure);
            }
        }
    }

    /// Checks digest and form of a fetched adapter beside the loop.
    fn verify(&self, adapter: AdapterId, blob: Vec<u8>) {
        let verified = self.verified.clone();
        tokio::task::spawn_blocking(move || {
            // Without an answer the adapter would stay on its way for ever.
            let patches = catch_unwind(|| verify_adapter(adapter, &blob)).unwrap_or_else(|_| {
                let message = format!("the worker met a defect while reading adapter {adapter}");
                Err(Failure::new(ErrorCode::Internal, message))
            });
            // The loop may have ended; then nobody wants the adapter.
            let _ = verified.send(Verified { adapter, bytes: blob.len() as u64, patches });
        });
    }

    fn handle_verified(&mut self, verified: Verified) {
        let Verified { adapter, bytes, patches } = verified;
        match patches {
            Ok(patches) => {
                tracing::info!(adapter = adapter.short(), bytes, "adapter loaded");
                self.adapters.insert(adapter, Arc::new(patches));
                self.scheduler.handle_loaded(adapter, bytes, Instant::now());
            }
            Err(failure) => self.fetch_failed(adapter, &failure),
        }
    }

    fn fetch_failed(&mut self, adapter: AdapterId, failure: &Failure) {
        tracing::warn!(adapter = adapter.short(), %failure, "adapter could not be loaded");
        self.fetches.stop(&adapter.into());
        self.scheduler.handle_load_failed(adapter, failure);
    }

    fn handle_outcome(&mut self, outcome: Outcome) {
        let Outcome { dispatch, result } = outcome;
        if self.scheduler.is_wanted(dispatch)
            && let Some(item) = self.work.remove(&dispatch)
        {
            match result {
                Ok(reply) => {
                    let frames = std::iter::once(reply.header).chain(reply.attachments).collect();
                    self.send_done(dispatch, None, item.id, frames);
                }
                Err(failure) => self.send_failure(dispatch, Some(item.id), failure),
            }
        }
        self.scheduler.handle_finished(dispatch);
    }

    fn perform_commands(&mut self) {
        while let Some(command) = self.scheduler.poll_command() {
            match command {
                Command::Fetch(adapter) => {
                    let chunk = self.fetches.start(adapter.into(), Instant::now());
                    self.send_fetch(chunk);
                }
                Command::Forget(adapter) => {
                    tracing::info!(adapter = adapter.short(), "adapter evicted");
                    self.adapters.remove(&adapter);
                }
                Command::Run(run) => self.run(run),
                Command::Fail(dispatch, failure) => {
                    let id = self.work.remove(&dispatch).map(|item| item.id);
                    self.send_failure(dispatch, id, failure);
                }
            }
        }
        // Routing by residency is only as good as the news: a change is told at once.
        if self.announced_revision.is_some_and(|told| told != self.scheduler.registry().revision())
        {
            self.send_alive();
        }
    }

    fn run(&mut self, run: RunDispatch) {
        let dispatch = run.dispatch;
        let taken = self.work.get_mut(&dispatch).and_then(|item| {
            let interrupt = item.interrupt.clone();
            item.asked.take().map(|asked| (asked, item.attempt, item.queued_ms, interrupt))
        });
        let ((request, model), attempt, queued_ms, interrupt) =
            taken.expect("a dispatch runs once, and only while it is wanted");
        let adapters = run
            .sources
            .keys()
            .map(|id| {
                (*id, Arc::clone(self.adapters.get(id).expect("a resident adapter has tensors")))
            })
            .collect();
        let job = Job { run, request, model, adapters, attempt, queued_ms, interrupt };
        self.executor.run(job);
    }

    fn send_ready(&mut self) {
        let Identity { worker, epoch, device, models } = self.identity.clone();
        let registry = self.scheduler.registry();
        let ready = Ready {
            worker,
            epoch,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device,
            slots: SLOTS,
            models,
            revision: registry.revision(),
            inventory: self.inventory(),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: self.draining,
            died_with: Vec::new(),
        };
        self.announced_revision = Some(ready.revision);
        self.send(&ready, Vec::new());
    }

    fn send_alive(&mut self) {
        let registry = self.scheduler.registry();
        let revision = registry.revision();
        let changed = self.announced_revision != Some(revision);
        let alive = Alive {
            epoch: self.identity.epoch,
            revision,
            inventory: changed.then(|| self.inventory()),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: self.draining,
        };
        if self.send(&alive, Vec::new()) {
            self.announced_revision = Some(revision);
        }
    }

    fn inventory(&self) -> Inventory {
        Inventory {
            device: self.scheduler.registry().resident().collect(),
            models: self.identity.models.iter().map(|model| model.name.clone()).collect(),
            ..Inventory::default()
        }
    }

    fn send_fetch(&self, chunk: ChunkRequest) {
        let ChunkRequest { blob, offset, length } = chunk;
        self.send(&Fetch { blob, offset, length }, Vec::new());
    }

    fn send_failure(&self, dispatch: DispatchId, id: Option<RequestId>, failure: Failure) {
        let code = failure.code;
        let reply: ErrorReply = failure.into_reply(id.clone());
        let header = Bytes::from(header::write(&reply));
        let Some(id) = id else {
            self.send(&self.done(dispatch, Some(code)), vec![header]);
            return;
        };
        self.send_done(dispatch, Some(code), id, vec![header]);
    }

    /// Sends a reply; one too large for the wire becomes an error of that kind. One that is not
    /// taken for another reason is computed again: the broker misses it in the next heartbeat.
    fn send_done(
        &self,
        dispatch: DispatchId,
        failed: Option<ErrorCode>,
        id: RequestId,
        frames: Vec<Bytes>,
    ) {
        let sent = self.try_send(&self.done(dispatch, failed), frames);
        if let Err(DealerSendErrorKind::TooLarge { bytes, max }) = sent {
            let message = format!(
                "the reply has {bytes} bytes, at most {max} can be sent: ask for fewer prompts or chunks at once"
            );
            let reply = Failure::new(ErrorCode::TooLarge, message).into_reply(Some(id));
            let header = Bytes::from(header::write(&reply));
            self.send(&self.done(dispatch, Some(ErrorCode::TooLarge)), vec![header]);
        }
    }

    fn done(&self, dispatch: DispatchId, failed: Option<ErrorCode>) -> Done {
        Done { epoch: self.identity.epoch, dispatch: dispatch.0, failed, ..Done::default() }
    }

    /// Sends to the broker; says whether the socket took it. What is not taken while the broker is
    /// away needs no keeping: after the reconnect clients ask again and `ready` tells the rest.
    fn send<H: Header>(&self, message: &H, attachments: Vec<Bytes>) -> bool {
        self.try_send(message, attachments).is_ok()
    }

    fn try_send<H: Header>(
        &self,
        message: &H,
        attachments: Vec<Bytes>,
    ) -> Result<(), DealerSendErrorKind> {
        let frames = frames::frames(message, attachments);
        let message = Message::new(frames).expect("a message has magic and header");
        self.broker.send(message).map_err(|error| {
            tracing::debug!(kind = H::KIND, %error, "not sent");
            error.kind
        })
    }
}

/// The adapter in `blob`, if it is the one of that name.
fn verify_adapter(adapter: AdapterId, blob: &[u8]) -> Result<PatchSet, Failure> {
    let found = AdapterId::of(blob);
    if found != adapter {
        let message = format!("the broker sent adapter {found} when asked for {adapter}");
        return Err(Failure::new(ErrorCode::Internal, message));
    }
    PatchSet::from_bytes(blob).map_err(|error| {
        Failure::new(ErrorCode::LoraRejected, format!("adapter {adapter}: {error}"))
    })
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
