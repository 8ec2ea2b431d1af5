//! The requests that wait for a worker: fair between clients, bounded in time and bytes.
//!
//! There is one queue for every model name, because different workers serve them. Inside, clients
//! share the workers' time, not the number of requests: start-time fair queueing, which is deficit
//! round robin with the quantum made as small as it gets. Every request has a start tag: the
//! virtual time at which its client's work before it would be done if all clients had equal
//! shares. Requests go out by tag, so a client that asks for little is never behind one that asks
//! for much, and nobody saves up credit by being idle.
//!
//! ```text
//! start = max(virtual time, finish of the client's last)    finish = start + estimated cost
//! virtual time = start of the request that was taken last
//! ```
//!
//! A client may fill twice what is still free (dynamic thresholds, Choudhury and Hahne 1998): one
//! alone gets two thirds of the queue, and there is always room left for the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Unbounded},
};

use protocol::ModelName;

use crate::{peer::ClientPeer, tasks::TaskKey};

/// How often what is still free one client may fill.
const CLIENT_SHARE: u64 = 2;

/// A place in the queue of one model.
pub(crate) type Place = (u64, TaskKey);

/// What waits, and for whom.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) model: ModelName,
    pub(crate) client: ClientPeer,
    /// Estimated time on a device.
    pub(crate) cost_us: u64,
    /// Bytes of the message that is kept.
    pub(crate) bytes: usize,
    /// The tag that it had when it waited before.
    pub(crate) start: Option<u64>,
}

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueLimits {
    pub(crate) count_max: usize,
    pub(crate) bytes_max: usize,
    /// Estimated time for every worker that serves the model; nothing before the farm has come
    /// together.
    pub(crate) us_per_worker_max: Option<u64>,
}

/// Why no more requests can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueFull {
    #[error("{0} requests wait for a worker already, which is the limit")]
    Count(usize),
    #[error("requests of {0} bytes wait for a worker already, which is the limit")]
    Bytes(usize),
    #[error("work for {} ms waits for the workers of this model already, which is the limit", .0 / 1000)]
    Time(u64),
    #[error("this client has its share of the queue already: {0} requests wait")]
    Share(usize),
}

/// Queues by model.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    models: BTreeMap<ModelName, Line>,
    entries: BTreeMap<TaskKey, Entry>,
    clients: BTreeMap<ClientPeer, Held>,
    bytes: usize,
}

/// What one client has waiting, over all models.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    count: usize,
    bytes: usize,
}

/// The queue of one model.
#[derive(Debug, Default)]
struct Line {
    order: BTreeSet<Place>,
    clients: BTreeMap<ClientPeer, ClientLine>,
    queued_us: u64,
    virtual_us: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct ClientLine {
    count: usize,
    queued_us: u64,
    finish_us: u64,
}

impl Queue {
    /// Whether a new request may wait while `workers` serve its model.
    pub(crate) fn admit(
        &self,
        entry: &Entry,
        limits: QueueLimits,
        workers: usize,
    ) -> Result<(), QueueFull> {
        let held = self.clients.get(&entry.client).copied().unwrap_or_default();
        let fits = |mine: u64, all: u64, max: u64| {
            mine <= CLIENT_SHARE.saturating_mul(max.saturating_sub(all))
        };
        if self.entries.len() >= limits.count_max {
            return Err(QueueFull::Count(self.entries.len()));
        }
        if self.bytes.saturating_add(entry.bytes) > limits.bytes_max {
            return Err(QueueFull::Bytes(self.bytes));
        }
        let counts = (held.count, self.entries.len(), limits.count_max);
        if !fits(counts.0 as u64, counts.1 as u64, counts.2 as u64)
            || !fits(held.bytes as u64, self.bytes as u64, limits.bytes_max as u64)
        {
            return Err(QueueFull::Share(held.count));
        }
        let Some(line) = self.models.get(&entry.model) else { return Ok(()) };
        let Some(us_max) = limits.us_per_worker_max else { return Ok(()) };
        let us_max = us_max.saturating_mul(workers.max(1) as u64);
        if line.queued_us.saturating_add(entry.cost_us) > us_max {
            return Err(QueueFull::Time(line.queued_us));
        }
        let mine = line.clients.get(&entry.client).map_or(0, |client| client.queued_us);
        if !fits(mine, line.queued_us, us_max) {
            return Err(QueueFull::Share(held.count));
        }
        Ok(())
    }

