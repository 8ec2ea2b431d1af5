//! The loop on a ROUTER's thread. Nothing here waits for anything but the socket, its channels
//! and its timers.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender as ReadySender;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc::Receiver as MonitorReceiver;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{interval, sleep, sleep_until};
use zeromq::util::PeerIdentity;
use zeromq::{
    MultiPeerBackend, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketEvent,
    SocketRecv, SocketSend, ZmqMessage,
};

use super::{Outgoing, RouterConfig, RouterEvent};
use crate::budget::Budget;
use crate::endpoint::Endpoint;
use crate::inbox::InboxSender;
use crate::listener::lock_directory;
use crate::message::Message;
use crate::peer::{Peer, Peers};
use crate::thread::{Stop, runtime, tasks_ended};

/// What the thread shares with the caller's halves.
#[derive(Debug)]
pub(crate) struct Wiring {
    pub(crate) inbox: InboxSender<RouterEvent>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) outbox: Arc<Budget>,
    pub(crate) config: RouterConfig,
    pub(crate) endpoint: Endpoint,
}

/// The state of the thread.
pub(crate) struct RouterTask {
    wiring: Wiring,
    sender: RouterSendHalf,
    backend: Arc<dyn MultiPeerBackend>,
}

/// `zeromq` drops monitor events beyond this many that wait.
const MONITOR_EVENTS_MAX: usize = 1024;

impl RouterTask {
    /// Serves `listener` until `stop`, having reported to `ready` whether that began well.
    pub(crate) fn run(
        listener: zeromq::Listener,
        wiring: Wiring,
        accepted: UnboundedReceiver<Outgoing>,
        ready: &ReadySender<io::Result<()>>,
        stop: Stop,
    ) {
        let runtime = match runtime() {
            Ok(runtime) => runtime,
            // The binder waits for the answer, so it is there to read it.
            Err(error) => return drop(ready.send(Err(error))),
        };
        runtime.block_on(async {
            let mut socket = RouterSocket::new();
            let monitor = socket.monitor();
            if let Err(error) = socket.bind_listener(listener).await {
                return drop(ready.send(Err(io::Error::other(error))));
            }
            let backend = socket.backend();
            let (sender, receiver) = socket.split();
            tracing::info!(endpoint = %wiring.endpoint, "bound");
            let _ = ready.send(Ok(()));
            Self { wiring, sender, backend }.serve(receiver, monitor, accepted, stop).await;
        });
        runtime.shutdown_background();
    }

    async fn serve(
        mut self,
        mut receiver: RouterRecvHalf,
        mut monitor: MonitorReceiver<SocketEvent>,
        mut accepted: UnboundedReceiver<Outgoing>,
        mut stop: Stop,
    ) {
        let mut stall_check = interval(self.wiring.config.stall / 4);
        loop {
            self.drain(&mut monitor);
            tokio::select! {
                () = stop.requested() => break,
                Some(event) = monitor.next() => self.note(&event),
                Some(outgoing) = accepted.recv() => self.send(outgoing).await,
                arrival = receiver.recv(), if self.wiring.inbox.is_clear() => match arrival {
                    Ok(message) => {
                        // Whoever sent it may have taken a routing id over just now.
                        self.drain(&mut monitor);
                        self.receive(message);
                    }
                    Err(error) => {
                        tracing::error!(%error, "the ROUTER cannot receive any more");
                        break;
                    }
                },
                () = self.wiring.inbox.deliver(), if !self.wiring.inbox.is_clear() => {}
                _ = stall_check.tick() => self.disconnect_stalled(Instant::now()),
            }
        }
        self.finish(receiver, accepted).await;
    }

    /// Takes every monitor event that waits, so that none is lost to the monitor's own bound.
    fn drain(&mut self, monitor: &mut MonitorReceiver<SocketEvent>) {
        let mut taken = 0;
        while let Ok(event) = monitor.try_recv() {
            self.note(&event);
            taken += 1;
        }
        if taken >= MONITOR_EVENTS_MAX {
            // Disconnections may have been lost among them. Whoever is still there reconnects.
            tracing::warn!(taken, "too many connections ended at once: disconnecting all peers");
            for peer in self.wiring.peers.all() {
                self.disconnect(&peer);
            }
        }
    }

