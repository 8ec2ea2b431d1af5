//! The network: connections that keep their order, and links that delay, partition and reset.
//!
//! It behaves as TCP does. Within one direction of a connection messages arrive in order and none
//! is lost, as long as the connection stands. A partition holds them back, and they come through
//! when it heals, unless one end gave the connection up meanwhile: that is the only way to lose
//! them. Every process but the broker has one link, to the broker.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::{
    event::{Arrival, Connection, End, Event, Events, Node},
    random::Random,
    time::{Span, Time},
};

/// Longest time until TCP finds out that a partition has healed.
const RETRANSMISSION_MAX: Span = Span::from_millis(300);

/// All links and connections.
#[derive(Debug)]
pub(crate) struct Network {
    workers: Vec<Link>,
    clients: Vec<Link>,
    connections: Vec<Wire>,
    random: Random,
}

/// The way between the broker and one other process.
#[derive(Debug, Clone)]
struct Link {
    delay: Span,
    jitter: Span,
    /// What a slow network adds.
    extra: Span,
    /// Partitions that stop what comes from the process, and what goes to it.
    blocked: [u32; 2],
}

/// One connection.
#[derive(Debug)]
struct Wire {
    node: Node,
    /// Whether the dealer's and the router's end are open.
    open: [bool; 2],
    /// A reset loses what is under way.
    is_reset: bool,
    /// When the last message arrives at either end.
    last: [Time; 2],
    /// What partitions hold back, by the end where it would arrive.
    held: [VecDeque<Arrival>; 2],
}

impl Network {
    /// Links to so many processes, each with a delay of its own.
    pub(crate) fn new(workers: usize, clients: usize, mut random: Random) -> Self {
        let links = |count: usize, random: &mut Random| -> Vec<Link> {
            (0..count).map(|_| Link::new(random)).collect()
        };
        Self {
            workers: links(workers, &mut random),
            clients: links(clients, &mut random),
            connections: Vec::new(),
            random,
        }
    }

    /// A connection of `node` stands.
    pub(crate) fn connect(&mut self, node: Node) -> Connection {
        self.connections.push(Wire {
            node,
            open: [true; 2],
            is_reset: false,
            last: [Time::ZERO; 2],
            held: [VecDeque::new(), VecDeque::new()],
        });
        Connection(self.connections.len() - 1)
    }

    /// The process at the dealer's end.
    pub(crate) fn node(&self, connection: Connection) -> Node {
        self.connections[connection.0].node
    }

    /// Whether one end is open.
    pub(crate) fn is_open(&self, connection: Connection, end: End) -> bool {
        self.connections[connection.0].open[end.index()]
    }

    /// Sends a message from one end; it is lost when that end is closed.
    pub(crate) fn send(
        &mut self,
        connection: Connection,
        from: End,
        frames: Vec<Bytes>,
        (events, now): (&mut Events, Time),
    ) {
        if self.is_open(connection, from) {
            self.deliver(connection, from.other(), Arrival::Message(frames), (events, now));
        }
    }

    /// Closes one end; with `tells` the other end is told, as kernels do for dead processes too.
    pub(crate) fn close(
        &mut self,
        connection: Connection,
        end: End,
        tells: bool,
        (events, now): (&mut Events, Time),
    ) {
        let wire = &mut self.connections[connection.0];
        if !std::mem::replace(&mut wire.open[end.index()], false) {
            return;
        }
        wire.held[end.index()].clear();
        if tells {
            self.deliver(connection, end.other(), Arrival::Closed, (events, now));
        }
    }

    /// Closes one end of all connections, and the other ends are told.
    pub(crate) fn close_all(&mut self, end: End, (events, now): (&mut Events, Time)) {
        for index in 0..self.connections.len() {
            self.close(Connection(index), end, true, (events, now));
        }
    }

    /// Resets a connection: what is under way is lost, and both ends are told.
    pub(crate) fn reset(&mut self, connection: Connection, (events, now): (&mut Events, Time)) {
        let wire = &mut self.connections[connection.0];
        wire.is_reset = true;
        wire.held = [VecDeque::new(), VecDeque::new()];
        for end in [End::Dealer, End::Router] {
            let at = now + self.delay(connection);
            events.plan(at, Event::Arrive { connection, at: end, what: Arrival::Closed });
        }
    }

