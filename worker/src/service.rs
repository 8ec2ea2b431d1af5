//! The worker's one loop: broker, lanes, what is on its way, and time.
//!
//! It decides nothing: events go into [`Scheduler`], its commands come out and are performed here.
//!
//! * [`inbox`]: what the broker says,
//! * [`loading`]: adapters and models that arrive,
//! * [`commands`]: what the scheduler wants done,
//! * [`registering`]: models that are to be served from now on,
//! * [`draining`]: taking nothing new, and leaving,
//! * [`outbox`]: what the broker is told.

mod commands;
mod draining;
mod inbox;
mod loading;
mod outbox;
mod registering;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use adapter::PatchSet;
use protocol::{
    AdapterId, ExecutionMode, RequestId, WorkerName,
    worker::{Busy, Disconnect},
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use transport::{Dealer, DealerSender};
use worker_core::{DispatchId, Fetches, Scheduler};

use self::draining::Drain;
use crate::{
    arrival::Arrival,
    blob_cache::CacheThread,
    executor::Executor,
    interrupt::Interrupt,
    journal::Journal,
    models::{Catalogue, ModelDirectory, ModelFiles, ModelLoader, Registrations},
    request::Request,
};

/// How often a worker shows that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

/// Adapters that are fetched at a time.
const ADAPTER_FETCHES_MAX: usize = 4;

/// Files of models that are fetched at a time.
const MODEL_FETCHES_MAX: usize = 2;

/// Who this worker is; constant while the process lives.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) worker: WorkerName,
    pub(crate) epoch: u64,
    pub(crate) device: String,
    /// The mode of requests that leave it to the worker.
    pub(crate) mode: ExecutionMode,
}

/// What a service is made of.
pub(crate) struct Parts {
    pub(crate) identity: Identity,
    pub(crate) journal: Option<Journal>,
    pub(crate) scheduler: Scheduler,
    pub(crate) catalogue: Catalogue,
    pub(crate) loader: ModelLoader,
    pub(crate) files: ModelFiles,
    pub(crate) directory: ModelDirectory,
    pub(crate) cache: Option<CacheThread>,
    pub(crate) executor: Executor,
    /// What the threads of the models and of the cache bring.
    pub(crate) arrivals: mpsc::UnboundedReceiver<Arrival>,
    /// The other end, for what the loop itself has verified beside it.
    pub(crate) arrived: mpsc::UnboundedSender<Arrival>,
}

/// Everything the loop holds.
pub(crate) struct Service {
    identity: Identity,
    /// What this process is busy with, for the next one to tell.
    journal: Option<Journal>,
    scheduler: Scheduler,
    fetches: Fetches,
    /// What has arrived of adapters that are being fetched.
    partial: BTreeMap<AdapterId, Vec<u8>>,
    /// The tensors of the adapters that the scheduler's registry knows in memory, on the device or
    /// on the host: on a CPU they are the same place.
    adapters: BTreeMap<AdapterId, Arc<PatchSet>>,
    /// The canonical bytes of the adapter that has just arrived, until it is known whether they
    /// are written to disk.
    unsaved: Option<(AdapterId, Vec<u8>)>,
    catalogue: Catalogue,
    loader: ModelLoader,
    registrations: Registrations,
    files: ModelFiles,
    /// Files of models, apart from adapters, which never wait for them.
    model_fetches: Fetches,
    /// Deleted with the service if it is a temporary one.
    _directory: ModelDirectory,
    cache: Option<CacheThread>,
    /// Requests that have not started.
    work: BTreeMap<DispatchId, WorkItem>,
    /// Requests that lanes have, whether or not the answer is still wanted.
    running: BTreeMap<DispatchId, Interrupt>,
    broker: DealerSender,
    executor: Executor,
    arrived: mpsc::UnboundedSender<Arrival>,
    announced_revision: Option<u64>,
    /// The digest of the inventory of a revision.
    digest: Option<(u64, u64)>,
    draining: bool,
    drain: Drain,
}

