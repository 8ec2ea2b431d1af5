//! What is computed: one task for all pending requests that are equal.
//!
//! A task lives as long as somebody waits for it. Who asked first has no say in that: when that
//! client cancels or leaves, the task goes on for the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{AdapterId, ModelDigest, RequestDigest, RequestId};

use crate::{cost::Shape, in_flight::DispatchId, peer::WorkerPeer, requests::RequestKey};

/// Names a task. Keys grow in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TaskKey(u64);

/// One computation.
#[derive(Debug)]
pub(crate) struct Task {
    /// What is asked for.
    pub(crate) digest: RequestDigest,
    /// Whether equal requests may share it and its answer.
    pub(crate) is_shared: bool,
    /// The id that the payload names, and so does the worker's reply.
    pub(crate) payload_id: RequestId,
    /// The first client's header frame and its attachments, as they came.
    pub(crate) payload: Vec<Bytes>,
    pub(crate) shape: Shape,
    pub(crate) model_digest: Option<ModelDigest>,
    pub(crate) adapters: BTreeSet<AdapterId>,
    pub(crate) received: Instant,
    /// The requests that it answers, in the order of arrival.
    pub(crate) waiting: BTreeSet<RequestKey>,
    /// The start tag that it had in the queue.
    pub(crate) start: Option<u64>,
    /// How many workers were given it.
    pub(crate) attempts: u32,
    /// The worker that has it, unless it is queued.
    pub(crate) dispatched: Option<Dispatched>,
    /// The worker that it waits for, if that was found best.
    pub(crate) parked: Option<Parked>,
}

/// Where a task is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dispatched {
    pub(crate) peer: WorkerPeer,
    pub(crate) dispatch: DispatchId,
    /// When the worker was told that the answer is due.
    pub(crate) due: Instant,
}

/// That a task waits for a worker that is full, because that is faster than any other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parked {
    pub(crate) peer: WorkerPeer,
    /// What it will add to the worker's queue.
    pub(crate) work_us: u64,
    /// When to look again whether another one has become better.
    pub(crate) until: Instant,
}

/// Tasks by key, and the shared ones by what they compute.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    entries: BTreeMap<TaskKey, Task>,
    shared: BTreeMap<RequestDigest, TaskKey>,
    next: u64,
}

impl TaskKey {
    /// Its place in the order of arrival.
    pub(crate) const fn number(self) -> u64 {
        self.0
    }
}

impl Task {
    /// Bytes of the message that is kept.
    pub(crate) fn bytes(&self) -> usize {
        self.payload.iter().map(Bytes::len).sum()
    }
}

impl Parked {
    /// How long a parked task is left alone, unless its worker has room.
    pub(crate) const PATIENCE: Duration = Duration::from_millis(5);
}

impl Tasks {
    pub(crate) fn insert(&mut self, task: Task) -> TaskKey {
        let key = TaskKey(self.next);
        self.next += 1;
        if task.is_shared {
            let previous = self.shared.insert(task.digest, key);
            debug_assert!(previous.is_none(), "an equal request joins the task that there is");
        }
        self.entries.insert(key, task);
        key
    }

    pub(crate) fn get(&self, key: TaskKey) -> Option<&Task> {
        self.entries.get(&key)
    }

    pub(crate) fn get_mut(&mut self, key: TaskKey) -> Option<&mut Task> {
        self.entries.get_mut(&key)
    }

    /// The task that computes the same.
    pub(crate) fn equal_to(&self, digest: &RequestDigest) -> Option<TaskKey> {
        self.shared.get(digest).copied()
    }

    /// Takes out a task that is answered or that nobody waits for.
    pub(crate) fn remove(&mut self, key: TaskKey) -> Option<Task> {
        let task = self.entries.remove(&key)?;
        if task.is_shared {
            self.shared.remove(&task.digest);
        }
        Some(task)
    }

    /// Whether any task needs `adapter`.
    pub(crate) fn need(&self, adapter: &AdapterId) -> bool {
        self.entries.values().any(|task| task.adapters.contains(adapter))
    }

    /// The number that the next task will have.
    pub(crate) fn next_number(&self) -> u64 {
        self.next
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// A key as any.
#[cfg(test)]
pub(crate) const fn testing_key(number: u64) -> TaskKey {
    TaskKey(number)
}
