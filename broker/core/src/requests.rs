//! The clients' requests that were accepted and not answered yet.
//!
//! What is computed for them is a task of its own, which several requests may wait for; this table
//! knows who waits, under which id, and until when.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::{ErrorCode, Failure, RequestId};

use crate::{peer::ClientPeer, tasks::TaskKey};

/// Names an accepted request. Keys grow in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestKey(u64);

/// Where a reply goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    pub(crate) client: ClientPeer,
    pub(crate) id: RequestId,
    /// Whether the request had the delimiter of a REQ socket.
    pub(crate) delimited: bool,
}

impl ReplyTo {
    /// Whether this is the request that `client` calls `id`.
    pub(crate) fn is(&self, client: ClientPeer, id: &RequestId) -> bool {
        self.client == client && self.id == *id
    }
}

/// One accepted `clip_encode`.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) reply_to: ReplyTo,
    /// What it waits for.
    pub(crate) task: TaskKey,
    pub(crate) received: Instant,
    pub(crate) budget: Duration,
}

/// Requests by key, by client and by deadline.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    entries: BTreeMap<RequestKey, Request>,
    by_client: BTreeMap<ClientPeer, BTreeMap<RequestId, RequestKey>>,
    deadlines: BTreeSet<(Instant, RequestKey)>,
    next: u64,
}

impl Request {
    /// When the answer is due.
    pub(crate) fn deadline(&self) -> Instant {
        self.received + self.budget
    }

    /// The answer when the budget ran out; `place` says where the request was.
    pub(crate) fn expired(&self, place: &str) -> Failure {
        expired(self.budget, place)
    }
}

impl Requests {
    /// Takes in a request whose id its client does not use yet.
    pub(crate) fn insert(&mut self, request: Request) -> RequestKey {
        let key = RequestKey(self.next);
        self.next += 1;
        let ReplyTo { client, id, .. } = request.reply_to.clone();
        let previous = self.by_client.entry(client).or_default().insert(id, key);
        debug_assert!(previous.is_none(), "a pending id is not accepted twice");
        self.deadlines.insert((request.deadline(), key));
        self.entries.insert(key, request);
        key
    }

    pub(crate) fn get(&self, key: RequestKey) -> Option<&Request> {
        self.entries.get(&key)
    }

    /// The pending request that `client` calls `id`.
    pub(crate) fn find(&self, client: ClientPeer, id: &RequestId) -> Option<RequestKey> {
        self.by_client.get(&client)?.get(id).copied()
    }

    /// Takes a request out, because it is answered or nobody waits for it.
    pub(crate) fn remove(&mut self, key: RequestKey) -> Option<Request> {
        let request = self.entries.remove(&key)?;
        self.deadlines.remove(&(request.deadline(), key));
        let ReplyTo { client, id, .. } = &request.reply_to;
        if let Some(ids) = self.by_client.get_mut(client) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_client.remove(client);
            }
        }
        Some(request)
    }

    /// The pending requests of `client`, in the order of their ids.
    pub(crate) fn of_client(&self, client: ClientPeer) -> Vec<RequestKey> {
        self.by_client.get(&client).into_iter().flat_map(BTreeMap::values).copied().collect()
    }

    /// The requests whose answer is due, earliest deadline first.
    pub(crate) fn expired(&self, now: Instant) -> Vec<RequestKey> {
        let due = self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now);
        due.map(|&(_, key)| key).collect()
    }

    /// When the next answer is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Every pending request, in the order of arrival.
    pub(crate) fn pending(&self) -> Vec<RequestKey> {
        self.entries.keys().copied().collect()
    }

    /// How many requests are pending.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// The answer when a budget ran out; `place` says where the request was.
pub(crate) fn expired(budget: Duration, place: &str) -> Failure {
    let budget_ms = budget.as_millis();
    let message =
        format!("the time budget of {budget_ms} ms ran out while the request was {place}");
    Failure::new(ErrorCode::DeadlineExceeded, message)
}
