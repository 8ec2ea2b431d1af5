//! The ROUTER socket: many peers, each with a bounded queue of its own.

mod task;

use std::io;
use std::sync::Arc;
use std::sync::mpsc as sync_mpsc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::budget::{Budget, QueueLimits, Reservation};
use crate::endpoint::Endpoint;
use crate::inbox::{InboxReceiver, inbox};
use crate::listener::{self, BindError, Bound};
use crate::message::Message;
use crate::peer::{Peer, Peers};
use crate::thread::SocketThread;
use task::{RouterTask, Wiring};

/// A bound ROUTER socket on a thread of its own.
///
/// Dropping it stops the thread: what was accepted by `send` is still written, for at most
/// [`RouterConfig::linger`], the socket file is removed and the thread joined. That blocks; async
/// callers use [`Router::close`].
#[derive(Debug)]
pub struct Router {
    sender: RouterSender,
    receiver: RouterReceiver,
}

/// What a ROUTER bounds, and what happens at each bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// The name of the thread; the kernel shows its first 15 bytes.
    pub thread_name: &'static str,
    /// What may wait for one peer. At the bound, `send` to it answers
    /// [`RouterSendError::PeerFull`], and other peers are not affected.
    pub peer_queue: QueueLimits,
    /// What may wait for all peers together, those included that are gone but whose connection
    /// still has to time out. At the bound, `send` answers [`RouterSendError::Full`].
    pub outbox: QueueLimits,
    /// What may wait for the caller's `recv`. At the bound, one more message is read and then no
    /// peer is read from until there is room: TCP pushes back on the peers.
    pub inbox: QueueLimits,
    /// The bytes of one message in either direction. `send` answers
    /// [`RouterSendError::TooLarge`]; a peer that sends more is disconnected.
    pub message_bytes_max: usize,
    /// The frames of one message from a peer. A peer that sends more is disconnected.
    pub frames_max: usize,
    /// A peer that takes nothing of what waits for it for this long is disconnected.
    pub stall: Duration,
    /// How long a stopping socket goes on writing what it has accepted.
    pub linger: Duration,
}

/// What a ROUTER tells its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouterEvent {
    /// `peer` sent `message`. A REQ socket puts an empty frame in front, which is left there.
    Message {
        /// Who sent it.
        peer: Peer,
        /// Without the routing id.
        message: Message,
    },
    /// `peer`, which has sent at least one message, is disconnected. Its routing id never returns,
    /// unless a peer has chosen it: then it stands for another connection from here on.
    Gone {
        /// Who it was.
        peer: Peer,
    },
}

/// Why a message was not accepted for a peer. Nothing of it was or will be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouterSendError {
    /// The peer is disconnected, or has never sent a message.
    #[error("peer `{peer}` is not connected")]
    UnknownPeer {
        /// The routing id as given.
        peer: Peer,
    },
    /// The peer's own queue is full: it reads too slowly.
    #[error("the queue of peer `{peer}` is full: it does not read what it is sent")]
    PeerFull {
        /// The slow peer.
        peer: Peer,
    },
    /// The queue that all peers share is full.
    #[error("the queues of all peers together are full")]
    Full,
    /// The message is larger than any peer would be sent.
    #[error("a message of {bytes} bytes exceeds the limit of {max}")]
    TooLarge {
        /// The size of the message.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The socket's thread has ended.
    #[error("the ROUTER is closed")]
    Closed,
}

/// Sends to the peers of one ROUTER, from any thread and without waiting.
#[derive(Clone, Debug)]
pub struct RouterSender {
    /// Unbounded in itself; each entry holds its shares of the peer's budget and of `outbox`.
    commands: mpsc::UnboundedSender<Outgoing>,
    peers: Arc<Peers>,
    outbox: Arc<Budget>,
    message_bytes_max: usize,
}

/// Receives from the peers of one ROUTER. Owns its thread: see [`Router`] on dropping it.
#[derive(Debug)]
pub struct RouterReceiver {
    events: InboxReceiver<RouterEvent>,
    endpoint: Endpoint,
    thread: SocketThread,
}

/// A message on its way to the socket's thread, charged to two budgets.
#[derive(Debug)]
pub(crate) struct Outgoing {
    peer: Peer,
    message: Message,
    shares: (Reservation, Reservation),
}

impl Default for RouterConfig {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            thread_name: "zmq-router",
            peer_queue: QueueLimits { messages_max: 1_000, bytes_max: 64 * MIB },
            outbox: QueueLimits { messages_max: 20_000, bytes_max: 1024 * MIB },
            inbox: QueueLimits { messages_max: 1_000, bytes_max: 256 * MIB },
            message_bytes_max: 64 * MIB,
            frames_max: 256,
            stall: Duration::from_secs(10),
            linger: Duration::from_secs(1),
        }
    }
}

