//! The requests that wait for a worker, first come first served.
//!
//! Keys grow in the order of arrival, so a request that comes back from a lost worker stands in
//! front of everything that arrived after it, and several of them keep their order.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use crate::requests::RequestKey;

/// A bounded first-in first-out queue of keys.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Bytes held by each waiting request.
    waiting: BTreeMap<RequestKey, usize>,
    bytes: usize,
    count_max: usize,
    bytes_max: usize,
}

/// Why no more requests can wait.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueFull {
    #[error("{0} requests wait for a worker already, which is the limit")]
    Count(usize),
    #[error("requests of {0} bytes wait for a worker already, which is the limit")]
    Bytes(usize),
}

impl Queue {
    pub(crate) fn new(count_max: usize, bytes_max: usize) -> Self {
        Self { waiting: BTreeMap::new(), bytes: 0, count_max, bytes_max }
    }

    /// Whether a new request of `bytes` may wait.
    pub(crate) fn admit(&self, bytes: usize) -> Result<(), QueueFull> {
        if self.waiting.len() >= self.count_max {
            return Err(QueueFull::Count(self.waiting.len()));
        }
        if self.bytes.saturating_add(bytes) > self.bytes_max {
            return Err(QueueFull::Bytes(self.bytes));
        }
        Ok(())
    }

    /// Lets a request wait at its place. Limits are for [`Queue::admit`]: what was accepted once
    /// and comes back from a worker is never refused.
    pub(crate) fn insert(&mut self, key: RequestKey, bytes: usize) {
        let previous = self.waiting.insert(key, bytes);
        debug_assert!(previous.is_none(), "a request waits once");
        self.bytes += bytes;
    }

    /// Takes a request out, whether or not it waits.
    pub(crate) fn remove(&mut self, key: RequestKey) {
        if let Some(bytes) = self.waiting.remove(&key) {
            self.bytes -= bytes;
        }
    }

    /// The first waiting request, or the first after `previous`.
    pub(crate) fn next(&self, previous: Option<RequestKey>) -> Option<RequestKey> {
        let from = previous.map_or(Unbounded, Excluded);
        self.waiting.range((from, Unbounded)).next().map(|(&key, _)| key)
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, key: RequestKey) -> bool {
        self.waiting.contains_key(&key)
    }
}
