//! The DEALER socket: one peer, reconnected for ever.

mod session;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::backoff::{Backoff, InvalidBackoff};
use crate::budget::{Budget, QueueLimits, Reservation};
use crate::endpoint::Endpoint;
use crate::inbox::{InboxReceiver, inbox};
use crate::message::Message;
use crate::thread::SocketThread;
use session::Supervisor;

/// A DEALER socket on a thread of its own, with a supervisor that connects and reconnects.
///
/// `send` works only while connected, and what was accepted may be lost with the connection: keep
/// a table of what awaits an answer and send it again at each [`DealerEvent::Connected`].
///
/// Dropping it stops the thread: what was accepted is still written, for at most
/// [`DealerConfig::linger`], and the thread joined. That blocks; async callers use
/// [`Dealer::close`].
#[derive(Debug)]
pub struct Dealer {
    sender: DealerSender,
    receiver: DealerReceiver,
}

/// How a DEALER keeps its connection, what it bounds, and what happens at each bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DealerConfig {
    /// The name of the thread; the kernel shows its first 15 bytes.
    pub thread_name: &'static str,
    /// What is sent at an interval while connected, the caller's queue being full or not.
    pub heartbeat: Option<Heartbeat>,
    /// A connection on which nothing at all arrives for this long is replaced. The time during
    /// which the inbox is full, and so nothing is read, does not count.
    pub liveness: Option<Duration>,
    /// The longest delay before the first new attempt to connect. The delay is drawn between
    /// zero and a ceiling that starts here and doubles.
    pub reconnect_delay_min: Duration,
    /// Where that ceiling ends.
    pub reconnect_delay_max: Duration,
    /// How long one attempt may take, ZMTP handshake included.
    pub connect_timeout: Duration,
    /// What may wait to be written. At the bound, `send` answers [`DealerSendErrorKind::Full`].
    pub outbox: QueueLimits,
    /// What may wait for the caller's `recv`. At the bound, one more message is read and then the
    /// connection is not read from until there is room: TCP pushes back on the peer.
    pub inbox: QueueLimits,
    /// The bytes of one message in either direction. `send` answers
    /// [`DealerSendErrorKind::TooLarge`]; if the peer sends more, the connection is replaced.
    pub message_bytes_max: usize,
    /// How long a stopping socket goes on writing what it has accepted.
    pub linger: Duration,
}

/// An application-level heartbeat. ZMTP's own PING must not be used: `zeromq` peers disconnect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// What is sent.
    pub message: Message,
    /// How often, the first time one interval after each connect.
    pub interval: Duration,
}

/// What a DEALER tells its caller, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DealerEvent {
    /// A connection stands: announce yourself and send again what awaits an answer.
    Connected,
    /// The peer sent a message.
    Message(Message),
    /// The connection is lost; another is being made.
    Disconnected,
}

