//! A connection without the SDK's manners: it sends what it likes, and reads only if it wants to.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use protocol::{Envelope, Header, RequestId, frames};
use tokio::time::timeout;
use transport::{Dealer, DealerConfig, DealerEvent, Message, QueueLimits};

/// One connection to the broker.
#[derive(Debug)]
pub(crate) struct Raw {
    dealer: Dealer,
}

impl Raw {
    /// Connects; nothing when the broker does not answer soon, as it may be away.
    pub(crate) async fn connect(endpoint: &str) -> Option<Self> {
        let config = DealerConfig {
            thread_name: "luna-raw-zmq",
            // What is not read here fills the socket at once, then the broker's queue.
            inbox: QueueLimits { messages_max: 1, bytes_max: usize::MAX >> 1 },
            linger: Duration::ZERO,
            ..DealerConfig::default()
        };
        let endpoint = endpoint.parse().expect("the endpoint of a farm can be connected to");
        let dealer = Dealer::connect(&endpoint, config).expect("a thread can be started");
        let mut raw = Self { dealer };
        let event = timeout(PATIENCE, raw.dealer.recv()).await;
        if matches!(event, Ok(Some(DealerEvent::Connected))) {
            return Some(raw);
        }
        raw.close().await;
        None
    }

    /// An id that nobody else has.
    pub(crate) fn id() -> RequestId {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("raw-{number}").parse().expect("letters, digits and a hyphen")
    }

    /// Sends a message; says whether it was accepted.
    pub(crate) fn send<H: Header>(&self, header: &H, attachments: Vec<Bytes>) -> bool {
        let message = Message::new(frames::frames(header, attachments));
        self.dealer.send(message.expect("a message of the protocol has frames")).is_ok()
    }

    /// Sends a message and waits for the next one; nothing when the connection ends.
    pub(crate) async fn ask<H: Header>(
        &mut self,
        header: &H,
        attachments: Vec<Bytes>,
    ) -> Option<Envelope> {
        if !self.send(header, attachments) {
            return None;
        }
        match timeout(PATIENCE, self.dealer.recv()).await {
            Ok(Some(DealerEvent::Message(message))) => Envelope::open(message.into_frames()).ok(),
            Ok(Some(DealerEvent::Connected | DealerEvent::Disconnected) | None) | Err(_) => None,
        }
    }

    /// Closes the connection at once.
    pub(crate) async fn close(self) {
        self.dealer.close().await;
    }
}

/// For one event.
const PATIENCE: Duration = Duration::from_secs(5);
