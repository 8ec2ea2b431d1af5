//! Peers that misbehave below the level of messages, and threads that must end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use luna_transport::{DealerConfig, DealerEvent, Message, Router, RouterSendError};

use crate::support::{arrived, connected, received, router};

#[tokio::test]
async fn malformed_handshakes_disturb_nobody() {
    let mut router = router();
    let mut healthy = connected(router.endpoint(), DealerConfig::default()).await;
    let port = router.endpoint().tcp_port().unwrap();
    let inputs: [&[u8]; 5] =
        [b"", b"GET / HTTP/1.1\r\n\r\n", &[0xFF], &[0; 200], &[0xFF, 0, 0, 0, 0, 0, 0, 0, 1, 0x7F]];
    for input in inputs {
        let mut raw = TcpStream::connect(("127.0.0.1", port)).unwrap();
        raw.write_all(input).unwrap();
        // It may have closed already.
        let _ = raw.shutdown(Shutdown::Write);
        raw.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // The ROUTER sends its greeting and closes, with or without a reset.
        let _ = raw.read_to_end(&mut Vec::new());
    }
    healthy.send(Message::from("echo")).unwrap();
    let (peer, message) = arrived(&mut router).await;
    router.send(&peer, message).unwrap();
    assert_eq!(received(&mut healthy).await, Message::from("echo"));
}

#[tokio::test]
async fn a_closed_router_joins_its_thread_and_answers_senders() {
    let mut router = router();
    let dealer = connected(router.endpoint(), DealerConfig::default()).await;
    dealer.send(Message::from("request")).unwrap();
    let (peer, _) = arrived(&mut router).await;
    let endpoint = router.endpoint().clone();
    let sender = router.sender();
    let start = Instant::now();
    router.close().await;
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert_eq!(sender.send(&peer, Message::from("late")), Err(RouterSendError::Closed));
    // The thread is gone and with it the listener: the port is free again.
    drop(Router::bind(&endpoint, luna_transport::RouterConfig::default()).unwrap());
}

#[test]
fn dropping_both_ends_leaves_no_thread() {
    let thread_count = || std::fs::read_dir("/proc/self/task").unwrap().filter(is_ours).count();
    let router = Router::bind(
        &"tcp://127.0.0.1:0".parse().unwrap(),
        luna_transport::RouterConfig { thread_name: "zmq-leak-test", ..Default::default() },
    )
    .unwrap();
    let config = DealerConfig { thread_name: "zmq-leak-test", ..DealerConfig::default() };
    let mut dealer = luna_transport::Dealer::connect(router.endpoint(), config).unwrap();
    assert_eq!(dealer.recv_blocking(), Some(DealerEvent::Connected));
    assert_eq!(thread_count(), 2);
    drop((dealer, router));
    // A joined thread stays listed until the kernel has reaped it.
    let deadline = Instant::now() + Duration::from_secs(5);
    while thread_count() > 0 {
        assert!(Instant::now() < deadline, "a thread is left");
    }
}

fn is_ours(task: &std::io::Result<std::fs::DirEntry>) -> bool {
    let name = task.as_ref().map(|task| std::fs::read_to_string(task.path().join("comm")));
    // Other tests' threads may end between the listing and the reading.
    name.ok().and_then(Result::ok).is_some_and(|name| name.trim() == "zmq-leak-test")
}
