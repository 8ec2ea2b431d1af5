//! Clients that wait until adapters are warm.

use std::time::Instant;

use protocol::{AdapterId, RequestId};

use crate::{peer::ClientPeer, requests::ReplyTo};

/// One client's wait.
#[derive(Debug)]
pub(crate) struct Warming {
    pub(crate) reply_to: ReplyTo,
    /// In the order asked.
    pub(crate) adapters: Vec<AdapterId>,
    pub(crate) deadline: Instant,
}

/// Everybody who waits, in the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Warms {
    waiting: Vec<Warming>,
}

impl Warms {
    pub(crate) fn insert(&mut self, warming: Warming) {
        self.waiting.push(warming);
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether `client` waits under this id.
    pub(crate) fn is_awaited(&self, client: ClientPeer, id: &RequestId) -> bool {
        self.waiting.iter().any(|warming| warming.reply_to.is(client, id))
    }

    pub(crate) fn forget_client(&mut self, client: ClientPeer) {
        self.waiting.retain(|warming| warming.reply_to.client != client);
    }

    /// Takes out those whose wait is over.
    pub(crate) fn take(&mut self, is_over: impl Fn(&Warming) -> bool) -> Vec<Warming> {
        self.waiting.extract_if(.., |warming| is_over(warming)).collect()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.iter().map(|warming| warming.deadline).min()
    }
}
