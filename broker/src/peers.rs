//! The core's numbers for the connections of one ROUTER.

use std::collections::BTreeMap;

use transport::Peer;

/// Connections by number and by routing id. A number is never given out twice.
#[derive(Debug)]
pub(crate) struct PeerTable<N> {
    numbers: BTreeMap<Peer, N>,
    peers: BTreeMap<N, Peer>,
    make: fn(u64) -> N,
    next: u64,
}

impl<N: Copy + Ord> PeerTable<N> {
    /// An empty table whose numbers are made by `make`.
    pub(crate) fn new(make: fn(u64) -> N) -> Self {
        Self { numbers: BTreeMap::new(), peers: BTreeMap::new(), make, next: 0 }
    }

    /// The number of a connection, a new one if it is not known.
    pub(crate) fn number(&mut self, peer: &Peer) -> N {
        if let Some(&number) = self.numbers.get(peer) {
            return number;
        }
        let number = (self.make)(self.next);
        self.next += 1;
        self.numbers.insert(peer.clone(), number);
        self.peers.insert(number, peer.clone());
        number
    }

    /// The connection with this number, unless it is closed.
    pub(crate) fn peer(&self, number: N) -> Option<&Peer> {
        self.peers.get(&number)
    }

    /// Forgets a closed connection. Returns the number that it had.
    pub(crate) fn remove(&mut self, peer: &Peer) -> Option<N> {
        let number = self.numbers.remove(peer)?;
        self.peers.remove(&number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_number_stands_for_one_connection_for_ever() {
        let mut table = PeerTable::new(|number| number);
        let (first, second) = (peer("first"), peer("second"));
        assert_eq!((table.number(&first), table.number(&second), table.number(&first)), (0, 1, 0));

        assert_eq!(table.remove(&first), Some(0));
        assert_eq!((table.remove(&first), table.peer(0)), (None, None));
        assert_eq!(table.number(&first), 2);
        assert_eq!(table.peer(1), Some(&second));
    }

    fn peer(name: &'static str) -> Peer {
        Peer::from(Bytes::from_static(name.as_bytes()))
    }
}