impl RouterConfig {
    fn validate(&self) -> Result<(), BindError> {
        let queue_advice = "write 1 to 50000 messages and at least 1 byte";
        let checks = [
            ("peer_queue", self.peer_queue.is_valid(), queue_advice),
            ("outbox", self.outbox.is_valid(), queue_advice),
            ("inbox", self.inbox.is_valid(), queue_advice),
            ("message_bytes_max", self.message_bytes_max >= 1, "write at least 1"),
            ("frames_max", self.frames_max >= 1, "write at least 1"),
            ("stall", !self.stall.is_zero(), "write more than zero"),
        ];
        match checks.into_iter().find(|(_, is_valid, _)| !is_valid) {
            Some((name, _, advice)) => Err(BindError::InvalidConfig { name, advice }),
            None => Ok(()),
        }
    }
}

impl Router {
    /// Binds `endpoint` and starts to serve it. Blocks for the few milliseconds that this takes.
    ///
    /// # Errors
    /// [`BindError`], each variant of which says what to do.
    pub fn bind(endpoint: &Endpoint, config: RouterConfig) -> Result<Self, BindError> {
        config.validate()?;
        let Bound { listener, endpoint } = listener::bind(endpoint, config.stall)?;
        let (commands, accepted) = mpsc::unbounded_channel();
        let (inbox, events) = inbox(config.inbox);
        let peers = Arc::new(Peers::new(config.peer_queue));
        let outbox = Arc::new(Budget::new(config.outbox));
        let sender = RouterSender {
            commands,
            peers: Arc::clone(&peers),
            outbox: Arc::clone(&outbox),
            message_bytes_max: config.message_bytes_max,
        };

        let fail = |source| BindError::Io { endpoint: endpoint.clone(), source };
        let (ready, started) = sync_mpsc::channel::<io::Result<()>>();
        let name = config.thread_name;
        let wiring = Wiring { inbox, peers, outbox, config, endpoint: endpoint.clone() };
        let thread = SocketThread::spawn(name, move |stop| {
            RouterTask::run(listener, wiring, accepted, &ready, stop);
        });
        let thread = thread.map_err(fail)?;
        let ended = |_| Err(io::Error::other("the socket's thread ended before it served"));
        started.recv().unwrap_or_else(ended).map_err(fail)?;
        Ok(Self { sender, receiver: RouterReceiver { events, endpoint, thread } })
    }

    /// Returns the bound endpoint; port 0 has become the real one.
    pub fn endpoint(&self) -> &Endpoint {
        self.receiver.endpoint()
    }

    /// Returns another sender.
    pub fn sender(&self) -> RouterSender {
        self.sender.clone()
    }

    /// See [`RouterSender::send`].
    ///
    /// # Errors
    /// [`RouterSendError`].
    pub fn send(&self, peer: &Peer, message: Message) -> Result<(), RouterSendError> {
        self.sender.send(peer, message)
    }

    /// See [`RouterReceiver::recv`].
    pub async fn recv(&mut self) -> Option<RouterEvent> {
        self.receiver.recv().await
    }

    /// See [`RouterReceiver::recv_blocking`].
    pub fn recv_blocking(&mut self) -> Option<RouterEvent> {
        self.receiver.recv_blocking()
    }

    /// Separates sending from receiving. The receiver owns the thread.
    pub fn split(self) -> (RouterSender, RouterReceiver) {
        (self.sender, self.receiver)
    }

    /// See [`RouterReceiver::close`].
    pub async fn close(self) {
        self.receiver.close().await;
    }
}

impl RouterSender {
    /// Accepts `message` for `peer`. Never waits.
    ///
    /// Acceptance is not delivery: if the connection is lost first, the message is lost too and
    /// [`RouterEvent::Gone`] follows. Messages to one peer arrive in the order of acceptance.
    ///
    /// # Errors
    /// [`RouterSendError`]; nothing was sent.
    pub fn send(&self, peer: &Peer, message: Message) -> Result<(), RouterSendError> {
        let (bytes, max) = (message.byte_len(), self.message_bytes_max);
        if bytes > max {
            return Err(RouterSendError::TooLarge { bytes, max });
        }
        let Some(queue) = self.peers.budget(peer) else {
            return Err(RouterSendError::UnknownPeer { peer: peer.clone() });
        };
        let Some(of_peer) = queue.try_reserve(bytes) else {
            return Err(RouterSendError::PeerFull { peer: peer.clone() });
        };
        let of_all = self.outbox.try_reserve(bytes).ok_or(RouterSendError::Full)?;
        let outgoing = Outgoing { peer: peer.clone(), message, shares: (of_peer, of_all) };
        self.commands.send(outgoing).map_err(|_| RouterSendError::Closed)
    }
}

impl RouterReceiver {
    /// Returns the bound endpoint; port 0 has become the real one.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Returns the next event, or nothing if the socket's thread has failed. Cancel safe.
    pub async fn recv(&mut self) -> Option<RouterEvent> {
        self.events.recv().await
    }

    /// Like [`RouterReceiver::recv`], for plain threads.
    ///
    /// # Panics
    /// If called from within an async runtime.
    pub fn recv_blocking(&mut self) -> Option<RouterEvent> {
        self.events.recv_blocking()
    }

    /// Returns the next event if one waits.
    pub fn try_recv(&mut self) -> Option<RouterEvent> {
        self.events.try_recv()
    }

    /// Stops the socket as dropping it does, without blocking the caller's thread.
    pub async fn close(self) {
        self.thread.close().await;
    }
}