/// Why a DEALER could not be started. An unreachable peer is no reason: that is tried for ever.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Port 0 cannot be connected to.
    #[error("cannot connect to `{endpoint}`: name the port that the peer is bound to")]
    PortZero {
        /// The endpoint as given.
        endpoint: Endpoint,
    },
    /// A limit of the configuration is out of range.
    #[error("`{name}` of the DEALER is out of range: {advice}")]
    InvalidConfig {
        /// The field at fault.
        name: &'static str,
        /// What to write.
        advice: &'static str,
    },
    /// The reconnect delays are out of range.
    #[error(transparent)]
    InvalidBackoff(#[from] InvalidBackoff),
    /// The system refused a thread.
    #[error("cannot start the thread of a DEALER")]
    Thread(#[source] io::Error),
}

/// A message that was not accepted, and why.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot send: {kind}")]
pub struct DealerSendError {
    /// The message as given. Nothing of it was or will be sent.
    pub message: Message,
    /// Why.
    pub kind: DealerSendErrorKind,
}

/// Why a message was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DealerSendErrorKind {
    /// There is no connection now; [`DealerEvent::Connected`] will say when there is.
    #[error("not connected")]
    NotConnected,
    /// The queue is full: the peer does not read.
    #[error("the queue is full: the peer does not read what it is sent")]
    Full,
    /// The message is larger than may be sent.
    #[error("the message of {bytes} bytes exceeds the limit of {max}")]
    TooLarge {
        /// The size of the message.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The socket's thread has ended.
    #[error("the DEALER is closed")]
    Closed,
}

/// Sends to the peer of one DEALER, from any thread and without waiting.
#[derive(Clone, Debug)]
pub struct DealerSender {
    /// Unbounded in itself; each entry holds its share of `outbox`.
    commands: mpsc::UnboundedSender<Outgoing>,
    outbox: Arc<Budget>,
    link: Arc<Link>,
    message_bytes_max: usize,
}

/// Receives from the peer of one DEALER. Owns its thread: see [`Dealer`] on dropping it.
#[derive(Debug)]
pub struct DealerReceiver {
    events: InboxReceiver<DealerEvent>,
    thread: SocketThread,
}

/// The state of the connection, as the supervisor last published it.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// The number of the present connection, counted from 1, or 0 while there is none.
    connection: AtomicU64,
    /// Why the last attempt failed or the last connection ended.
    failure: Mutex<Option<String>>,
}

/// A message on its way to the socket's thread.
#[derive(Debug)]
pub(crate) struct Outgoing {
    message: Message,
    /// The connection it was accepted for; on any other it is dropped, as the caller sends again.
    connection: u64,
    share: Reservation,
}

impl Default for DealerConfig {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            thread_name: "zmq-dealer",
            heartbeat: None,
            liveness: None,
            reconnect_delay_min: Duration::from_millis(10),
            reconnect_delay_max: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(3),
            outbox: QueueLimits { messages_max: 1_000, bytes_max: 256 * MIB },
            inbox: QueueLimits { messages_max: 1_000, bytes_max: 256 * MIB },
            message_bytes_max: 64 * MIB,
            linger: Duration::from_secs(1),
        }
    }
}

impl DealerConfig {
    fn validate(&self) -> Result<(), ConnectError> {
        let queue_advice = "write 1 to 50000 messages and at least 1 byte";
        let time_advice = "write more than zero";
        let beats = self.heartbeat.as_ref().is_none_or(|beat| !beat.interval.is_zero());
        let checks = [
            ("heartbeat", beats, time_advice),
            ("liveness", self.liveness != Some(Duration::ZERO), time_advice),
            ("connect_timeout", !self.connect_timeout.is_zero(), time_advice),
            ("outbox", self.outbox.is_valid(), queue_advice),
            ("inbox", self.inbox.is_valid(), queue_advice),
            ("message_bytes_max", self.message_bytes_max >= 1, "write at least 1"),
        ];
        match checks.into_iter().find(|(_, is_valid, _)| !is_valid) {
            Some((name, _, advice)) => Err(ConnectError::InvalidConfig { name, advice }),
            None => Ok(()),
        }
    }
}

impl Dealer {
    /// Starts to connect to `endpoint` and returns at once.
    ///
    /// # Errors
    /// [`ConnectError`] if that can never succeed.
    pub fn connect(endpoint: &Endpoint, config: DealerConfig) -> Result<Self, ConnectError> {
        config.validate()?;
        if endpoint.tcp_port() == Some(0) {
            return Err(ConnectError::PortZero { endpoint: endpoint.clone() });
        }
        Backoff::try_new(config.reconnect_delay_min, config.reconnect_delay_max, rand::rng())?;

        let (commands, accepted) = mpsc::unbounded_channel();
        let (inbox, events) = inbox(config.inbox);
        let outbox = Arc::new(Budget::new(config.outbox));
        let link = Arc::new(Link::default());
        let sender = DealerSender {
            commands,
            outbox: Arc::clone(&outbox),
            link: Arc::clone(&link),
            message_bytes_max: config.message_bytes_max,
        };
        let name = config.thread_name;
        let supervisor =
            Supervisor { endpoint: endpoint.clone(), config, inbox, accepted, outbox, link };
        let thread = SocketThread::spawn(name, move |stop| supervisor.run(stop));
        let thread = thread.map_err(ConnectError::Thread)?;
        Ok(Self { sender, receiver: DealerReceiver { events, thread } })
    }

