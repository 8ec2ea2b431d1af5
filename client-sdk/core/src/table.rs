//! The requests that await their answer.
//!
//! ```text
//! start ──▶ Unsent ──connected, or at once──▶ Sent ── terminal reply, deadline ──▶ finished
//!              ▲                                │
//!              └ disconnected, refused, overloaded ┘
//! ```
//!
//! Drive it with [`Table::start`], `handle_*` and [`Table::cancel`]; after each, take every
//! [`Action`] from [`Table::poll_action`] and wake it again at [`Table::poll_timeout`].
//!
//! **Invariants.** Every request that was started is finished exactly once, by its deadline plus
//! [`GRACE`] at the latest, whatever the farm does; only [`Table::cancel`] takes one out without
//! an outcome. Nothing here does I/O or reads a clock.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{
    Envelope, ErrorCode, ErrorReply, RequestId, frames, header, reply,
    request::{Cancel, ClipEncode},
};

/// How long after its deadline a request still waits for the farm's own `deadline_exceeded`.
pub const GRACE: Duration = Duration::from_millis(250);

/// Requests that may be open at once.
pub const OPEN_MAX: usize = 4096;

/// Answered requests that are remembered, to tell a repeated reply from a late one.
pub const ANSWERED_MAX: usize = 1024;

/// How often an encode is sent again because the farm was overloaded.
const RETRIES_MAX: u32 = 3;

/// How soon a message is offered again after the socket's queue was full.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

/// Open requests by the order in which they were started.
#[derive(Debug)]
pub struct Table {
    open: BTreeMap<u64, Open>,
    order: BTreeMap<RequestId, u64>,
    started: u64,
    actions: VecDeque<Action>,
    connect_timeout: Duration,
    is_connected: bool,
    /// Whether a connection ever stood: then a farm that is away is waited for.
    was_reached: bool,
    answered: Answered,
    unclaimed: Unclaimed,
}

/// Replies that came for no open request, and were dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unclaimed {
    /// To a request that had been answered already: the farm answered twice.
    pub repeated: u64,
    /// Late ones, and those to requests that were cancelled or never made.
    pub other: u64,
}

/// A request to start.
#[derive(Debug, Clone)]
pub struct Start {
    /// Names the request; no other open one may have it.
    pub id: RequestId,
    /// What is asked.
    pub ask: Ask,
    /// Time for the answer, from now.
    pub timeout: Duration,
}

/// What is asked.
#[derive(Debug, Clone)]
pub enum Ask {
    /// An encode; its budget is written anew whenever it is sent.
    Encode(Box<ClipEncode>, Vec<Bytes>),
    /// Any other message, as it is sent.
    Plain(Bytes, Vec<Bytes>),
    /// Nothing: only that a connection stands.
    Connection,
}

/// What the driver must do, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send a message.
    Send {
        /// The open request that the message is, if it is one.
        request: Option<RequestId>,
        /// The whole message.
        frames: Vec<Bytes>,
    },
    /// Hand an outcome to whoever waits for it.
    Finish {
        /// The request, which is no longer open.
        id: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
}

/// How a request ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// The farm's terminal reply.
    Reply(Envelope),
    /// A connection stands.
    Connected,
    /// No reply came in time.
    TimedOut,
    /// No farm was ever reached.
    Unreachable,
    /// [`OPEN_MAX`] requests are open already.
    Full,
    /// The message is larger than the socket sends.
    TooLarge,
}

#[derive(Debug)]
struct Open {
    id: RequestId,
    ask: Ask,
    deadline: Instant,
    /// When it is given up while no farm was ever reached.
    connect_deadline: Instant,
    /// How often it was sent again because the farm was overloaded.
    retries: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for a connection.
    Unsent,
    /// Waits for room in the socket's queue, or for the farm to have room.
    Refused { retry_at: Instant },
    /// Waits for the answer.
    Sent,
}

impl Table {
    /// An empty table; while no farm was ever reached, requests wait `connect_timeout` for one.
    pub fn new(connect_timeout: Duration) -> Self {
        Self {
            open: BTreeMap::new(),
            order: BTreeMap::new(),
            started: 0,
            actions: VecDeque::new(),
            connect_timeout,
            is_connected: false,
            was_reached: false,
            answered: Answered::default(),
            unclaimed: Unclaimed::default(),
        }
    }

