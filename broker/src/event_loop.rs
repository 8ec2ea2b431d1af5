//! The one loop: what happened goes into the core, what it wants done comes out.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::bail;
use broker_core::{Broker, ClientPeer, Command, WorkerPeer};
use bytes::Bytes;
use protocol::{Envelope, ErrorCode, Failure, frames};
use tracing::{debug, info, trace, warn};
use transport::{Message, RouterEvent, RouterReceiver, RouterSendError, RouterSender};

use crate::{blob_store::StoreThread, notice, peers::PeerTable};

/// Wakes the loop when nothing else is to be waited for.
const IDLE: Duration = Duration::from_mins(1);

/// One ROUTER and the core's numbers for its peers.
#[derive(Debug)]
pub(crate) struct Side<N> {
    sender: RouterSender,
    receiver: RouterReceiver,
    peers: PeerTable<N>,
    /// Peers that a message could not be sent to and that were warned of.
    troubled: BTreeSet<N>,
}

/// Everything that the loop drives.
#[derive(Debug)]
pub(crate) struct EventLoop {
    broker: Broker,
    clients: Side<ClientPeer>,
    workers: Side<WorkerPeer>,
    store: StoreThread,
    grace: Duration,
}

impl<N: Copy + Ord> Side<N> {
    /// The side of a bound ROUTER.
    pub(crate) fn new(
        (sender, receiver): (RouterSender, RouterReceiver),
        make: fn(u64) -> N,
    ) -> Self {
        Self { sender, receiver, peers: PeerTable::new(make), troubled: BTreeSet::new() }
    }

    /// Sends to a peer that is still there.
    fn send(&self, to: N, frames: Vec<Bytes>) -> Result<(), RouterSendError> {
        let (Some(peer), Ok(message)) = (self.peers.peer(to), Message::new(frames)) else {
            return Ok(());
        };
        self.sender.send(peer, message)
    }
}

impl EventLoop {
    /// A loop around `broker`, which gives up `grace` after it was told to stop.
    pub(crate) fn new(
        broker: Broker,
        clients: Side<ClientPeer>,
        workers: Side<WorkerPeer>,
        store: StoreThread,
        grace: Duration,
    ) -> Self {
        Self { broker, clients, workers, store, grace }
    }

    /// Serves until `shutdown` resolves and everything that was accepted is answered, or the grace
    /// period is over.
    pub(crate) async fn run(
        mut self,
        shutdown: impl Future<Output = String>,
    ) -> anyhow::Result<()> {
        tokio::pin!(shutdown);
        let mut stop_at = None;
        loop {
            // 1. What the core wants done.
            self.execute_commands()?;
            if stop_at.is_some_and(|stop_at| self.is_finished(stop_at)) {
                break;
            }
            let wake = self.wake(stop_at);
            tokio::select! {
                biased;
                // 2. Time that has passed: a flood of messages must not keep deadlines waiting.
                () = tokio::time::sleep_until(wake.into()), if wake <= Instant::now() => {
                    self.broker.handle_timeout(Instant::now());
                }
                // 3. Shutdown.
                reason = &mut shutdown, if stop_at.is_none() => {
                    stop_at = Some(self.drain(reason));
                }
                // 4. Workers: their answers free what clients wait for.
                event = self.workers.receiver.recv() => self.worker_event(event)?,
                // 5. The blob store, which has a bounded number of commands.
                event = self.store.recv() => {
                    self.broker.handle_blob(event?, Instant::now());
                }
                // 6. Clients: the only ones that may flood, so everybody else comes before.
                event = self.clients.receiver.recv() => self.client_event(event)?,
                // 7. The next deadline.
                () = tokio::time::sleep_until(wake.into()) => {
                    self.broker.handle_timeout(Instant::now());
                }
            }
        }
        self.close().await
    }

    fn wake(&self, stop_at: Option<Instant>) -> Instant {
        let idle = Instant::now() + IDLE;
        [self.broker.poll_timeout(), stop_at].into_iter().flatten().min().unwrap_or(idle)
    }

    fn drain(&mut self, reason: String) -> Instant {
        info!(reason, grace_ms = self.grace.as_millis(), "draining");
        self.broker.drain(reason);
        Instant::now() + self.grace
    }

    /// Whether a draining broker may end.
    fn is_finished(&self, stop_at: Instant) -> bool {
        self.broker.is_idle() || stop_at <= Instant::now()
    }

    /// Answers what is left and closes the sockets once everything is written.
    async fn close(mut self) -> anyhow::Result<()> {
        if !self.broker.is_idle() {
            warn!("the grace period is over: the remaining requests are answered with an error");
        }
        self.broker.give_up("the broker stopped before the request was answered");
        self.execute_commands()?;
        self.clients.receiver.close().await;
        self.workers.receiver.close().await;
        self.store.close();
        info!("stopped");
        Ok(())
    }

