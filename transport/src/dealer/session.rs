//! The supervisor on a DEALER's thread: one session per connection.
//!
//! ```text
//! Waiting ──back-off over──▶ Connecting ──handshake done──▶ Connected
//!    ▲                           │ failed                       │ lost, silent, or too large
//!    └───────────────────────────┴──────────────────────────────┘
//! ```
//!
//! Every session has a runtime of its own. `zeromq` cannot disconnect, and a writer that is stuck
//! on a dead connection would stay; dropping the runtime closes whatever the session opened.

use std::future::pending;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc::Receiver as MonitorReceiver;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{
    Instant, Interval, MissedTickBehavior, interval_at, sleep, sleep_until, timeout,
};
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv,
    SocketSend, ZmqMessage,
};

use super::{DealerConfig, DealerEvent, Link, Outgoing};
use crate::backoff::Backoff;
use crate::budget::Budget;
use crate::endpoint::{Address, Endpoint, Host};
use crate::inbox::InboxSender;
use crate::message::Message;
use crate::thread::{Stop, runtime, tasks_ended};

/// What outlives a session.
#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) endpoint: Endpoint,
    pub(crate) config: DealerConfig,
    pub(crate) inbox: InboxSender<DealerEvent>,
    pub(crate) accepted: UnboundedReceiver<Outgoing>,
    pub(crate) outbox: Arc<Budget>,
    pub(crate) link: Arc<Link>,
}

/// One live connection.
struct Connection {
    /// Counted from 1.
    number: u64,
    sender: DealerSendHalf,
    receiver: DealerRecvHalf,
    monitor: MonitorReceiver<SocketEvent>,
    /// When something last arrived, or the inbox last had no room.
    heard: Instant,
    /// Whether anything has arrived.
    is_proven: bool,
}

/// How a session ended.
enum Ended {
    /// Without a connection that proved itself.
    Failed(String),
    /// With one.
    Lost(String),
    /// By request.
    Stopped,
}

impl Supervisor {
    /// Runs sessions until `stop`.
    pub(crate) fn run(mut self, mut stop: Stop) {
        let (min, max) = (self.config.reconnect_delay_min, self.config.reconnect_delay_max);
        let mut backoff = Backoff::try_new(min, max, rand::rng())
            .expect("the bounds were checked when the socket was made");
        let mut number = 0;
        let mut is_first = true;
        loop {
            let delay = if is_first { Duration::ZERO } else { backoff.next_delay() };
            is_first = false;
            match self.session(delay, &mut number, &mut stop) {
                Ended::Failed(reason) => self.report(reason),
                Ended::Lost(reason) => {
                    self.report(reason);
                    backoff.reset();
                }
                Ended::Stopped => break,
            }
        }
        tracing::debug!(endpoint = %self.endpoint, "closed");
    }

    fn session(&mut self, delay: Duration, number: &mut u64, stop: &mut Stop) -> Ended {
        let runtime = match runtime() {
            Ok(runtime) => runtime,
            Err(error) => {
                std::thread::sleep(self.config.reconnect_delay_max);
                return Ended::Failed(format!("no runtime: {error}"));
            }
        };
        let ended = runtime.block_on(async {
            let attempt = async {
                self.inbox_cleared().await;
                sleep(delay).await;
                self.open(*number + 1).await
            };
            let connection = tokio::select! {
                () = stop.requested() => return Ended::Stopped,
                attempt = attempt => attempt,
            };
            match connection {
                Ok(connection) => {
                    *number += 1;
                    self.hold(connection, stop).await
                }
                Err(reason) => Ended::Failed(reason),
            }
        });
        // Not a plain drop, which would wait for a name lookup that hangs.
        runtime.shutdown_background();
        ended
    }

    /// Waits until the caller has room for the events of the last session.
    async fn inbox_cleared(&mut self) {
        while !self.inbox.is_clear() {
            self.inbox.deliver().await;
        }
    }

