//! What becomes of requests and workers when something fails.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use protocol::{
    ErrorCode, Failure, RequestDigest, WorkerName,
    limits::{DEATHS_BUSY_MAX, DEATHS_MAX},
    worker::{Busy, Death},
};

use super::{micros, millis};
use crate::{
    Broker, in_flight::Lost, outliers::Health, peer::WorkerPeer, queue::Entry, strikes::Died,
    tasks::TaskKey, workers::Worker,
};

impl Broker {
    /// Puts back what a worker had, without blame and at no cost.
    pub(super) fn requeue(&mut self, key: TaskKey) {
        let Some(task) = self.tasks.get_mut(key) else { return };
        task.dispatched = None;
        task.parked = None;
        let first = task.waiting.first().and_then(|&request| self.requests.get(request));
        let Some(client) = first.map(|request| request.reply_to.client) else { return };
        let task = self.tasks.get(key).expect("it was there a moment ago");
        let entry: Entry = self.entry(task, client);
        let start = self.queue.insert(key, entry);
        if let Some(task) = self.tasks.get_mut(key) {
            task.start = Some(start);
        }
        self.counters.requeued += 1;
    }

    /// Puts back what got lost, if there is a retry left for it.
    pub(super) fn retry(&mut self, key: TaskKey, now: Instant) {
        match self.retries.take(now) {
            Ok(()) => self.requeue(key),
            Err(wait) => {
                if let Some(task) = self.tasks.get_mut(key) {
                    task.dispatched = None;
                }
                let reason = "workers are lost faster than requests may be tried again";
                let failure = self.full(reason, Some(micros(wait)));
                self.fail_task(key, &failure);
            }
        }
    }

    /// Puts back what a worker had when it was lost, for which this may be the reason.
    pub(super) fn retry_suspect(&mut self, lost: Lost, worker: &Worker, now: Instant) {
        let Lost { task, digest, alone } = lost;
        let process = (worker.name.clone(), worker.epoch);
        self.strike(digest, Died { process, alone, at: now }, now);
        let Some(key) = task else { return };
        if let Some(task) = self.tasks.get_mut(key) {
            task.dispatched = None;
        }
        match self.check_quarantine(&digest, now) {
            Ok(()) => self.retry(key, now),
            Err(failure) => self.fail_task(key, &failure),
        }
    }

    fn strike(&mut self, digest: RequestDigest, died: Died, now: Instant) {
        let was_convicted = self.strikes.is_convicted(&digest, now);
        self.strikes.add(digest, died, now);
        let is_convicted = self.strikes.is_convicted(&digest, now);
        self.counters.quarantined += u64::from(is_convicted && !was_convicted);
    }

    /// Takes in what a worker's journal says about its earlier processes. What this broker saw
    /// itself is corrected and not counted again; a request that was answered since stays cleared.
    pub(super) fn record_deaths(&mut self, worker: &WorkerName, deaths: &[Death], now: Instant) {
        let deaths = &deaths[..deaths.len().min(DEATHS_MAX)];
        let news = self.deaths.tell(worker, deaths.iter().map(|death| death.epoch).collect());
        let mut left = DEATHS_BUSY_MAX;
        for Death { epoch, ago_s, busy_with } in deaths {
            let Some(struck) = news.get(epoch) else { continue };
            let process = (worker.clone(), *epoch);
            let at = now.checked_sub(Duration::from_secs(u64::from(*ago_s)));
            let mut waited = struck.clone();
            for &Busy { key, alone } in busy_with.iter().take(left) {
                waited.remove(&key);
                let is_cleared = struck.contains(&key) && !self.strikes.has(&key, &process);
                if let Some(at) = at.filter(|_| !is_cleared) {
                    self.strike(key, Died { process: process.clone(), alone, at }, now);
                }
            }
            left = left.saturating_sub(busy_with.len());
            for key in waited {
                self.strikes.take_back(&key, &process);
            }
        }
    }

    /// Refuses a request that workers died of, whoever sends it.
    pub(super) fn check_quarantine(
        &self,
        digest: &RequestDigest,
        now: Instant,
    ) -> Result<(), Failure> {
        if self.strikes.is_convicted(digest, now) {
            return Err(self.worker_lost(digest, now));
        }
        Ok(())
    }

    fn worker_lost(&self, digest: &RequestDigest, now: Instant) -> Failure {
        let died = self.strikes.died(digest, now);
        let count = died.len();
        let names: BTreeSet<_> = died.map(|(name, _)| format!("`{name}`")).collect();
        let names: Vec<_> = names.into_iter().collect();
        let remembered = self.strikes.remembered(digest, now);
        let message = format!(
            "{count} workers were lost while they had the request ({}): it is not tried again for {} s",
            names.join(", "),
            remembered.as_secs()
        );
        let failure = Failure::new(ErrorCode::WorkerLost, message);
        Failure { retry_after_ms: Some(millis(remembered)), ..failure }
    }

    /// Notes that a worker answered as it should.
    pub(super) fn worker_succeeded(&mut self, peer: WorkerPeer) {
        if self.outliers.succeeded(peer) {
            self.routes.set_health(peer, Health::Well);
        }
    }

    /// Notes that a worker failed, and leaves it out for a while if others do better.
    pub(super) fn worker_failed(&mut self, peer: WorkerPeer, now: Instant) {
        if self.outliers.failed(peer) && self.may_eject(peer) {
            self.outliers.eject(peer, now);
            self.routes.set_health(peer, Health::Ejected);
            self.counters.ejected += 1;
        }
    }

    /// Workers whose time is over are tried again, with one request each.
    pub(super) fn probe_outliers(&mut self, now: Instant) {
        for peer in self.outliers.due(now) {
            self.routes.set_health(peer, Health::Probing);
        }
    }

    /// Whether others do not fail where this worker does, and enough of them are left: of every
    /// model that it serves, at least half of the workers.
    fn may_eject(&self, peer: WorkerPeer) -> bool {
        let Some(worker) = self.workers.get(peer) else { return false };
        let mut others_are_well = false;
        for model in &worker.models {
            let serving = || self.workers.iter().filter(|(_, other)| other.models.contains(model));
            let is_out = |&(other, _): &(WorkerPeer, &Worker)| {
                self.outliers.health(other) == Health::Ejected
            };
            let out = serving().filter(is_out).count() + 1;
            if 2 * out > serving().count() {
                return false;
            }
            let well = |(other, _)| other != peer && !self.outliers.is_failing(other);
            others_are_well |= serving().any(well);
        }
        others_are_well
    }
}
