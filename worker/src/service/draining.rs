//! Taking nothing new: until the process has left, or until an operator wants it back.
//!
//! A worker that was told to stop leaves when nothing is in hand and the broker has released it:
//! others hold what it held. It waits for that for a part of its grace period at most, and not at
//! all without a broker.

use std::time::{Duration, Instant};

use protocol::worker::DrainWorker;

use super::Service;

/// Longest time that a worker with nothing in hand waits until others have what it held.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

/// Reason of a worker that was told to stop.
const STOPPING: &str = "the process was told to stop";

/// How far a worker is on its way out.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// What people are told why it takes nothing new.
    pub(super) reason: Option<String>,
    stopping: Option<Stopping>,
    /// Whether the broker has said that others have what this worker held.
    released: bool,
    connected: bool,
}

/// When a process that was told to stop stops waiting.
#[derive(Debug, Clone, Copy)]
struct Stopping {
    for_others: Instant,
    at_all: Instant,
}

impl Drain {
    /// A connection stands: it may be another broker.
    pub(super) fn connected(&mut self) {
        self.connected = true;
        self.released = false;
    }

    pub(super) fn disconnected(&mut self) {
        self.connected = false;
    }

    pub(super) fn released(&mut self) {
        self.released = true;
    }

    /// Whether the process ends as soon as it may.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// Whether a process with nothing in hand may end.
    pub(super) fn may_leave(&self, now: Instant) -> bool {
        let waits = self.connected && !self.released;
        self.stopping.is_some_and(|stopping| !waits || stopping.for_others <= now)
    }

    /// Whether the grace period is over.
    pub(super) fn must_leave(&self, now: Instant) -> bool {
        self.stopping.is_some_and(|stopping| stopping.at_all <= now)
    }

    /// When to look again.
    pub(super) fn timeout(&self, now: Instant) -> Option<Instant> {
        let Stopping { for_others, at_all } = self.stopping?;
        [for_others, at_all].into_iter().filter(|&at| at > now).min().or(Some(at_all))
    }
}

impl Service {
    /// The process is to end within `grace`.
    pub(super) fn stop(&mut self, grace: Duration) {
        let now = Instant::now();
        let for_others = now + HAND_OVER_MAX.min(grace / 2);
        self.drain.stopping = Some(Stopping { for_others, at_all: now + grace });
        self.begin_drain(STOPPING.to_owned());
    }

    /// An operator wants this worker to take nothing new, or to serve again.
    pub(super) fn handle_drain(&mut self, order: DrainWorker) {
        if self.drain.is_stopping() {
            return self.send_alive();
        }
        if !order.undo {
            return self.begin_drain(order.reason.unwrap_or_default());
        }
        tracing::info!("taking work again");
        self.draining = false;
        self.drain.reason = None;
        self.drain.released = false;
        self.send_alive();
    }

    fn begin_drain(&mut self, reason: String) {
        let in_flight = self.scheduler.in_flight().count();
        tracing::info!(in_flight, reason, "draining: taking no new work");
        self.draining = true;
        self.drain.reason = Some(reason);
        self.scheduler.forget_prefetches();
        self.refuse_registrations();
        self.send_alive();
    }
}