    /// What becomes of something that reaches one end now; nothing if it is lost or held back.
    pub(crate) fn arrive(
        &mut self,
        connection: Connection,
        at: End,
        what: Arrival,
        (events, now): (&mut Events, Time),
    ) -> Option<Arrival> {
        let is_blocked = self.link(self.node(connection)).blocked[at.other().index()] > 0;
        let wire = &mut self.connections[connection.0];
        let is_message = matches!(what, Arrival::Message(_));
        if wire.is_reset && is_message {
            return None;
        }
        if is_blocked || !wire.held[at.index()].is_empty() {
            wire.held[at.index()].push_back(what);
            return None;
        }
        if !wire.open[at.index()] {
            if is_message {
                // The other end learns that nobody is there.
                self.deliver(connection, at.other(), Arrival::Closed, (events, now));
            }
            return None;
        }
        Some(what)
    }

    /// Takes what was held back for one end, unless it is blocked again.
    pub(crate) fn release(&mut self, connection: Connection, at: End) -> VecDeque<Arrival> {
        if self.link(self.node(connection)).blocked[at.other().index()] > 0 {
            return VecDeque::new();
        }
        std::mem::take(&mut self.connections[connection.0].held[at.index()])
    }

    /// Notes that the end was closed by what arrived.
    pub(crate) fn closed(&mut self, connection: Connection, end: End) {
        self.connections[connection.0].open[end.index()] = false;
    }

    /// Stops what comes from `ends` of the link of `node`.
    pub(crate) fn block(&mut self, node: Node, ends: &[End]) {
        for end in ends {
            self.link_mut(node).blocked[end.index()] += 1;
        }
    }

    /// Undoes one [`Network::block`].
    pub(crate) fn unblock(&mut self, node: Node, ends: &[End], (events, now): (&mut Events, Time)) {
        for end in ends {
            let blocked = &mut self.link_mut(node).blocked[end.index()];
            *blocked = blocked.saturating_sub(1);
        }
        for index in 0..self.connections.len() {
            let wire = &self.connections[index];
            for end in [End::Dealer, End::Router] {
                if wire.node == node && !wire.held[end.index()].is_empty() {
                    let at = now + self.random.span(Span::ZERO, RETRANSMISSION_MAX);
                    events.plan(at, Event::Release { connection: Connection(index), at: end });
                }
            }
        }
    }

    /// Whether a partition separates `node` from the broker, in any direction.
    pub(crate) fn is_blocked(&self, node: Node) -> bool {
        self.link(node).blocked.iter().any(|&blocked| blocked > 0)
    }

    /// Adds a delay to the link of `node`, in place of what was added before.
    pub(crate) fn slow(&mut self, node: Node, extra: Span) {
        self.link_mut(node).extra = extra;
    }

    /// The time of one handshake.
    pub(crate) fn handshake(&mut self, node: Node) -> Span {
        let link = self.link(node);
        (link.delay + link.extra).times(4)
    }

    fn deliver(
        &mut self,
        connection: Connection,
        at: End,
        what: Arrival,
        (events, now): (&mut Events, Time),
    ) {
        let delay = self.delay(connection);
        let wire = &mut self.connections[connection.0];
        let time = (now + delay).max(wire.last[at.index()]);
        wire.last[at.index()] = time;
        events.plan(time, Event::Arrive { connection, at, what });
    }

    fn delay(&mut self, connection: Connection) -> Span {
        let Link { delay, jitter, extra, .. } = *self.link(self.node(connection));
        delay + extra + self.random.span(Span::ZERO, jitter)
    }

    fn link(&self, node: Node) -> &Link {
        match node {
            Node::Worker(index) => &self.workers[index],
            Node::Client(index) => &self.clients[index],
            Node::Broker => unreachable!("links are named after their other end"),
        }
    }

    fn link_mut(&mut self, node: Node) -> &mut Link {
        match node {
            Node::Worker(index) => &mut self.workers[index],
            Node::Client(index) => &mut self.clients[index],
            Node::Broker => unreachable!("links are named after their other end"),
        }
    }
}

impl Link {
    fn new(random: &mut Random) -> Self {
        let delay = random.log_span(Span::from_micros(20), Span::from_millis(2));
        let jitter = random.log_span(Span::from_micros(10), Span::from_millis(4));
        Self { delay, jitter, extra: Span::ZERO, blocked: [0; 2] }
    }
}

impl End {
    /// The end across.
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Dealer => Self::Router,
            Self::Router => Self::Dealer,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Dealer => 0,
            Self::Router => 1,
        }
    }
}