    /// About how long a new request of `client` would wait while `workers` serve the model: its
    /// fair share of what waits, or all of it where that is less.
    pub(crate) fn wait_us(&self, model: &ModelName, client: ClientPeer, workers: usize) -> u64 {
        let Some(line) = self.models.get(model) else { return 0 };
        let mine = line.clients.get(&client).copied().unwrap_or_default();
        let active = line.clients.values().filter(|other| other.count > 0).count();
        let active = active + usize::from(mine.count == 0);
        let ahead = mine.queued_us.saturating_mul(active as u64).min(line.queued_us);
        ahead / workers.max(1) as u64
    }

    /// About how long it takes until there is room for one more request of `model`.
    pub(crate) fn room_us(&self, entry: &Entry, limits: QueueLimits, workers: usize) -> u64 {
        let Some(line) = self.models.get(&entry.model) else { return 0 };
        let workers = workers.max(1) as u64;
        let one = line.queued_us / line.order.len().max(1) as u64;
        let us_max = limits.us_per_worker_max.unwrap_or(u64::MAX).saturating_mul(workers);
        let excess = line.queued_us.saturating_add(entry.cost_us).saturating_sub(us_max);
        one.max(excess) / workers
    }

    /// Lets a request wait, and says which start tag it has. Limits are for [`Queue::admit`]: what
    /// was accepted once and comes back from a worker is never refused.
    pub(crate) fn insert(&mut self, key: TaskKey, mut entry: Entry) -> u64 {
        debug_assert!(!self.entries.contains_key(&key), "a request waits once");
        let line = self.models.entry(entry.model.clone()).or_default();
        let client = line.clients.entry(entry.client).or_default();
        let start = entry.start.unwrap_or_else(|| {
            let start = line.virtual_us.max(client.finish_us);
            client.finish_us = start.saturating_add(entry.cost_us);
            start
        });
        entry.start = Some(start);
        client.count += 1;
        client.queued_us = client.queued_us.saturating_add(entry.cost_us);
        line.queued_us = line.queued_us.saturating_add(entry.cost_us);
        line.order.insert((start, key));
        let held = self.clients.entry(entry.client).or_default();
        held.count += 1;
        held.bytes += entry.bytes;
        self.bytes += entry.bytes;
        self.entries.insert(key, entry);
        start
    }

    /// Takes out a request that goes to a worker.
    pub(crate) fn take(&mut self, key: TaskKey) {
        if let Some(Entry { model, start: Some(start), .. }) = self.remove(key)
            && let Some(line) = self.models.get_mut(&model)
        {
            line.virtual_us = line.virtual_us.max(start);
        }
    }

    /// Takes out a request that is no longer wanted, whether or not it waits.
    pub(crate) fn remove(&mut self, key: TaskKey) -> Option<Entry> {
        let entry = self.entries.remove(&key)?;
        self.bytes -= entry.bytes;
        if let Some(held) = self.clients.get_mut(&entry.client) {
            held.count -= 1;
            held.bytes -= entry.bytes;
            if held.count == 0 {
                self.clients.remove(&entry.client);
            }
        }
        if let Some(line) = self.models.get_mut(&entry.model) {
            line.remove(key, &entry);
            if line.order.is_empty() {
                self.models.remove(&entry.model);
            }
        }
        Some(entry)
    }

    /// The first model that something waits for, or the first after `previous`.
    pub(crate) fn next_model(&self, previous: Option<&ModelName>) -> Option<ModelName> {
        let from = previous.map_or(Unbounded, Excluded);
        self.models.range::<ModelName, _>((from, Unbounded)).next().map(|(model, _)| model.clone())
    }

    /// The first place in the queue of a model, or the first after `previous`.
    pub(crate) fn next(&self, model: &ModelName, previous: Option<Place>) -> Option<Place> {
        let from = previous.map_or(Unbounded, Excluded);
        self.models.get(model)?.order.range((from, Unbounded)).next().copied()
    }

    /// The client on whose behalf a request waits.
    pub(crate) fn owner(&self, key: TaskKey) -> Option<ClientPeer> {
        self.entries.get(&key).map(|entry| entry.client)
    }

    /// Everything that waits, oldest first.
    pub(crate) fn keys(&self) -> impl Iterator<Item = TaskKey> {
        self.entries.keys().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Line {
    fn remove(&mut self, key: TaskKey, entry: &Entry) {
        self.order.remove(&(entry.start.unwrap_or_default(), key));
        self.queued_us = self.queued_us.saturating_sub(entry.cost_us);
        if let Some(client) = self.clients.get_mut(&entry.client) {
            client.count -= 1;
            client.queued_us = client.queued_us.saturating_sub(entry.cost_us);
            if client.count == 0 && client.finish_us <= self.virtual_us {
                self.clients.remove(&entry.client);
            }
        }
    }
}
