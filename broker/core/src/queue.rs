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

/// How much may wait at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueLimits {
    pub(crate) count: usize,
    pub(crate) bytes: usize,
    /// Estimated time for every worker that serves the model; nothing before the farm has come
    /// together.
    pub(crate) us_per_worker: Option<u64>,
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
        if self.entries.len() >= limits.count {
            return Err(QueueFull::Count(self.entries.len()));
        }
        if self.bytes.saturating_add(entry.bytes) > limits.bytes {
            return Err(QueueFull::Bytes(self.bytes));
        }
        let counts = (held.count, self.entries.len(), limits.count);
        if !fits(counts.0 as u64, counts.1 as u64, counts.2 as u64)
            || !fits(held.bytes as u64, self.bytes as u64, limits.bytes as u64)
        {
            return Err(QueueFull::Share(held.count));
        }
        let Some(line) = self.models.get(&entry.model) else { return Ok(()) };
        let Some(us_max) = limits.us_per_worker else { return Ok(()) };
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
        let us_max = limits.us_per_worker.unwrap_or(u64::MAX).saturating_mul(workers);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tasks::testing_key;

    const MODEL: &str = "sd15";

    proptest! {
        #[test]
        fn clients_that_always_wait_get_equal_time(
            costs in prop::collection::vec(prop::collection::vec(1_u64..1000, 40), 2..5),
        ) {
            let mut queue = Queue::default();
            let mut key = 0;
            for number in 0..40 {
                for (client, costs) in (0..).zip(&costs) {
                    queue.insert(testing_key(key), entry(client, costs[number]));
                    key += 1;
                }
            }
            let mut served = vec![0_u64; costs.len()];
            // While everyone still waits, nobody is ahead by more than two of the largest.
            for _ in 0..40 {
                let (_, next) = queue.next(&MODEL.parse().unwrap(), None).unwrap();
                let entry = queue.entries[&next].clone();
                let client = (0..costs.len() as u64).find(|&c| ClientPeer::new(c) == entry.client);
                served[usize::try_from(client.unwrap()).unwrap()] += entry.cost_us;
                queue.take(next);
                let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
                prop_assert!(most - least <= 2 * 1000, "{served:?}");
            }
        }

        #[test]
        fn the_sums_are_those_of_what_waits(
            operations in prop::collection::vec((0_u64..30, 0_u64..4, 1_u64..1000, 0..3), 0..200),
        ) {
            let mut queue = Queue::default();
            for (key, client, cost, operation) in operations {
                let key = testing_key(key);
                match operation {
                    0 if queue.owner(key).is_none() => {
                        queue.insert(key, entry(client, cost));
                    }
                    1 => queue.take(key),
                    _ => drop(queue.remove(key)),
                }
                let entries = || queue.entries.values();
                prop_assert_eq!(queue.bytes, entries().map(|entry| entry.bytes).sum::<usize>());
                let us: u64 = entries().map(|entry| entry.cost_us).sum();
                prop_assert_eq!(queue.models.values().map(|line| line.queued_us).sum::<u64>(), us);
                let counts = queue.clients.values().map(|held| held.count).sum::<usize>();
                prop_assert_eq!(counts, queue.len());
                let ordered = queue.models.values().map(|line| line.order.len()).sum::<usize>();
                prop_assert_eq!(ordered, queue.len());
            }
        }
    }

    #[test]
    fn what_comes_back_stands_where_it_was() {
        let mut queue = Queue::default();
        let starts: Vec<_> =
            (0..3).map(|key| queue.insert(testing_key(key), entry(0, 10))).collect();
        queue.take(testing_key(0));
        queue.take(testing_key(1));
        queue.insert(testing_key(0), Entry { start: Some(starts[0]), ..entry(0, 10) });
        let next = queue.next(&MODEL.parse().unwrap(), None);
        assert_eq!(next, Some((starts[0], testing_key(0))));
    }

    #[test]
    fn nobody_saves_up_credit_by_being_idle() {
        let mut queue = Queue::default();
        for key in 0..10 {
            queue.insert(testing_key(key), entry(0, 10));
        }
        (0..9).for_each(|key| queue.take(testing_key(key)));
        let late = queue.insert(testing_key(20), entry(1, 10));
        assert_eq!(late, 80, "the virtual time, not zero");
    }

    fn entry(client: u64, cost_us: u64) -> Entry {
        let (model, client) = (MODEL.parse().unwrap(), ClientPeer::new(client));
        Entry { model, client, cost_us, bytes: 7, start: None }
    }
}
