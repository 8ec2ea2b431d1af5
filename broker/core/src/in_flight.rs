//! Which worker was given which request.
//!
//! A dispatch occupies a slot of its worker until the worker is known to have let go of it: it was
//! answered, or it is missing from a heartbeat. That includes dispatches that were cancelled; the
//! worker may still be busy with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use crate::{peer::WorkerPeer, requests::RequestKey};

/// Names one handing-over of one request to one worker. Ids start at a random number, so that the
/// `done` for a dispatch of an earlier broker is never taken for one of this broker's.
pub(crate) type DispatchId = u64;

/// Dispatches by worker, oldest first.
#[derive(Debug)]
pub(crate) struct InFlight {
    by_worker: BTreeMap<WorkerPeer, BTreeMap<DispatchId, Dispatch>>,
    next: DispatchId,
}

#[derive(Debug)]
struct Dispatch {
    /// The request, unless nobody waits for it any more.
    request: Option<RequestKey>,
    sent: Instant,
}

impl InFlight {
    /// An empty table whose first dispatch is `first`.
    pub(crate) fn new(first: DispatchId) -> Self {
        Self { by_worker: BTreeMap::new(), next: first }
    }

    /// Notes that `worker` is given `request`.
    pub(crate) fn begin(
        &mut self,
        worker: WorkerPeer,
        request: RequestKey,
        now: Instant,
    ) -> DispatchId {
        let dispatch = self.next;
        self.next = self.next.wrapping_add(1);
        let entry = Dispatch { request: Some(request), sent: now };
        self.by_worker.entry(worker).or_default().insert(dispatch, entry);
        dispatch
    }

    /// Frees the slot of an answered dispatch. Returns its request if somebody still waits.
    pub(crate) fn finish(
        &mut self,
        worker: WorkerPeer,
        dispatch: DispatchId,
    ) -> Option<RequestKey> {
        self.by_worker.get_mut(&worker)?.remove(&dispatch)?.request
    }

    /// Notes that nobody waits for a dispatch any more; its slot stays taken.
    pub(crate) fn abandon(&mut self, worker: WorkerPeer, dispatch: DispatchId) {
        let dispatches = self.by_worker.get_mut(&worker);
        if let Some(entry) = dispatches.and_then(|dispatches| dispatches.get_mut(&dispatch)) {
            entry.request = None;
        }
    }

    /// Takes out everything that `worker` had. Returns the requests somebody still waits for.
    pub(crate) fn remove_worker(&mut self, worker: WorkerPeer) -> Vec<RequestKey> {
        let dispatches = self.by_worker.remove(&worker).unwrap_or_default();
        dispatches.into_values().filter_map(|dispatch| dispatch.request).collect()
    }

    /// Moves what `worker` had to its new connection.
    pub(crate) fn move_worker(&mut self, from: WorkerPeer, to: WorkerPeer) {
        if let Some(dispatches) = self.by_worker.remove(&from) {
            self.by_worker.entry(to).or_default().extend(dispatches);
        }
    }

    /// Takes out what `worker` no longer holds: it does not list the dispatch, which was either
    /// abandoned or sent so long ago (before `sent_before`) that it must have arrived.
    /// Returns the requests somebody still waits for.
    pub(crate) fn reconcile(
        &mut self,
        worker: WorkerPeer,
        listed: &BTreeSet<DispatchId>,
        sent_before: Option<Instant>,
    ) -> Vec<(DispatchId, RequestKey)> {
        let Some(dispatches) = self.by_worker.get_mut(&worker) else { return Vec::new() };
        let mut lost = Vec::new();
        dispatches.retain(|&dispatch, entry| {
            let arrived = sent_before.is_some_and(|before| entry.sent < before);
            let gone = !listed.contains(&dispatch) && (entry.request.is_none() || arrived);
            if let (true, Some(request)) = (gone, entry.request) {
                lost.push((dispatch, request));
            }
            !gone
        });
        lost
    }

    /// The dispatches that somebody waits for, with their requests.
    pub(crate) fn of_worker(
        &self,
        worker: WorkerPeer,
    ) -> impl Iterator<Item = (DispatchId, RequestKey)> {
        let dispatches = self.by_worker.get(&worker).into_iter().flatten();
        dispatches.filter_map(|(&dispatch, entry)| Some((dispatch, entry.request?)))
    }

    /// Whether `worker` was given `dispatch` and has not been known to let go of it.
    pub(crate) fn has(&self, worker: WorkerPeer, dispatch: DispatchId) -> bool {
        self.by_worker.get(&worker).is_some_and(|dispatches| dispatches.contains_key(&dispatch))
    }

    /// Slots of `worker` that are taken.
    pub(crate) fn load(&self, worker: WorkerPeer) -> usize {
        self.by_worker.get(&worker).map_or(0, BTreeMap::len)
    }

    /// Dispatches that somebody waits for, over all workers.
    pub(crate) fn wanted(&self) -> usize {
        let dispatches = self.by_worker.values().flat_map(BTreeMap::values);
        dispatches.filter(|dispatch| dispatch.request.is_some()).count()
    }
}