    fn note(&mut self, event: &SocketEvent) {
        // A peer that names itself as a connected one does takes its place: `zeromq` closes the
        // older connection without a word. What it was owed is not the newcomer's.
        if let SocketEvent::Disconnected(identity) | SocketEvent::Accepted(_, identity) = event {
            self.gone(&Peer::from(Bytes::from(identity.clone())));
        } else {
            tracing::trace!(?event, "socket event");
        }
    }

    fn receive(&mut self, message: ZmqMessage) {
        let mut frames = message.into_vecdeque();
        let routing_id = frames.pop_front().map(Peer::from);
        let message = Message::new(frames.into());
        let (Some(peer), Ok(message)) = (routing_id, message) else {
            tracing::warn!("ignored a message of no frames");
            return;
        };
        self.wiring.peers.insert(&peer);
        let (bytes, frames) = (message.byte_len(), message.frames().len());
        if bytes > self.wiring.config.message_bytes_max || frames > self.wiring.config.frames_max {
            tracing::warn!(%peer, bytes, frames, "disconnecting a peer whose message is too large");
            self.disconnect(&peer);
        } else {
            self.wiring.inbox.push(RouterEvent::Message { peer, message }, bytes);
        }
    }

    /// Hands a message to the writer of its peer.
    ///
    /// Does not wait: the peer's budget keeps its `zeromq` queue far below the fixed bound at
    /// which sending would suspend while it holds a lock.
    async fn send(&mut self, outgoing: Outgoing) {
        let Outgoing { peer, message, shares } = outgoing;
        if !self.wiring.peers.is_present(&peer, &shares.0) {
            return; // It was accepted for an earlier connection of that name.
        }
        let mut message = message.guarded(shares).into_zmq();
        message.push_front(peer.to_frame());
        if let Err(error) = self.sender.send(message).await {
            tracing::debug!(%peer, %error, "cannot send");
            self.gone(&peer);
        }
    }

    fn disconnect_stalled(&mut self, now: Instant) {
        for peer in self.wiring.peers.stalled(self.wiring.config.stall, now) {
            tracing::warn!(%peer, "disconnecting a peer that takes nothing of what it is sent");
            self.disconnect(&peer);
        }
    }

    /// Removes `peer` from the routing table. Its connection closes once its writer is free; the
    /// kernel ends a TCP connection that is stuck.
    fn disconnect(&mut self, peer: &Peer) {
        if let Ok(identity) = PeerIdentity::try_from(peer.to_frame()) {
            self.backend.peer_disconnected(&identity);
        }
        self.gone(peer);
    }

    /// Announces once that a peer which has spoken is disconnected.
    fn gone(&mut self, peer: &Peer) {
        if self.wiring.peers.remove(peer) {
            self.wiring.inbox.push(RouterEvent::Gone { peer: peer.clone() }, 0);
        }
    }

    /// Writes what was accepted and closes the socket, within the linger time.
    async fn finish(
        mut self,
        mut receiver: RouterRecvHalf,
        mut accepted: UnboundedReceiver<Outgoing>,
    ) {
        let deadline = tokio::time::Instant::now() + self.wiring.config.linger;
        accepted.close();
        while let Some(outgoing) = accepted.recv().await {
            self.send(outgoing).await;
        }
        // Reading on keeps the peers free to read: a peer that is blocked in a write is deaf.
        let discard = async { while receiver.recv().await.is_ok() {} };
        tokio::select! {
            () = self.wiring.outbox.idle() => {}
            () = discard => {}
            () = sleep_until(deadline) => {
                tracing::warn!("closed with messages that peers did not take in time");
            }
        }
        let Self { wiring, sender, backend } = self;
        let lock = lock_for_removal(&wiring.endpoint);
        drop((sender, receiver, backend));
        removed(&wiring.endpoint).await;
        drop(lock);
        tasks_ended(deadline).await;
        tracing::info!(endpoint = %wiring.endpoint, "closed");
    }
}

/// Keeps other Luna processes from binding the path while `zeromq` removes the socket file.
fn lock_for_removal(endpoint: &Endpoint) -> Option<File> {
    endpoint.ipc_path().and_then(|path| lock_directory(path).ok())
}

/// Waits until `zeromq` has removed the socket file, for a short time.
async fn removed(endpoint: &Endpoint) {
    const PATIENCE: Duration = Duration::from_millis(500);
    const POLL: Duration = Duration::from_millis(1);
    let deadline = Instant::now() + PATIENCE;
    let Some(path) = endpoint.ipc_path() else { return };
    while path.symlink_metadata().is_ok() && Instant::now() < deadline {
        sleep(POLL).await;
    }
}