    /// Returns another sender.
    pub fn sender(&self) -> DealerSender {
        self.sender.clone()
    }

    /// See [`DealerSender::send`].
    ///
    /// # Errors
    /// [`DealerSendError`] with the message.
    pub fn send(&self, message: Message) -> Result<(), DealerSendError> {
        self.sender.send(message)
    }

    /// See [`DealerReceiver::recv`].
    pub async fn recv(&mut self) -> Option<DealerEvent> {
        self.receiver.recv().await
    }

    /// See [`DealerReceiver::recv_blocking`].
    pub fn recv_blocking(&mut self) -> Option<DealerEvent> {
        self.receiver.recv_blocking()
    }

    /// Separates sending from receiving. The receiver owns the thread.
    pub fn split(self) -> (DealerSender, DealerReceiver) {
        (self.sender, self.receiver)
    }

    /// See [`DealerReceiver::close`].
    pub async fn close(self) {
        self.receiver.close().await;
    }
}

impl DealerSender {
    /// Accepts `message` for the present connection. Never waits.
    ///
    /// Acceptance is not delivery: if the connection is lost first, the message is lost too and
    /// [`DealerEvent::Disconnected`] follows. Messages arrive in the order of acceptance.
    ///
    /// # Errors
    /// [`DealerSendError`] with the message; nothing was sent.
    pub fn send(&self, message: Message) -> Result<(), DealerSendError> {
        let refuse = |message, kind| Err(DealerSendError { message, kind });
        let (bytes, max) = (message.byte_len(), self.message_bytes_max);
        if bytes > max {
            return refuse(message, DealerSendErrorKind::TooLarge { bytes, max });
        }
        if self.commands.is_closed() {
            return refuse(message, DealerSendErrorKind::Closed);
        }
        let Some(connection) = self.link.connection() else {
            return refuse(message, DealerSendErrorKind::NotConnected);
        };
        let Some(share) = self.outbox.try_reserve(bytes) else {
            return refuse(message, DealerSendErrorKind::Full);
        };
        let outgoing = Outgoing { message, connection, share };
        match self.commands.send(outgoing) {
            Ok(()) => Ok(()),
            Err(returned) => refuse(returned.0.message, DealerSendErrorKind::Closed),
        }
    }

    /// Tells whether there is a connection now.
    pub fn is_connected(&self) -> bool {
        self.link.connection().is_some()
    }

    /// Returns why the last attempt to connect failed or the last connection ended, for messages
    /// such as "cannot reach the broker"; nothing if that has not happened.
    pub fn last_failure(&self) -> Option<String> {
        self.link.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl DealerReceiver {
    /// Returns the next event, or nothing if the socket's thread has failed. Cancel safe.
    pub async fn recv(&mut self) -> Option<DealerEvent> {
        self.events.recv().await
    }

    /// Like [`DealerReceiver::recv`], for plain threads.
    ///
    /// # Panics
    /// If called from within an async runtime.
    pub fn recv_blocking(&mut self) -> Option<DealerEvent> {
        self.events.recv_blocking()
    }

    /// Returns the next event if one waits.
    pub fn try_recv(&mut self) -> Option<DealerEvent> {
        self.events.try_recv()
    }

    /// Stops the socket as dropping it does, without blocking the caller's thread.
    pub async fn close(self) {
        self.thread.close().await;
    }
}

impl Link {
    fn connection(&self) -> Option<u64> {
        Some(self.connection.load(Ordering::Acquire)).filter(|number| *number > 0)
    }
}

impl fmt::Debug for DealerSendError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The message may be megabytes of somebody's prompt.
        formatter.debug_struct("DealerSendError").field("kind", &self.kind).finish_non_exhaustive()
    }
}
