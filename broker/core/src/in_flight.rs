//! Which worker was given which request.
//!
//! A dispatch occupies a slot of its worker until the worker is known to have let go of it: it was
//! answered, or it is missing from a heartbeat. That includes dispatches that were cancelled; the
//! worker may still be busy with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use protocol::RequestDigest;

use crate::{
    peer::WorkerPeer,
    routing::{Busy, Loading},
    tasks::TaskKey,
};

/// Names one handing-over of one request to one worker. Ids start at a random number, so that the
/// `done` for a dispatch of an earlier broker is never taken for one of this broker's.
pub(crate) type DispatchId = u64;

/// Dispatches by worker, oldest first.
#[derive(Debug)]
pub(crate) struct InFlight {
    by_worker: BTreeMap<WorkerPeer, Flights>,
    next: DispatchId,
}

/// What one worker has.
#[derive(Debug)]
struct Flights {
    dispatches: BTreeMap<DispatchId, Dispatch>,
    /// Sum of the estimates.
    estimate_us: u64,
    /// Since when the oldest dispatch has the worker to itself, as far as is known: workers begin
    /// in the order in which they were given work.
    running_since: Instant,
}

#[derive(Debug)]
struct Dispatch {
    /// What is computed, unless nobody waits for it any more.
    task: Option<TaskKey>,
    digest: RequestDigest,
    /// Whether the worker has nothing else.
    alone: bool,
    sent: Instant,
    estimate: Estimate,
}

/// A task that a worker is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given {
    pub(crate) task: TaskKey,
    /// What is asked for.
    pub(crate) digest: RequestDigest,
    /// Whether the worker has nothing else while it has this.
    pub(crate) alone: bool,
    pub(crate) estimate: Estimate,
}

/// What a worker had when it was lost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lost {
    /// The task, if somebody still waits for it.
    pub(crate) task: Option<TaskKey>,
    pub(crate) digest: RequestDigest,
    pub(crate) alone: bool,
}

/// What was expected of a dispatch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Estimate {
    /// Loading and computing.
    pub(crate) work_us: u64,
    /// What had to be loaded.
    pub(crate) loading: Loading,
}

/// A dispatch that the worker answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finished {
    /// What was computed, if somebody still waits for it.
    pub(crate) task: Option<TaskKey>,
    pub(crate) loading: Loading,
    /// Time that the worker took, without what it had to do before.
    pub(crate) service_us: u64,
}

impl InFlight {
    /// An empty table whose first dispatch is `first`.
    pub(crate) fn new(first: DispatchId) -> Self {
        Self { by_worker: BTreeMap::new(), next: first }
    }

    /// Notes that `worker` is given a task.
    pub(crate) fn begin(&mut self, worker: WorkerPeer, given: Given, now: Instant) -> DispatchId {
        let Given { task, digest, alone, estimate } = given;
        let dispatch = self.next;
        self.next = self.next.wrapping_add(1);
        let flights = self.by_worker.entry(worker).or_insert_with(|| Flights::new(now));
        flights.insert(
            dispatch,
            Dispatch { task: Some(task), digest, alone, sent: now, estimate },
            now,
        );
        dispatch
    }

    /// Frees the slot of an answered dispatch.
    pub(crate) fn finish(
        &mut self,
        worker: WorkerPeer,
        dispatch: DispatchId,
        now: Instant,
    ) -> Option<Finished> {
        let flights = self.by_worker.get_mut(&worker)?;
        let since = flights.running_since;
        let Dispatch { task, sent, estimate, .. } = flights.remove(dispatch)?;
        flights.running_since = now;
        let service = now.saturating_duration_since(sent.max(since));
        let service_us = u64::try_from(service.as_micros()).unwrap_or(u64::MAX);
        Some(Finished { task, loading: estimate.loading, service_us })
    }

    /// The work that `worker` has, with times counted from `start`.
    pub(crate) fn busy(&self, worker: WorkerPeer, start: Instant) -> Busy {
        let Some(flights) = self.by_worker.get(&worker) else { return Busy::default() };
        let Some(oldest) = flights.dispatches.values().next() else { return Busy::default() };
        let oldest_us = oldest.estimate.work_us;
        let since = flights.running_since.saturating_duration_since(start);
        let since_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Busy {
            taken: flights.dispatches.len(),
            free_at_us: since_us.saturating_add(flights.estimate_us),
            // What runs longer than expected is not nearly done for that.
            floor_us: flights.estimate_us.saturating_sub(oldest_us) + oldest_us / 4,
        }
    }