    fn worker_event(&mut self, event: Option<RouterEvent>) -> anyhow::Result<()> {
        let now = Instant::now();
        match event {
            Some(RouterEvent::Message { peer, message }) => {
                let number = self.workers.peers.number(&peer);
                self.broker.handle_worker(number, message.into_frames(), now);
            }
            Some(RouterEvent::Gone { peer }) => {
                if let Some(number) = self.workers.peers.remove(&peer) {
                    self.broker.handle_worker_gone(number, now);
                }
            }
            None => bail!("the socket for workers has failed"),
        }
        Ok(())
    }

    fn client_event(&mut self, event: Option<RouterEvent>) -> anyhow::Result<()> {
        let now = Instant::now();
        match event {
            Some(RouterEvent::Message { peer, message }) => {
                let number = self.clients.peers.number(&peer);
                trace!(client = %number, bytes = message.byte_len(), "message of a client");
                self.broker.handle_client(number, message.into_frames(), now);
            }
            Some(RouterEvent::Gone { peer }) => {
                if let Some(number) = self.clients.peers.remove(&peer) {
                    self.clients.troubled.remove(&number);
                    debug!(client = %number, "client left");
                    self.broker.handle_client_gone(number, now);
                }
            }
            None => bail!("the socket for clients has failed"),
        }
        Ok(())
    }

    fn execute_commands(&mut self) -> anyhow::Result<()> {
        while let Some(command) = self.broker.poll_command() {
            match command {
                Command::SendClient { to, frames } => self.send_client(to, frames),
                Command::SendWorker { to, frames } => {
                    // A request that does not get through is missing from the worker's heartbeat,
                    // and the core sends it again.
                    if let Err(error) = self.workers.send(to, frames) {
                        warn!(worker = %to, %error, "a message to a worker was dropped");
                    }
                }
                Command::Blob(command) => self.store.send(command)?,
                Command::Notice(notice) => notice::log(&notice),
            }
        }
        Ok(())
    }

    /// Sends a reply. One that cannot be sent is replaced by an error, so that the client still
    /// gets its one answer.
    fn send_client(&mut self, to: ClientPeer, frames: Vec<Bytes>) {
        let Err(error) = self.clients.send(to, frames.clone()) else { return };
        let refusal = refusal(&error).and_then(|failure| error_frames(frames, failure));
        let sent = refusal.is_some_and(|refusal| self.clients.send(to, refusal).is_ok());
        // Who left a moment ago is nothing to worry about, and one line is enough about a client
        // that asks and does not read.
        let is_gone = matches!(error, RouterSendError::UnknownPeer { .. });
        if !is_gone && self.clients.troubled.insert(to) {
            warn!(client = %to, %error, replaced = sent, "a reply could not be sent");
        } else {
            debug!(client = %to, %error, replaced = sent, "a reply could not be sent");
        }
    }
}

/// What a client is told whose reply cannot be sent.
fn refusal(error: &RouterSendError) -> Option<Failure> {
    match error {
        RouterSendError::TooLarge { bytes, max } => Some(Failure::new(
            ErrorCode::TooLarge,
            format!(
                "the reply has {bytes} bytes: at most {max} are sent; ask for fewer prompts at once"
            ),
        )),
        RouterSendError::PeerFull { .. } | RouterSendError::Full => Some(Failure {
            retry_after_ms: Some(1_000),
            ..Failure::new(
                ErrorCode::Overloaded,
                "replies wait because they are not read fast enough: ask for less at once",
            )
        }),
        RouterSendError::UnknownPeer { .. } | RouterSendError::Closed => None,
    }
}

/// The error that takes the place of a reply.
fn error_frames(reply: Vec<Bytes>, failure: Failure) -> Option<Vec<Bytes>> {
    let Envelope { delimited, peek, .. } = Envelope::open(reply).ok()?;
    let error = frames::frames(&failure.into_reply(Some(peek.id?)), Vec::new());
    Some(frames::delimit(error, delimited))
}

#[cfg(test)]
mod tests {
    use protocol::{ErrorReply, reply::CancelReply};

    use super::*;

    #[test]
    fn a_reply_that_is_too_large_is_replaced_by_an_error_with_its_id() {
        let reply = CancelReply { id: "7".parse().unwrap(), cancelled: true };
        let reply = frames::delimit(frames::frames(&reply, vec![]), true);
        let failure = refusal(&RouterSendError::TooLarge { bytes: 9, max: 8 }).unwrap();

        let envelope = Envelope::open(error_frames(reply, failure).unwrap()).unwrap();

        let error: ErrorReply = envelope.read().unwrap();
        assert_eq!((error.id.unwrap().as_str(), error.code), ("7", ErrorCode::TooLarge));
        assert!(envelope.delimited);
    }
}