    /// Takes in a request, whose id must be new.
    // ## · => (Sent | Unsent | finished)
    pub fn start(&mut self, start: Start, now: Instant) {
        let Start { id, ask, timeout } = start;
        if self.open.len() >= OPEN_MAX {
            return self.actions.push_back(Action::Finish { id, outcome: Outcome::Full });
        }
        let key = self.started;
        self.started += 1;
        let previous = self.order.insert(id.clone(), key);
        debug_assert!(previous.is_none(), "an id was given to two open requests");
        let connect_deadline = now + self.connect_timeout;
        let deadline = now + timeout;
        let (retries, state) = (0, State::Unsent);
        self.open.insert(key, Open { id, ask, deadline, connect_deadline, retries, state });
        if self.is_connected {
            self.send(key, now);
        }
    }

    /// A connection stands: everything open is sent, in the order in which it was started.
    // ## Unsent => (Sent | finished)
    pub fn handle_connected(&mut self, now: Instant) {
        self.is_connected = true;
        self.was_reached = true;
        for key in self.keys(|_| true) {
            self.send(key, now);
        }
    }

    /// The connection is lost, and with it whatever was under way in either direction.
    // ## (Sent | Refused) => Unsent
    pub fn handle_disconnected(&mut self) {
        self.is_connected = false;
        for open in self.open.values_mut() {
            open.state = State::Unsent;
        }
    }

    /// The socket's queue had no room for a request: it is offered again soon.
    // ## Sent => Refused
    pub fn handle_refused(&mut self, id: &RequestId, now: Instant) {
        if let Some(open) = self.order.get(id).and_then(|key| self.open.get_mut(key)) {
            open.state = State::Refused { retry_at: now + REFUSED_PAUSE };
        }
    }

    /// The socket never sends this request.
    // ## Sent => finished
    pub fn handle_too_large(&mut self, id: &RequestId) {
        if let Some(&key) = self.order.get(id) {
            self.finish(key, Outcome::TooLarge);
        }
    }

    /// A message of the farm. Kinds that are no terminal reply say nothing about a request. An
    /// encode that an overloaded farm refused is offered again when the farm said, if there is
    /// time.
    // ## Sent => (finished | Refused)
    pub fn handle_message(&mut self, envelope: Envelope, now: Instant) {
        if !reply::REPLY_KINDS.contains(&envelope.peek.kind.as_str()) {
            return;
        }
        let id = envelope.peek.id.as_ref();
        if let Some(&key) = id.and_then(|id| self.order.get(id)) {
            if let Some(open) = self.open.get_mut(&key)
                && let Some(pause) = open.pause_before_retry(&envelope, now)
            {
                open.retries += 1;
                open.state = State::Refused { retry_at: now + pause };
                return;
            }
            self.answered.insert(self.open[&key].id.clone());
            self.finish(key, Outcome::Reply(envelope));
        } else if id.is_some_and(|id| self.answered.contains(id)) {
            self.unclaimed.repeated += 1;
        } else {
            self.unclaimed.other += 1;
        }
    }

    /// Nobody waits for `id` any more; the farm is told when it may be working on it.
    // ## (Unsent | Refused | Sent) => gone
    pub fn cancel(&mut self, id: &RequestId, cancel_id: RequestId) {
        let Some(open) = self.order.remove(id).and_then(|key| self.open.remove(&key)) else {
            return;
        };
        if open.state == State::Sent && matches!(open.ask, Ask::Encode(..)) {
            let cancel = Cancel { id: cancel_id, request: open.id };
            let frames = frames::frames(&cancel, Vec::new());
            self.actions.push_back(Action::Send { request: None, frames });
        }
    }

    /// Time passed: late requests are finished, refused ones offered again.
    // ## (Unsent | Refused | Sent) => finished, Refused => Sent
    pub fn handle_timeout(&mut self, now: Instant) {
        let reached = self.was_reached;
        for key in self.keys(|open| open.gives_up(reached) <= now) {
            let is_late = self.open[&key].deadline + GRACE <= now;
            let outcome = if reached || is_late { Outcome::TimedOut } else { Outcome::Unreachable };
            self.finish(key, outcome);
        }
        for key in self.keys(|open| open.retry_at().is_some_and(|at| at <= now)) {
            self.send(key, now);
        }
    }