    /// Notes that nobody waits for a dispatch any more; its slot stays taken.
    pub(crate) fn abandon(&mut self, worker: WorkerPeer, dispatch: DispatchId) {
        let flights = self.by_worker.get_mut(&worker);
        if let Some(entry) = flights.and_then(|flights| flights.dispatches.get_mut(&dispatch)) {
            entry.task = None;
        }
    }

    /// Takes out everything that `worker` had.
    pub(crate) fn remove_worker(&mut self, worker: WorkerPeer) -> Vec<Lost> {
        let flights = self.by_worker.remove(&worker).into_iter();
        let dispatches = flights.flat_map(|flights| flights.dispatches.into_values());
        let lost = |Dispatch { task, digest, alone, .. }| Lost { task, digest, alone };
        dispatches.map(lost).collect()
    }

    /// Moves what `worker` had to its new connection.
    pub(crate) fn move_worker(&mut self, from: WorkerPeer, to: WorkerPeer) {
        if let Some(flights) = self.by_worker.remove(&from) {
            self.by_worker.insert(to, flights);
        }
    }

    /// Takes out what `worker` no longer holds: it does not list the dispatch, which was either
    /// abandoned or sent so long ago (before `sent_before`) that it must have arrived.
    /// Returns the tasks somebody still waits for.
    pub(crate) fn reconcile(
        &mut self,
        worker: WorkerPeer,
        listed: &BTreeSet<DispatchId>,
        sent_before: Option<Instant>,
    ) -> Vec<(DispatchId, TaskKey)> {
        let Some(flights) = self.by_worker.get_mut(&worker) else { return Vec::new() };
        let gone = |(dispatch, entry): (&DispatchId, &Dispatch)| {
            let arrived = sent_before.is_some_and(|before| entry.sent < before);
            let gone = !listed.contains(dispatch) && (entry.task.is_none() || arrived);
            gone.then_some(*dispatch)
        };
        let gone: Vec<_> = flights.dispatches.iter().filter_map(gone).collect();
        let lost = gone.into_iter().filter_map(|dispatch| {
            flights.remove(dispatch).and_then(|entry| Some((dispatch, entry.task?)))
        });
        lost.collect()
    }

    /// The dispatches that somebody waits for, with their tasks.
    pub(crate) fn of_worker(
        &self,
        worker: WorkerPeer,
    ) -> impl Iterator<Item = (DispatchId, TaskKey)> {
        let flights = self.by_worker.get(&worker).into_iter();
        let dispatches = flights.flat_map(|flights| &flights.dispatches);
        dispatches.filter_map(|(&dispatch, entry)| Some((dispatch, entry.task?)))
    }

    /// Whether `worker` was given `dispatch` and has not been known to let go of it.
    pub(crate) fn has(&self, worker: WorkerPeer, dispatch: DispatchId) -> bool {
        self.by_worker
            .get(&worker)
            .is_some_and(|flights| flights.dispatches.contains_key(&dispatch))
    }

    /// Whether any worker has a request, waited for or not.
    pub(crate) fn is_in_hand(&self, digest: &RequestDigest) -> bool {
        let mut dispatches =
            self.by_worker.values().flat_map(|flights| flights.dispatches.values());
        dispatches.any(|dispatch| dispatch.digest == *digest)
    }

    /// Slots of `worker` that are taken.
    pub(crate) fn load(&self, worker: WorkerPeer) -> usize {
        self.by_worker.get(&worker).map_or(0, |flights| flights.dispatches.len())
    }

    /// Dispatches that somebody waits for, over all workers.
    pub(crate) fn wanted(&self) -> usize {
        let dispatches = self.by_worker.values().flat_map(|flights| flights.dispatches.values());
        dispatches.filter(|dispatch| dispatch.task.is_some()).count()
    }
}

impl Flights {
    fn new(now: Instant) -> Self {
        Self { dispatches: BTreeMap::new(), estimate_us: 0, running_since: now }
    }

    fn insert(&mut self, dispatch: DispatchId, entry: Dispatch, now: Instant) {
        if self.dispatches.is_empty() {
            self.running_since = now;
        }
        self.estimate_us = self.estimate_us.saturating_add(entry.estimate.work_us);
        self.dispatches.insert(dispatch, entry);
    }

    fn remove(&mut self, dispatch: DispatchId) -> Option<Dispatch> {
        let entry = self.dispatches.remove(&dispatch)?;
        self.estimate_us = self.estimate_us.saturating_sub(entry.estimate.work_us);
        Some(entry)
    }
}
