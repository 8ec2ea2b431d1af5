//! The worker's one loop: broker, lanes, what is on its way, and time.
//!
//! It decides nothing: events go into [`Scheduler`], its commands come out and are performed here.
//!
//! * [`inbox`]: what the broker says,
//! * [`loading`]: adapters and models that arrive,
//! * [`commands`]: what the scheduler wants done,
//! * [`outbox`]: what the broker is told.

mod commands;
mod inbox;
mod loading;
mod outbox;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use adapter::PatchSet;
use protocol::{AdapterId, ExecutionMode, RequestId, WorkerName, worker::Disconnect};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use transport::{Dealer, DealerSender};
use worker_core::{DispatchId, Fetches, Scheduler};

use crate::{
    arrival::Arrival,
    blob_cache::CacheThread,
    catalog::{Catalog, ModelLoader},
    executor::Executor,
    interrupt::Interrupt,
    request::Request,
};

/// How often a worker shows that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

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
    pub(crate) scheduler: Scheduler,
    pub(crate) catalog: Catalog,
    pub(crate) loader: ModelLoader,
    pub(crate) cache: Option<CacheThread>,
    pub(crate) executor: Executor,
    /// What the threads of the loader and of the cache bring.
    pub(crate) arrivals: mpsc::UnboundedReceiver<Arrival>,
    /// The other end, for what the loop itself has verified beside it.
    pub(crate) arrived: mpsc::UnboundedSender<Arrival>,
}

/// Everything the loop holds.
pub(crate) struct Service {
    identity: Identity,
    scheduler: Scheduler,
    fetches: Fetches,
    /// The tensors of the adapters that the scheduler's registry knows in memory, on the device or
    /// on the host: on a CPU they are the same place.
    adapters: BTreeMap<AdapterId, Arc<PatchSet>>,
    /// The canonical bytes of the adapter that has just arrived, until it is known whether they
    /// are written to disk.
    unsaved: Option<(AdapterId, Vec<u8>)>,
    catalog: Catalog,
    loader: ModelLoader,
    cache: Option<CacheThread>,
    /// Requests that have not started.
    work: BTreeMap<DispatchId, WorkItem>,
    /// Requests that lanes have, whether or not the answer is still wanted.
    running: BTreeMap<DispatchId, Interrupt>,
    broker: DealerSender,
    executor: Executor,
    arrived: mpsc::UnboundedSender<Arrival>,
    announced_revision: Option<u64>,
    draining: bool,
}

/// A request of this worker, until it is answered.
struct WorkItem {
    id: RequestId,
    /// Until it is given to a lane.
    request: Option<Request>,
    attempt: u32,
    queued_ms: u32,
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
                Some(arrival) = arrivals.recv() => service.handle_arrival(arrival),
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

    fn new(parts: Parts, broker: DealerSender) -> (Self, mpsc::UnboundedReceiver<Arrival>) {
        let service = Self {
            identity: parts.identity,
            scheduler: parts.scheduler,
            fetches: Fetches::default(),
            adapters: BTreeMap::new(),
            unsaved: None,
            catalog: parts.catalog,
            loader: parts.loader,
            cache: parts.cache,
            work: BTreeMap::new(),
            running: BTreeMap::new(),
            broker,
            executor: parts.executor,
            arrived: parts.arrived,
            announced_revision: None,
            draining: false,
        };
        (service, parts.arrivals)
    }

    fn next_timeout(&self, give_up: Option<Instant>) -> Option<Instant> {
        [self.scheduler.poll_timeout(), self.fetches.poll_timeout(), give_up]
            .into_iter()
            .flatten()
            .min()
    }

    fn drain(&mut self) {
        let in_flight = self.scheduler.in_flight().count();
        tracing::info!(in_flight, "draining: taking no new work");
        self.draining = true;
        self.send_alive();
    }

    fn handle_timeout(&mut self) {
        let now = Instant::now();
        self.scheduler.handle_timeout(now);
        self.fetches.handle_timeout(now);
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