    /// What to do next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Table::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        let reached = self.was_reached;
        let times = self.open.values().map(|open| (open.gives_up(reached), open.retry_at()));
        times.flat_map(|(end, retry)| [Some(end), retry]).flatten().min()
    }

    /// Counts the replies that came for no open request. A reply counts as repeated if its request
    /// is among the [`ANSWERED_MAX`] that were answered last.
    pub fn unclaimed(&self) -> Unclaimed {
        self.unclaimed
    }

    // ## (Unsent | Refused) => (Sent | Unsent | finished)
    fn send(&mut self, key: u64, now: Instant) {
        let open = self.open.get_mut(&key).expect("the key was read from the table");
        let frames = match &mut open.ask {
            Ask::Connection => return self.finish(key, Outcome::Connected),
            Ask::Plain(header, attachments) => {
                frames::frames_of(header.clone(), attachments.clone())
            }
            Ask::Encode(request, attachments) => {
                let left = open.deadline.saturating_duration_since(now).as_millis();
                if left == 0 {
                    // Too late to ask for; it is finished when the grace is over. Until then
                    // nothing is to be retried, or the caller would be woken without a pause.
                    open.state = State::Unsent;
                    return;
                }
                request.budget_ms = Some(u32::try_from(left).unwrap_or(u32::MAX));
                frames::frames_of(header::write(&**request).into(), attachments.clone())
            }
        };
        open.state = State::Sent;
        let request = Some(open.id.clone());
        self.actions.push_back(Action::Send { request, frames });
    }

    fn finish(&mut self, key: u64, outcome: Outcome) {
        if let Some(Open { id, .. }) = self.open.remove(&key) {
            self.order.remove(&id);
            self.actions.push_back(Action::Finish { id, outcome });
        }
    }

    fn keys(&self, which: impl Fn(&Open) -> bool) -> Vec<u64> {
        self.open.iter().filter(|(_, open)| which(open)).map(|(key, _)| *key).collect()
    }
}

impl Open {
    fn gives_up(&self, was_reached: bool) -> Instant {
        let deadline = self.deadline + GRACE;
        if was_reached { deadline } else { deadline.min(self.connect_deadline) }
    }

    /// When to send it again after this reply, if that is worth while: the farm's advice, longer
    /// every time, and by the request's name half as long or half as long again, so that those who
    /// were refused together do not come back together.
    fn pause_before_retry(&self, reply: &Envelope, now: Instant) -> Option<Duration> {
        let may_retry = self.retries < RETRIES_MAX && matches!(self.ask, Ask::Encode(..));
        if !may_retry || !reply.is::<ErrorReply>() {
            return None;
        }
        let error: ErrorReply = reply.read().ok()?;
        let advice_ms = error.retry_after_ms.filter(|_| error.code == ErrorCode::Overloaded)?;
        let spread = self.id.as_str().bytes().fold(0_u32, |sum, byte| sum + u32::from(byte)) % 1001;
        let pause = Duration::from_millis(u64::from(advice_ms)) * (500 + spread) / 1000;
        let pause = pause.saturating_mul(1 << self.retries);
        (now + pause < self.deadline).then_some(pause)
    }

    fn retry_at(&self) -> Option<Instant> {
        match self.state {
            State::Refused { retry_at } => Some(retry_at),
            State::Unsent | State::Sent => None,
        }
    }
}

/// The requests that were answered last.
#[derive(Debug, Default)]
struct Answered {
    ids: BTreeSet<RequestId>,
    /// The same, the oldest first.
    order: VecDeque<RequestId>,
}

impl Answered {
    fn insert(&mut self, id: RequestId) {
        if self.order.len() >= ANSWERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        self.ids.insert(id.clone());
        self.order.push_back(id);
    }

    fn contains(&self, id: &RequestId) -> bool {
        self.ids.contains(id)
    }
}

#[cfg(test)]
mod tests;
