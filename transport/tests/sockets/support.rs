//! What the tests share: sockets on free addresses, and waits that fail instead of hanging.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use luna_transport::{
    Dealer, DealerConfig, DealerEvent, DealerReceiver, Endpoint, Message, Peer, Router,
    RouterConfig, RouterEvent, RouterReceiver,
};

/// Far longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A ROUTER on a free loopback port.
pub(crate) fn router() -> Router {
    bind(&endpoint("tcp://127.0.0.1:0"))
}

pub(crate) fn bind(endpoint: &Endpoint) -> Router {
    Router::bind(endpoint, RouterConfig::default()).unwrap()
}

pub(crate) fn dealer(endpoint: &Endpoint) -> Dealer {
    Dealer::connect(endpoint, DealerConfig::default()).unwrap()
}

/// A DEALER that has seen `Connected`.
pub(crate) async fn connected(endpoint: &Endpoint, config: DealerConfig) -> Dealer {
    let mut dealer = Dealer::connect(endpoint, config).unwrap();
    assert_eq!(event(&mut dealer).await, DealerEvent::Connected);
    dealer
}

pub(crate) fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

pub(crate) fn ipc(path: &Path) -> Endpoint {
    endpoint(&format!("ipc://{}", path.display()))
}

/// A message of one frame per part.
pub(crate) fn message<const N: usize>(parts: [&'static str; N]) -> Message {
    Message::new(parts.map(|part| Bytes::from_static(part.as_bytes())).to_vec()).unwrap()
}

pub(crate) fn zeros(bytes: usize) -> Message {
    Message::from(Bytes::from(vec![0; bytes]))
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("an answer in time")
}

pub(crate) async fn event(dealer: &mut Dealer) -> DealerEvent {
    within(dealer.recv()).await.expect("a live socket")
}

pub(crate) async fn next(receiver: &mut DealerReceiver) -> DealerEvent {
    within(receiver.recv()).await.expect("a live socket")
}

pub(crate) async fn received(dealer: &mut Dealer) -> Message {
    match event(dealer).await {
        DealerEvent::Message(message) => message,
        other @ (DealerEvent::Connected | DealerEvent::Disconnected) => {
            panic!("expected a message, got {other:?}")
        }
    }
}

pub(crate) async fn arrived(router: &mut Router) -> (Peer, Message) {
    match within(router.recv()).await.expect("a live socket") {
        RouterEvent::Message { peer, message } => (peer, message),
        RouterEvent::Gone { peer } => panic!("{peer} is gone"),
    }
}

pub(crate) async fn arrived_at(router: &mut RouterReceiver) -> (Peer, Message) {
    match within(router.recv()).await.expect("a live socket") {
        RouterEvent::Message { peer, message } => (peer, message),
        RouterEvent::Gone { peer } => panic!("{peer} is gone"),
    }
}

pub(crate) async fn gone(router: &mut Router) -> Peer {
    match within(router.recv()).await.expect("a live socket") {
        RouterEvent::Gone { peer } => peer,
        RouterEvent::Message { peer, .. } => panic!("{peer} sent a message"),
    }
}
