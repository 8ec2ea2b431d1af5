//! The routing id of one connection at a ROUTER, and the table of those now connected.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::budget::{Budget, QueueLimits, Reservation};

/// The routing id of one connection: opaque, chosen at random by the ROUTER when the peer connects,
/// unless the peer has set an identity of its own.
///
/// It names the *connection*, not the process behind it: after a reconnect the same process is
/// another peer. A connection that takes the id of another, which only a chosen one can be, ends
/// the older one: that is announced as gone first. Displayed as its first four bytes in hexadecimal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(Bytes);

impl Peer {
    /// Returns the routing id as it stands on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the routing id as a frame.
    pub(crate) fn to_frame(&self) -> Bytes {
        self.0.clone()
    }
}

impl From<Bytes> for Peer {
    fn from(routing_id: Bytes) -> Self {
        Self(routing_id)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Peer({self})")
    }
}

/// The connected peers that have spoken, each with the budget of what is queued for it.
#[derive(Debug)]
pub(crate) struct Peers {
    limits: QueueLimits,
    budgets: Mutex<BTreeMap<Peer, Arc<Budget>>>,
}

impl Peers {
    /// Makes an empty table whose peers may each have `limits` queued.
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self { limits, budgets: Mutex::default() }
    }

    /// Adds `peer` unless it is known.
    pub(crate) fn insert(&self, peer: &Peer) {
        let mut budgets = self.budgets();
        if !budgets.contains_key(peer) {
            budgets.insert(peer.clone(), Arc::new(Budget::new(self.limits)));
        }
    }

    /// Forgets `peer` and tells whether it was known.
    pub(crate) fn remove(&self, peer: &Peer) -> bool {
        self.budgets().remove(peer).is_some()
    }

    /// Tells whether `peer` is connected still by the connection that `share` was charged to.
    pub(crate) fn is_present(&self, peer: &Peer, share: &Reservation) -> bool {
        self.budgets().get(peer).is_some_and(|budget| share.is_of(budget))
    }

    /// Returns the budget of `peer`, or nothing if it is not connected or has never spoken.
    pub(crate) fn budget(&self, peer: &Peer) -> Option<Arc<Budget>> {
        self.budgets().get(peer).map(Arc::clone)
    }

    /// Lists every peer in order.
    pub(crate) fn all(&self) -> Vec<Peer> {
        self.budgets().keys().cloned().collect()
    }

    /// Lists the peers that have taken nothing of what is queued for them since `stall` before `now`.
    pub(crate) fn stalled(&self, stall: Duration, now: Instant) -> Vec<Peer> {
        let budgets = self.budgets();
        let stalled = budgets.iter().filter(|(_, budget)| budget.is_stalled(stall, now));
        stalled.map(|(peer, _)| peer.clone()).collect()
    }

    fn budgets(&self) -> MutexGuard<'_, BTreeMap<Peer, Arc<Budget>>> {
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_displayed_as_eight_hexadecimal_digits() {
        let peer = Peer::from(Bytes::from_static(&[0x00, 0xAB, 0x10, 0xFF, 0x77]));
        assert_eq!(peer.to_string(), "00ab10ff");
        assert_eq!(format!("{peer:?}"), "Peer(00ab10ff)");
    }

    #[test]
    fn a_peer_is_removed_once() {
        let peers = Peers::new(QueueLimits { messages_max: 1, bytes_max: 1 });
        let peer = Peer::from(Bytes::from_static(b"peer"));
        peers.insert(&peer);
        peers.insert(&peer);
        assert_eq!(peers.all().len(), 1);
        assert!(peers.remove(&peer));
        assert!(!peers.remove(&peer));
        assert!(peers.budget(&peer).is_none());
    }

    #[test]
    fn what_was_meant_for_an_earlier_connection_is_told_apart() {
        let peers = Peers::new(QueueLimits { messages_max: 1, bytes_max: 1 });
        let peer = Peer::from(Bytes::from_static(b"peer"));
        peers.insert(&peer);
        let share = peers.budget(&peer).unwrap().try_reserve(1).unwrap();
        assert!(peers.is_present(&peer, &share));
        peers.remove(&peer);
        assert!(!peers.is_present(&peer, &share));
        peers.insert(&peer);
        assert!(!peers.is_present(&peer, &share));
    }
}
