//! What operators ask of a farm: adapters brought into memory ahead of requests, and workers or a
//! broker that leave in peace.

use std::time::Duration;

use protocol::{
    AdapterId, ModelName, WorkerName, limits,
    reply::{DrainReply, WarmReply},
    request,
};

use crate::{client::Client, error::Error};

/// Adapters that workers are to bring into memory before requests need them.
#[derive(Debug, Clone)]
pub struct Warm {
    adapters: Vec<AdapterId>,
    model: Option<ModelName>,
    workers: u32,
    wait: Duration,
}

/// What drains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DrainTarget {
    /// The broker.
    Broker,
    /// The worker of this name.
    Worker(WorkerName),
}

impl Warm {
    /// Adapters that one worker each is to have, answered at once.
    pub fn new(adapters: impl IntoIterator<Item = AdapterId>) -> Self {
        let adapters = adapters.into_iter().collect();
        Self { adapters, model: None, workers: 1, wait: Duration::ZERO }
    }

    /// The model that they will be used with; else the one that most workers serve.
    #[must_use]
    pub fn model(mut self, model: ModelName) -> Self {
        self.model = Some(model);
        self
    }

    /// How many workers are to have each of them; no more than there are.
    #[must_use]
    pub fn workers(mut self, workers: u32) -> Self {
        self.workers = workers;
        self
    }

    /// How long to wait until they are there.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

impl DrainTarget {
    fn worker(self) -> Option<WorkerName> {
        match self {
            Self::Broker => None,
            Self::Worker(worker) => Some(worker),
        }
    }
}

impl Client {
    /// Has workers bring adapters into memory before requests need them, and tells who holds each
    /// of them and who is fetching it.
    ///
    /// # Errors
    /// Whatever the farm answers, for example that it does not hold an adapter.
    pub async fn warm(&self, warm: Warm) -> Result<WarmReply, Error> {
        let Warm { adapters, model, workers, wait } = warm;
        let longest = Duration::from_millis(u64::from(limits::BUDGET_MS_MAX));
        let wait = wait.min(longest);
        let budget_ms = u32::try_from(wait.as_millis()).ok().filter(|budget_ms| *budget_ms > 0);
        let timeout = self.timeout() + wait;
        self.ask_within(timeout, |id| request::Warm { id, adapters, model, workers, budget_ms })
            .await
    }

    /// Has a worker or the broker take nothing new and finish what it has. `reason` is told to
    /// whoever asks or waits.
    ///
    /// # Errors
    /// Whatever the farm answers, for example that it has no such worker.
    pub async fn drain(
        &self,
        target: DrainTarget,
        reason: Option<String>,
    ) -> Result<DrainReply, Error> {
        let worker = target.worker();
        self.ask(|id| request::Drain { id, worker, reason, undo: false }).await
    }

    /// Has a worker or the broker take requests again.
    ///
    /// # Errors
    /// Whatever the farm answers, for example that the broker stops.
    pub async fn undo_drain(&self, target: DrainTarget) -> Result<DrainReply, Error> {
        let worker = target.worker();
        self.ask(|id| request::Drain { id, worker, reason: None, undo: true }).await
    }
}
