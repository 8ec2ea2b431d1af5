//! ROUTER and DEALER sockets on threads of their own; the only importer of `zeromq`.
//!
//! The crate moves multipart messages and knows nothing of what they say: envelopes, kinds and
//! limits of fields belong to `protocol`. What it adds to `zeromq` is what that crate lacks:
//!
//! * **One OS thread and one `current_thread` runtime per socket.** `zeromq` 0.7.0 deadlocks on a
//!   multi-thread runtime when peers come and go. Callers talk to the thread over channels, from
//!   any runtime or from none. The thread must never block: a handler that waits for anything but
//!   the socket, its channels and its timers stops every peer of that socket.
//! * **Bounds.** Every queue is bounded in messages and in bytes, and the answer at each bound is
//!   written on [`RouterConfig`] and [`DealerConfig`]. A slow peer fills its own queue and no other.
//! * **Reconnection.** A [`Dealer`] reconnects for ever with full-jitter back-off, sends
//!   heartbeats and replaces a connection on which nothing arrives.
//! * **Safe addresses.** [`Endpoint`] refuses what would panic or surprise, and [`Router::bind`]
//!   accepts only `ipc` (mode 0600) and loopback: a bare `zeromq` socket aborts the process on a
//!   73-byte message, so it must not face bytes from a network.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use luna_transport::{Dealer, DealerConfig, DealerEvent, Message, Router, RouterConfig, RouterEvent};
//!
//! let mut router = Router::bind(&"tcp://127.0.0.1:0".parse()?, RouterConfig::default())?;
//! let mut dealer = Dealer::connect(router.endpoint(), DealerConfig::default())?;
//!
//! assert!(matches!(dealer.recv_blocking(), Some(DealerEvent::Connected)));
//! dealer.send(Message::from("ready"))?;
//! let Some(RouterEvent::Message { peer, message }) = router.recv_blocking() else { panic!() };
//! router.send(&peer, message)?;
//! assert!(matches!(dealer.recv_blocking(), Some(DealerEvent::Message(_))));
//! # Ok(())
//! # }
//! ```

mod backoff;
mod budget;
mod dealer;
mod endpoint;
mod inbox;
mod listener;
mod message;
mod peer;
mod router;
mod thread;

pub use backoff::{Backoff, InvalidBackoff};
pub use budget::QueueLimits;
pub use dealer::{
    ConnectError, Dealer, DealerConfig, DealerEvent, DealerReceiver, DealerSendError,
    DealerSendErrorKind, DealerSender, Heartbeat,
};
pub use endpoint::{Endpoint, EndpointError, EndpointFault};
pub use listener::BindError;
pub use message::{EmptyMessage, Message};
pub use peer::Peer;
pub use router::{
    Router, RouterConfig, RouterEvent, RouterReceiver, RouterSendError, RouterSender,
};
