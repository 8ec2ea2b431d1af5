//! A slow reader fills its own queue, gets a typed answer at the bound, and delays nobody else.

use std::time::Duration;

use luna_transport::{
    Dealer, DealerConfig, DealerSendErrorKind, Message, QueueLimits, Router, RouterConfig,
    RouterSendError,
};

use crate::support::{arrived, arrived_at, connected, endpoint, gone, received, router, zeros};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

#[tokio::test]
async fn a_peer_that_does_not_read_fills_its_own_queue_only() {
    let mut router = router_with(RouterConfig {
        peer_queue: QueueLimits { messages_max: 100, bytes_max: 8 * MIB },
        ..RouterConfig::default()
    });
    let silent = connected(router.endpoint(), unread()).await;
    let mut healthy = connected(router.endpoint(), DealerConfig::default()).await;
    silent.send(Message::from("silent")).unwrap();
    let (slow_peer, _) = arrived(&mut router).await;
    healthy.send(Message::from("healthy")).unwrap();
    let (healthy_peer, _) = arrived(&mut router).await;

    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..10_000 {
        match router.send(&slow_peer, zeros(64 * KIB)) {
            Ok(()) => accepted += 1,
            Err(error) => {
                assert_eq!(error, RouterSendError::PeerFull { peer: slow_peer.clone() });
                refused += 1;
            }
        }
    }
    // What lies beyond the queue are the kernel's buffers and one write buffer on each side.
    assert!(accepted * 64 * KIB < 64 * MIB, "{accepted} accepted");
    assert_eq!(accepted + refused, 10_000);

    router.send(&healthy_peer, Message::from("at once")).unwrap();
    assert_eq!(received(&mut healthy).await, Message::from("at once"));
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_disconnected() {
    let mut router = router_with(RouterConfig {
        stall: Duration::from_millis(200),
        peer_queue: QueueLimits { messages_max: 100, bytes_max: 8 * MIB },
        linger: Duration::from_millis(100),
        ..RouterConfig::default()
    });
    let silent = connected(router.endpoint(), unread()).await;
    silent.send(Message::from("silent")).unwrap();
    let (peer, _) = arrived(&mut router).await;
    let mut bytes_sent = 0;
    while bytes_sent < 64 * MIB {
        if router.send(&peer, zeros(64 * KIB)).is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if router.send(&peer, zeros(64 * KIB)).is_err() {
                break;
            }
        }
        bytes_sent += 64 * KIB;
    }
    assert_eq!(gone(&mut router).await, peer);
}

#[tokio::test]
async fn a_router_that_is_not_read_pushes_back_on_its_peers() {
    let router = router_with(RouterConfig {
        inbox: QueueLimits { messages_max: 10, bytes_max: MIB },
        ..RouterConfig::default()
    });
    let config = DealerConfig {
        outbox: QueueLimits { messages_max: 100, bytes_max: 8 * MIB },
        ..DealerConfig::default()
    };
    let dealer = connected(router.endpoint(), config).await;
    let (accepted, kind) = fill(&dealer).await;
    assert_eq!(kind, DealerSendErrorKind::Full);

    let (_, mut receiver) = router.split();
    for _ in 0..accepted {
        assert_eq!(arrived_at(&mut receiver).await.1.byte_len(), 64 * KIB);
    }
    dealer.send(Message::from("room again")).unwrap();
    assert_eq!(arrived_at(&mut receiver).await.1, Message::from("room again"));
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_or_ends_the_connection() {
    let mut router = router_with(RouterConfig {
        message_bytes_max: 1_000,
        frames_max: 3,
        ..RouterConfig::default()
    });
    for too_large in [zeros(1_001), Message::new(vec![bytes::Bytes::new(); 4]).unwrap()] {
        let dealer = connected(router.endpoint(), DealerConfig::default()).await;
        dealer.send(zeros(1_000)).unwrap();
        let (peer, _) = arrived(&mut router).await;
        assert_eq!(
            router.send(&peer, zeros(1_001)),
            Err(RouterSendError::TooLarge { bytes: 1_001, max: 1_000 })
        );
        dealer.send(too_large).unwrap();
        assert_eq!(gone(&mut router).await, peer);
    }
}

#[tokio::test]
async fn a_dealer_refuses_what_exceeds_its_limit_and_gives_it_back() {
    let router = router();
    let config = DealerConfig { message_bytes_max: 10, ..DealerConfig::default() };
    let dealer = connected(router.endpoint(), config).await;
    let error = dealer.send(zeros(11)).unwrap_err();
    assert_eq!(error.kind, DealerSendErrorKind::TooLarge { bytes: 11, max: 10 });
    assert_eq!(error.message, zeros(11));
    assert_eq!(error.to_string(), "cannot send: the message of 11 bytes exceeds the limit of 10");
}

fn router_with(config: RouterConfig) -> Router {
    Router::bind(&endpoint("tcp://127.0.0.1:0"), config).unwrap()
}

/// A DEALER whose inbox is soon full.
fn unread() -> DealerConfig {
    DealerConfig {
        inbox: QueueLimits { messages_max: 2, bytes_max: MIB },
        linger: Duration::from_millis(100),
        ..DealerConfig::default()
    }
}

/// Sends until nothing more is taken for a while, and counts what was accepted.
async fn fill(dealer: &Dealer) -> (usize, DealerSendErrorKind) {
    let mut accepted = 0;
    let mut patience = 100;
    loop {
        match dealer.send(zeros(64 * KIB)) {
            Ok(()) => accepted += 1,
            Err(error) if patience == 0 => return (accepted, error.kind),
            Err(_) => {
                patience -= 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(accepted < 2_000, "unbounded");
    }
}