    /// Waiting => (Connected | Waiting)
    async fn open(&self, number: u64) -> Result<Connection, String> {
        let limit = self.config.connect_timeout;
        // `zeromq` repeats a refused attempt by itself, at its own pace and without saying so.
        // Ours is faster and jittered, so only an address that answers is handed over.
        match timeout(limit, reach(&self.endpoint)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("no answer within {limit:?}")),
        }
        let mut options = SocketOptions::default();
        options.connect_timeout(limit);
        let mut socket = DealerSocket::with_options(options);
        let monitor = socket.monitor();
        let connected = socket.connect(&self.endpoint.to_string()).await;
        connected.map_err(|error| error.to_string())?;
        let (sender, receiver) = socket.split();
        let heard = Instant::now();
        Ok(Connection { number, sender, receiver, monitor, heard, is_proven: false })
    }

    /// Connected => (Waiting | Stopped)
    async fn hold(&mut self, mut connection: Connection, stop: &mut Stop) -> Ended {
        tracing::info!(endpoint = %self.endpoint, "connected");
        // Whatever still waits was accepted for an earlier connection.
        while self.accepted.try_recv().is_ok() {}
        self.link.connection.store(connection.number, Ordering::Release);
        self.inbox.push(DealerEvent::Connected, 0);
        let lost = tokio::select! {
            () = stop.requested() => None,
            reason = self.exchange(&mut connection) => Some(reason),
        };
        self.link.connection.store(0, Ordering::Release);
        let Some(reason) = lost else {
            self.finish(connection).await;
            return Ended::Stopped;
        };
        tracing::info!(endpoint = %self.endpoint, reason, "disconnected");
        self.inbox.push(DealerEvent::Disconnected, 0);
        if connection.is_proven { Ended::Lost(reason) } else { Ended::Failed(reason) }
    }

    /// Moves messages both ways until the connection is lost, and returns why.
    async fn exchange(&mut self, connection: &mut Connection) -> String {
        let mut heartbeats = self.config.heartbeat.as_ref().map(|heartbeat| {
            let mut interval = interval_at(Instant::now() + heartbeat.interval, heartbeat.interval);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        loop {
            let may_read = self.inbox.is_clear();
            let silence = self.config.liveness.map(|liveness| connection.heard + liveness);
            let step = tokio::select! {
                Some(event) = connection.monitor.next() => check(&event),
                Some(outgoing) = self.accepted.recv() => connection.send(outgoing).await,
                received = connection.receiver.recv(), if may_read => match received {
                    Ok(message) => self.receive(connection, message),
                    Err(error) => Err(error.to_string()),
                },
                () = self.inbox.deliver(), if !may_read => {
                    connection.heard = Instant::now();
                    Ok(())
                }
                () = tick(heartbeats.as_mut()) => self.beat(connection).await,
                () = elapsed(silence), if may_read => {
                    Err("nothing arrived within the liveness time".to_owned())
                }
            };
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    fn receive(&mut self, connection: &mut Connection, message: ZmqMessage) -> Result<(), String> {
        connection.heard = Instant::now();
        connection.is_proven = true;
        let message = Message::from_zmq(message).map_err(|error| error.to_string())?;
        let (bytes, max) = (message.byte_len(), self.config.message_bytes_max);
        if bytes > max {
            return Err(format!(
                "the peer sent a message of {bytes} bytes, over the limit of {max}"
            ));
        }
        self.inbox.push(DealerEvent::Message(message), bytes);
        Ok(())
    }

    /// Sends a heartbeat unless the queue is full, when the peer has enough to hear already.
    async fn beat(&self, connection: &mut Connection) -> Result<(), String> {
        let Some(heartbeat) = &self.config.heartbeat else { return Ok(()) };
        let Some(share) = self.outbox.try_reserve(heartbeat.message.byte_len()) else {
            return Ok(());
        };
        let message = heartbeat.message.clone();
        connection.send(Outgoing { message, connection: connection.number, share }).await
    }

    /// Writes what was accepted and closes the connection, within the linger time.
    async fn finish(&mut self, mut connection: Connection) {
        let deadline = Instant::now() + self.config.linger;
        self.accepted.close();
        while let Some(outgoing) = self.accepted.recv().await {
            if connection.send(outgoing).await.is_err() {
                return;
            }
        }
        // Reading on keeps the peer free to read: a peer that is blocked in a write is deaf.
        let discard = async { while connection.receiver.recv().await.is_ok() {} };
        tokio::select! {
            () = self.outbox.idle() => {}
            () = discard => {}
            () = sleep_until(deadline) => {
                tracing::warn!("closed with messages that the peer did not take in time");
            }
        }
        drop(connection);
        tasks_ended(deadline).await;
    }

    fn report(&self, reason: String) {
        tracing::debug!(endpoint = %self.endpoint, reason, "no connection");
        *self.link.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }
}

impl Connection {
    /// Hands a message to the connection's writer, or drops it if it was meant for another one.
    ///
    /// Does not wait: the outbox keeps the `zeromq` queue far below its fixed bound.
    async fn send(&mut self, outgoing: Outgoing) -> Result<(), String> {
        let Outgoing { message, connection, share } = outgoing;
        if connection != self.number {
            return Ok(());
        }
        let sent = self.sender.send(message.guarded(share).into_zmq()).await;
        sent.map_err(|error| error.to_string())
    }
}

/// Opens and closes a connection to `endpoint`, to learn whether somebody listens.
async fn reach(endpoint: &Endpoint) -> io::Result<()> {
    match endpoint.address() {
        Address::Tcp { host: Host::Ip(ip), port } => {
            TcpStream::connect((*ip, *port)).await.map(drop)
        }
        Address::Tcp { host: Host::Name(name), port } => {
            TcpStream::connect((name.as_str(), *port)).await.map(drop)
        }
        Address::Ipc(path) => UnixStream::connect(path).await.map(drop),
    }
}

fn check(event: &SocketEvent) -> Result<(), String> {
    if let SocketEvent::Disconnected(_) = event {
        Err("the peer closed the connection".to_owned())
    } else {
        Ok(())
    }
}

/// Waits for the next tick; for ever without an interval.
async fn tick(interval: Option<&mut Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => pending().await,
    }
}

/// Waits for `deadline`; for ever without one.
async fn elapsed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
