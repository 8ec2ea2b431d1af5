//! The client's own thread: moves messages between callers, the table and the socket.
//!
//! Callers may be on any runtime or on none; they talk to the thread over channels.

use std::{
    collections::BTreeMap,
    future::pending,
    io,
    time::{Duration, Instant},
};

use bytes::Bytes;
use client_core::{Action, OPEN_MAX, Outcome, Start, Table, Unclaimed};
use protocol::{Envelope, RequestId, frames, request::Heartbeat};
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    time::sleep_until,
};
use transport::{Dealer, DealerConfig, DealerEvent, DealerSendErrorKind, Endpoint, Message};

use crate::error::{Error, ErrorKind};

/// How often the farm is shown that this client lives.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// A farm that is silent for this long, heartbeats included, is connected to anew.
const LIVENESS: Duration = Duration::from_secs(2);

/// What callers tell the thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// Ask the farm and answer here.
    Start(Start, Answer),
    /// Nobody waits for `request` any more; `cancel` is the id to tell the farm with.
    Cancel { request: RequestId, cancel: RequestId },
    /// Answer after this time: callers have no timer of their own.
    Pause(Duration, oneshot::Sender<()>),
    /// Say how many replies nobody claimed.
    Unclaimed(oneshot::Sender<Unclaimed>),
}

/// Where the outcome of one request goes: a terminal reply, or nothing when only a connection was
/// asked for.
pub(crate) type Answer = oneshot::Sender<Result<Option<Envelope>, Error>>;

/// Starts the thread. It ends when the last sender of its commands is dropped.
pub(crate) fn spawn(
    endpoint: Endpoint,
    connect_timeout: Duration,
) -> Result<mpsc::UnboundedSender<Command>, Error> {
    let heartbeat = transport::Heartbeat {
        message: message(frames::frames(&Heartbeat {}, Vec::new())),
        interval: HEARTBEAT_INTERVAL,
    };
    let config = DealerConfig {
        thread_name: "luna-client-zmq",
        heartbeat: Some(heartbeat),
        liveness: Some(LIVENESS),
        ..DealerConfig::default()
    };
    let dealer =
        Dealer::connect(&endpoint, config).map_err(|error| Error::invalid(error.to_string()))?;
    let cannot = |error: io::Error| {
        Error::new(ErrorKind::Closed, format!("cannot start the client's thread: {error}"))
    };
    let runtime = Builder::new_current_thread().enable_time().build().map_err(cannot)?;
    let (sender, commands) = mpsc::unbounded_channel();
    let driver = Driver {
        endpoint,
        dealer,
        commands,
        table: Table::new(connect_timeout),
        answers: BTreeMap::new(),
        connect_timeout,
    };
    std::thread::Builder::new()
        .name("luna-client".to_owned())
        .spawn(move || runtime.block_on(driver.run()))
        .map_err(cannot)?;
    Ok(sender)
}

struct Driver {
    endpoint: Endpoint,
    dealer: Dealer,
    commands: mpsc::UnboundedReceiver<Command>,
    table: Table,
    answers: BTreeMap<RequestId, Answer>,
    connect_timeout: Duration,
}

impl Driver {
    async fn run(mut self) {
        loop {
            while let Some(action) = self.table.poll_action() {
                self.perform(action);
            }
            let wake = self.table.poll_timeout();
            tokio::select! {
                biased;
                event = self.dealer.recv() => match event {
                    Some(event) => self.handle_event(event),
                    None => break,
                },
                command = self.commands.recv() => match command {
                    Some(command) => self.handle_command(command),
                    None => break,
                },
                () = elapsed(wake) => self.table.handle_timeout(Instant::now()),
            }
        }
        self.dealer.close().await;
    }

    fn handle_event(&mut self, event: DealerEvent) {
        match event {
            DealerEvent::Connected => self.table.handle_connected(Instant::now()),
            DealerEvent::Disconnected => self.table.handle_disconnected(),
            DealerEvent::Message(message) => match Envelope::open(message.into_frames()) {
                Ok(envelope) => {
                    if envelope.peek.kind == "error" && envelope.peek.id.is_none() {
                        tracing::warn!("the farm could not read a request of this client");
                    }
                    self.table.handle_message(envelope, Instant::now());
                }
                Err(error) => tracing::warn!(%error, "a message of the farm was dropped"),
            },
        }
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Start(start, answer) => {
                self.answers.insert(start.id.clone(), answer);
                self.table.start(start, Instant::now());
            }
            Command::Cancel { request, cancel } => {
                self.answers.remove(&request);
                self.table.cancel(&request, cancel);
            }
            Command::Pause(pause, done) => {
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    // Whoever paused may be gone.
                    let _ = done.send(());
                });
            }
            Command::Unclaimed(answer) => {
                // Whoever asked may be gone.
                let _ = answer.send(self.table.unclaimed());
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send { request, frames } => self.send(request.as_ref(), frames),
            Action::Finish { id, outcome } => {
                if let Some(answer) = self.answers.remove(&id) {
                    // Whoever asked may have gone in this moment.
                    let _ = answer.send(self.result(outcome));
                }
            }
        }
    }

    fn send(&mut self, request: Option<&RequestId>, frames: Vec<Bytes>) {
        let Err(error) = self.dealer.send(message(frames)) else { return };
        tracing::debug!(%error, "a message was not sent");
        let Some(id) = request else { return };
        match error.kind {
            // `Disconnected` and `Connected` follow, which sends it again.
            DealerSendErrorKind::NotConnected | DealerSendErrorKind::Closed => {}
            DealerSendErrorKind::Full => self.table.handle_refused(id, Instant::now()),
            DealerSendErrorKind::TooLarge { .. } => self.table.handle_too_large(id),
        }
    }

    fn result(&self, outcome: Outcome) -> Result<Option<Envelope>, Error> {
        let Self { endpoint, connect_timeout, .. } = self;
        match outcome {
            Outcome::Reply(envelope) => Ok(Some(envelope)),
            Outcome::Connected => Ok(None),
            Outcome::TimedOut => {
                let place = match (self.dealer.sender().is_connected(), self.failure()) {
                    (false, Some(failure)) => format!(", which is not connected: {failure}"),
                    (false, None) => ", which is not connected".to_owned(),
                    (true, _) => String::new(),
                };
                let message = format!(
                    "no answer within the time budget from the farm at `{endpoint}`{place}"
                );
                Err(Error::new(ErrorKind::Timeout, message))
            }
            Outcome::Unreachable => {
                let why = self.failure().map(|failure| format!(" ({failure})")).unwrap_or_default();
                let message = format!(
                    "no farm at `{endpoint}` within {connect_timeout:?}{why}; start one with: luna up"
                );
                Err(Error::new(ErrorKind::Unreachable, message))
            }
            Outcome::Full => {
                let message = format!("{OPEN_MAX} requests are open: wait for one to be answered");
                Err(Error::new(ErrorKind::Busy, message))
            }
            Outcome::TooLarge => {
                Err(Error::invalid("the request is larger than one message may be: split it"))
            }
        }
    }

    fn failure(&self) -> Option<String> {
        self.dealer.sender().last_failure()
    }
}

fn message(frames: Vec<Bytes>) -> Message {
    Message::new(frames).expect("a message of the protocol has two frames or more")
}

async fn elapsed(wake: Option<Instant>) {
    match wake {
        Some(wake) => sleep_until(wake.into()).await,
        None => pending().await,
    }
}
