//! A DEALER comes back by itself, whatever its peer does.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use luna_transport::{Dealer, DealerConfig, DealerEvent, DealerSendErrorKind, Heartbeat, Message};
use tempfile::tempdir;

use crate::support::{
    arrived, bind, connected, dealer, endpoint, event, ipc, message, next, received, router, within,
};

#[tokio::test]
async fn a_dealer_reconnects_when_the_router_is_bound_again() {
    let directory = tempdir().unwrap();
    for endpoint in [endpoint("tcp://127.0.0.1:0"), ipc(&directory.path().join("s"))] {
        let first = bind(&endpoint);
        let endpoint = first.endpoint().clone();
        let mut dealer = connected(&endpoint, DealerConfig::default()).await;
        first.close().await;
        assert_eq!(event(&mut dealer).await, DealerEvent::Disconnected);
        let refused = dealer.send(message(["lost"])).unwrap_err();
        assert_eq!(refused.kind, DealerSendErrorKind::NotConnected);
        assert_eq!(refused.message, message(["lost"]));

        let mut second = bind(&endpoint);
        assert_eq!(event(&mut dealer).await, DealerEvent::Connected);
        dealer.send(message(["again"])).unwrap();
        let (peer, request) = arrived(&mut second).await;
        assert_eq!(request, message(["again"]));
        second.send(&peer, request).unwrap();
        assert_eq!(received(&mut dealer).await, message(["again"]));
    }
}

#[tokio::test]
async fn a_dealer_waits_for_a_router_that_is_not_there_yet() {
    let directory = tempdir().unwrap();
    let endpoint = ipc(&directory.path().join("late.sock"));
    let mut dealer = dealer(&endpoint);
    let refused = dealer.send(Message::from("early")).unwrap_err();
    assert_eq!(refused.kind, DealerSendErrorKind::NotConnected);
    while dealer.sender().last_failure().is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(dealer.sender().last_failure().unwrap().contains("No such file"));
    let _router = bind(&endpoint);
    assert_eq!(event(&mut dealer).await, DealerEvent::Connected);
    assert!(dealer.sender().is_connected());
}

#[tokio::test]
async fn a_listener_that_never_speaks_is_not_a_connection() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let connect_timeout = Duration::from_millis(50);
    let config = DealerConfig { connect_timeout, ..DealerConfig::default() };
    let mut dealer = Dealer::connect(&endpoint(&format!("tcp://{address}")), config).unwrap();
    let several_attempts = Duration::from_millis(300);
    assert!(tokio::time::timeout(several_attempts, dealer.recv()).await.is_err());
    assert!(dealer.sender().last_failure().unwrap().contains("timed out"));
}

#[tokio::test]
async fn a_connection_on_which_nothing_arrives_is_replaced() {
    let router = router();
    let liveness = Some(Duration::from_millis(100));
    let config = DealerConfig { liveness, ..DealerConfig::default() };
    let mut dealer = connected(router.endpoint(), config).await;
    let start = Instant::now();
    assert_eq!(event(&mut dealer).await, DealerEvent::Disconnected);
    assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
    assert_eq!(event(&mut dealer).await, DealerEvent::Connected);
    assert!(dealer.sender().last_failure().unwrap().contains("liveness"));
}

#[tokio::test]
async fn answered_heartbeats_keep_a_connection() {
    let mut router = router();
    let heartbeat =
        Heartbeat { message: Message::from("HEARTBEAT"), interval: Duration::from_millis(30) };
    let liveness = Some(Duration::from_millis(300));
    let config = DealerConfig { heartbeat: Some(heartbeat), liveness, ..DealerConfig::default() };
    let (_, mut receiver) = connected(router.endpoint(), config).await.split();
    for _ in 0..20 {
        let (peer, beat) = arrived(&mut router).await;
        assert_eq!(beat, Message::from("HEARTBEAT"));
        router.send(&peer, beat).unwrap();
        let answer = next(&mut receiver).await;
        assert_eq!(answer, DealerEvent::Message(Message::from("HEARTBEAT")));
    }
}

#[tokio::test]
async fn a_caller_that_does_not_read_is_no_silence_of_the_peer() {
    let mut router = router();
    let liveness = Some(Duration::from_millis(100));
    let mut config = DealerConfig { liveness, ..DealerConfig::default() };
    config.inbox.messages_max = 1;
    let mut dealer = connected(router.endpoint(), config).await;
    dealer.send(Message::from("request")).unwrap();
    let (peer, _) = arrived(&mut router).await;
    for _ in 0..3 {
        router.send(&peer, Message::from("reply")).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..3 {
        assert_eq!(received(&mut dealer).await, Message::from("reply"));
    }
}

#[tokio::test]
async fn a_stopped_dealer_ends_at_once_whatever_it_is_doing() {
    let directory = tempdir().unwrap();
    let router = router();
    let nobody = dealer(&ipc(&directory.path().join("nobody.sock")));
    let idle = connected(router.endpoint(), DealerConfig::default()).await;
    let sender = idle.sender();
    let start = Instant::now();
    within(nobody.close()).await;
    within(idle.close()).await;
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    let closed = sender.send(Message::from("late")).unwrap_err();
    assert_eq!(closed.kind, DealerSendErrorKind::Closed);
}