/// A request of this worker, until it is answered.
struct WorkItem {
    id: RequestId,
    /// Until it is given to a lane.
    request: Option<Request>,
    attempt: u32,
    queued_ms: u32,
    /// What is noted in the journal while this worker is busy with it.
    busy: Option<Busy>,
}

/// The socket's thread has failed.
#[derive(Debug, thiserror::Error)]
#[error("the socket's thread ended: see the lines above")]
pub(crate) struct SocketClosed;

impl Service {
    /// Serves until `shutdown` resolves and what is in hand is done, or until `grace` is over.
    pub(crate) async fn serve(
        parts: Parts,
        mut dealer: Dealer,
        shutdown: impl Future<Output = ()>,
        grace: Duration,
    ) -> Result<(), SocketClosed> {
        let (mut service, mut arrivals) = Self::new(parts, dealer.sender());
        let mut outcomes = service.executor.take_outcomes();
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(shutdown);
        loop {
            service.perform_commands();
            if service.scheduler.is_idle() && service.drain.may_leave(Instant::now()) {
                tracing::info!("drained, leaving");
                break;
            }
            let timeout = service.next_timeout();
            tokio::select! {
                biased;
                () = &mut shutdown, if !service.drain.is_stopping() => service.stop(grace),
                Some(outcome) = outcomes.recv() => service.handle_outcome(outcome),
                Some(arrival) = arrivals.recv() => service.handle_arrival(arrival),
                event = dealer.recv() => service.handle_dealer(event.ok_or(SocketClosed)?),
                _ = heartbeat.tick() => service.send_alive(),
                () = sleep_until(timeout) => service.handle_timeout(),
            }
            if service.drain.must_leave(Instant::now()) {
                tracing::warn!(?grace, "the grace period is over, leaving work behind");
                break;
            }
        }
        if let Some(journal) = &mut service.journal {
            journal.close();
        }
        service.send(&Disconnect { epoch: service.identity.epoch }, Vec::new());
        dealer.close().await;
        Ok(())
    }

    fn new(parts: Parts, broker: DealerSender) -> (Self, mpsc::UnboundedReceiver<Arrival>) {
        let service = Self {
            identity: parts.identity,
            journal: parts.journal,
            scheduler: parts.scheduler,
            fetches: Fetches::new(ADAPTER_FETCHES_MAX),
            partial: BTreeMap::new(),
            adapters: BTreeMap::new(),
            unsaved: None,
            catalogue: parts.catalogue,
            loader: parts.loader,
            registrations: Registrations::default(),
            files: parts.files,
            model_fetches: Fetches::new(MODEL_FETCHES_MAX),
            _directory: parts.directory,
            cache: parts.cache,
            work: BTreeMap::new(),
            running: BTreeMap::new(),
            broker,
            executor: parts.executor,
            arrived: parts.arrived,
            announced_revision: None,
            digest: None,
            draining: false,
            drain: Drain::default(),
        };
        (service, parts.arrivals)
    }

    fn next_timeout(&self) -> Option<Instant> {
        let fetches = [self.fetches.poll_timeout(), self.model_fetches.poll_timeout()];
        let leaving = self.drain.timeout(Instant::now());
        [self.scheduler.poll_timeout(), leaving].into_iter().chain(fetches).flatten().min()
    }

    /// Notes that this worker begins to read, load for or compute a dispatch.
    fn note_begin(&mut self, dispatch: DispatchId, busy: Option<Busy>) {
        if let (Some(journal), Some(busy)) = (&mut self.journal, busy) {
            journal.begin(dispatch, busy);
        }
    }

    /// Notes that it is done with a dispatch, or that the dispatch merely waits. A lane that has it
    /// goes on with it, wanted or not.
    fn note_end(&mut self, dispatch: DispatchId) {
        if let Some(journal) =
            self.journal.as_mut().filter(|_| !self.running.contains_key(&dispatch))
        {
            journal.end(dispatch);
        }
    }

    fn handle_timeout(&mut self) {
        let now = Instant::now();
        self.scheduler.handle_timeout(now);
        self.fetches.handle_timeout(now);
        self.model_fetches.handle_timeout(now);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
