//! What a process can reach: the time, the network, chance, and the books that are kept on it.

use std::time::Instant;

use bytes::Bytes;

use crate::{
    event::{Connection, End, Event, Events, Inside, Node},
    ledger::Ledger,
    mutant::Mutant,
    network::Network,
    plan::Plan,
    random::Random,
    time::{Clock, Span, Time},
    trace::Trace,
};

/// The world around the processes.
#[derive(Debug)]
pub(crate) struct Env {
    pub(crate) now: Time,
    pub(crate) events: Events,
    pub(crate) network: Network,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
    pub(crate) ledger: Ledger,
    pub(crate) plan: Plan,
    pub(crate) mutant: Option<Mutant>,
    /// Whether the broker's process takes connections: neither dead nor stopped.
    pub(crate) broker_takes_connections: bool,
    pub(crate) disk: Disk,
    started: Instant,
}

/// How the broker's disk is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Disk {
    pub(crate) is_slow: bool,
    pub(crate) is_full: bool,
}

impl Env {
    /// A world at its beginning.
    pub(crate) fn new(plan: Plan, mut random: Random, keeps_lines: bool) -> Self {
        Self {
            now: Time::ZERO,
            events: Events::default(),
            network: Network::new(plan.workers, plan.clients, random.fork()),
            trace: Trace::new(keeps_lines),
            ledger: Ledger::new(&plan),
            mutant: plan.mutant,
            random,
            broker_takes_connections: true,
            disk: Disk::default(),
            started: some_instant(),
            plan,
        }
    }

    /// A clock for a process that starts now.
    pub(crate) fn clock(&mut self) -> Clock {
        let offset = self.random.span(Span::ZERO, Span::from_secs(1 << 20));
        Clock::new(self.started, offset)
    }

    /// Plans something inside of a process.
    pub(crate) fn later(&mut self, after: Span, (node, life): (Node, u32), what: Inside) {
        self.events.plan(self.now + after, Event::Inside { node, life, what });
    }

    /// Sends a message from one end of a connection.
    pub(crate) fn send(&mut self, connection: Connection, from: End, frames: Vec<Bytes>) {
        let link = (&mut self.events, self.now);
        self.network.send(connection, from, frames, link);
    }

    /// Closes one end of a connection, and tells the other end.
    pub(crate) fn close(&mut self, connection: Connection, end: End) {
        self.network.close(connection, end, true, (&mut self.events, self.now));
    }
}

/// Some instant to count virtual time from; nothing depends on which one it is.
fn some_instant() -> Instant {
    Instant::now()
}
