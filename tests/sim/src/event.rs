//! What will happen and when: events ordered by time, and by the order in which they were planned.

use std::{cmp::Ordering, collections::BinaryHeap, fmt};

use bytes::Bytes;
use protocol::{AdapterId, ModelName};
use worker_core::DispatchId;

use crate::{faults::Action, time::Time};

/// A process of the farm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    Broker,
    Worker(usize),
    Client(usize),
}

/// One connection between the broker and another process; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Connection(pub(crate) usize);

/// Which end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The one that connects: a worker or a client.
    Dealer,
    /// The broker.
    Router,
}

/// What comes out of a connection.
#[derive(Debug, Clone)]
pub(crate) enum Arrival {
    Message(Vec<Bytes>),
    /// The other end closed, or the connection was reset.
    Closed,
}

/// Something that happens at a moment.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// Bytes reach one end of a connection.
    Arrive { connection: Connection, at: End, what: Arrival },
    /// What a partition held back comes through.
    Release { connection: Connection, at: End },
    /// Something inside of a process, which is void when another process has taken its place.
    Inside { node: Node, life: u32, what: Inside },
    /// The world changes.
    Act(Action),
}

/// What happens inside of a process.
#[derive(Debug, Clone)]
pub(crate) enum Inside {
    /// The core wanted to be woken.
    Timeout,
    /// A heartbeat is due.
    Heartbeat,
    /// The peer may have been silent for too long.
    Liveness,
    /// Another attempt to connect begins.
    Connect,
    /// The handshake of an attempt is over.
    Connected,
    /// A worker is told to stop.
    Terminate,
    /// A worker looks whether it may leave.
    Leave,
    /// A client has the next thing to ask for.
    Ask,
    /// A client goes on with an upload.
    Upload,
    /// The blob store is done with its oldest command.
    Stored,
    /// A worker's executor is done.
    Executed(DispatchId),
    /// A worker's executor took the process with it.
    Crashed(DispatchId),
    /// A worker has checked the digest of a fetched adapter.
    Verified(Bytes),
    /// A worker has read an adapter from its disk.
    DiskRead(AdapterId),
    /// A worker has a model's weights in memory.
    ModelLoaded(ModelName),
}

/// Events to come.
#[derive(Debug, Default)]
pub(crate) struct Events {
    heap: BinaryHeap<Entry>,
    planned: u64,
}

#[derive(Debug)]
struct Entry {
    at: Time,
    number: u64,
    event: Event,
}

impl Events {
    /// Plans an event.
    pub(crate) fn plan(&mut self, at: Time, event: Event) {
        self.heap.push(Entry { at, number: self.planned, event });
        self.planned += 1;
    }

    /// The next event, when it happens by `end`.
    pub(crate) fn next(&mut self, end: Time) -> Option<(Time, Event)> {
        if self.heap.peek()?.at > end {
            return None;
        }
        self.heap.pop().map(|entry| (entry.at, entry.event))
    }
}

impl Ord for Entry {
    /// The heap gives the greatest first: that is the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl Node {
    /// A number of its own, for the trace's hash.
    pub(crate) const fn number(self) -> u64 {
        match self {
            Self::Broker => 0,
            Self::Worker(index) => 1 + 2 * index as u64,
            Self::Client(index) => 2 + 2 * index as u64,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broker => f.write_str("broker"),
            Self::Worker(index) => write!(f, "worker-{index}"),
            Self::Client(index) => write!(f, "client-{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Span;

    #[test]
    fn events_come_by_time_and_then_in_the_order_of_planning() {
        let mut events = Events::default();
        let late = Time::ZERO + Span::from_millis(2);
        for (at, index) in [(late, 0), (Time::ZERO, 1), (late, 2), (Time::ZERO, 3)] {
            events.plan(at, Event::Release { connection: Connection(index), at: End::Dealer });
        }
        let order = std::iter::from_fn(|| events.next(late)).map(|(_, event)| match event {
            Event::Release { connection, .. } => connection.0,
            Event::Arrive { .. } | Event::Inside { .. } | Event::Act(_) => panic!("{event:?}"),
        });
        assert_eq!(order.collect::<Vec<_>>(), [1, 3, 0, 2]);
    }

    #[test]
    fn nothing_comes_after_the_end() {
        let mut events = Events::default();
        let late = Time::ZERO + Span::from_millis(2);
        events.plan(late, Event::Release { connection: Connection(0), at: End::Router });
        assert!(events.next(Time::ZERO).is_none());
        assert!(events.next(late).is_some());
    }
}
