//! Messages arrive whole, in order and at the right peer.

use bytes::Bytes;
use luna_transport::{Dealer, DealerConfig, DealerEvent, Message, RouterEvent, RouterSendError};
use tempfile::tempdir;

use crate::support::{
    arrived, bind, connected, dealer, endpoint, gone, ipc, message, received, router, within,
};

#[tokio::test]
async fn a_message_goes_there_and_back_over_every_transport() {
    let directory = tempdir().unwrap();
    for endpoint in [
        endpoint("tcp://127.0.0.1:0"),
        endpoint("tcp://[::1]:0"),
        endpoint("tcp://localhost:0"),
        ipc(&directory.path().join("luna.sock")),
    ] {
        let mut router = bind(&endpoint);
        let mut dealer = connected(router.endpoint(), DealerConfig::default()).await;
        dealer.send(message(["LUNA/1", "request"])).unwrap();
        let (peer, request) = arrived(&mut router).await;
        assert_eq!(request, message(["LUNA/1", "request"]));
        router.send(&peer, message(["LUNA/1", "reply"])).unwrap();
        assert_eq!(received(&mut dealer).await, message(["LUNA/1", "reply"]));
    }
}

#[tokio::test]
async fn empty_and_edge_sized_frames_keep_their_places() {
    let mut router = router();
    let mut dealer = connected(router.endpoint(), DealerConfig::default()).await;
    let sizes = [0, 1, 255, 0, 256, 65_535, 65_536, 0];
    let frames = sizes.map(|size| Bytes::from(vec![7; size])).to_vec();
    for frames in [frames, vec![Bytes::new()], vec![Bytes::new(); 3]] {
        let sent = Message::new(frames).unwrap();
        dealer.send(sent.clone()).unwrap();
        let (peer, request) = arrived(&mut router).await;
        assert_eq!(request, sent);
        router.send(&peer, request).unwrap();
        assert_eq!(received(&mut dealer).await, sent);
    }
}

#[tokio::test]
async fn eight_megabytes_arrive_bit_exact() {
    let directory = tempdir().unwrap();
    for endpoint in [endpoint("tcp://127.0.0.1:0"), ipc(&directory.path().join("s"))] {
        let mut router = bind(&endpoint);
        let mut dealer = connected(router.endpoint(), DealerConfig::default()).await;
        // 251 is prime, so that no block of a power of two repeats.
        let pattern: Bytes = (0..=250_u8).cycle().take(8 * 1024 * 1024).collect();
        let sent = Message::from(pattern);
        dealer.send(sent.clone()).unwrap();
        let (peer, request) = arrived(&mut router).await;
        assert!(request == sent);
        router.send(&peer, request).unwrap();
        assert!(received(&mut dealer).await == sent);
    }
}

#[tokio::test]
async fn messages_of_one_peer_arrive_in_order() {
    let mut router = router();
    let dealer = connected(router.endpoint(), DealerConfig::default()).await;
    for number in 0..500_u32 {
        dealer.send(Message::from(Bytes::copy_from_slice(&number.to_le_bytes()))).unwrap();
    }
    for number in 0..500_u32 {
        let (_, message) = arrived(&mut router).await;
        assert_eq!(message.frames(), [Bytes::copy_from_slice(&number.to_le_bytes())]);
    }
}

#[tokio::test]
async fn each_dealer_gets_its_own_replies() {
    let mut router = router();
    let mut dealers = Vec::new();
    for _ in 0..2 {
        dealers.push(connected(router.endpoint(), DealerConfig::default()).await);
    }
    dealers[0].send(Message::from("a")).unwrap();
    dealers[1].send(Message::from("b")).unwrap();
    let mut peers = Vec::new();
    for _ in 0..2 {
        let (peer, message) = arrived(&mut router).await;
        router.send(&peer, message).unwrap();
        peers.push(peer);
    }
    assert_ne!(peers[0], peers[1]);
    assert_eq!(received(&mut dealers[0]).await, Message::from("a"));
    assert_eq!(received(&mut dealers[1]).await, Message::from("b"));
}

#[tokio::test]
async fn a_peer_that_leaves_is_announced_and_others_stay() {
    let mut router = router();
    let mut stays = connected(router.endpoint(), DealerConfig::default()).await;
    let leaves = connected(router.endpoint(), DealerConfig::default()).await;
    stays.send(Message::from("stays")).unwrap();
    let (staying, _) = arrived(&mut router).await;
    leaves.send(Message::from("leaves")).unwrap();
    let (leaving, _) = arrived(&mut router).await;

    leaves.close().await;
    assert_eq!(gone(&mut router).await, leaving);
    assert_eq!(
        router.send(&leaving, Message::from("too late")),
        Err(RouterSendError::UnknownPeer { peer: leaving })
    );
    router.send(&staying, Message::from("still here")).unwrap();
    assert_eq!(received(&mut stays).await, Message::from("still here"));
}

#[tokio::test]
async fn a_foreign_req_socket_is_served() {
    use zeromq::{ReqSocket, Socket, SocketRecv, SocketSend};
    let mut router = router();
    let mut requester = ReqSocket::new();
    requester.connect(&router.endpoint().to_string()).await.unwrap();
    requester.send("request".into()).await.unwrap();
    let (peer, request) = arrived(&mut router).await;
    assert_eq!(request, message(["", "request"]));
    router.send(&peer, message(["", "reply"])).unwrap();
    let reply = within(requester.recv()).await.unwrap();
    assert_eq!(reply.into_vec(), [Bytes::from_static(b"reply")]);
}

#[tokio::test]
async fn who_takes_the_name_of_another_inherits_nothing_of_it() {
    use zeromq::{Socket, SocketRecv, SocketSend};
    let mut router = router();
    let mut first = named("same", router.endpoint()).await;
    first.send("first".into()).await.unwrap();
    let (peer, _) = arrived(&mut router).await;

    let mut second = named("same", router.endpoint()).await;
    second.send("second".into()).await.unwrap();
    assert_eq!(gone(&mut router).await, peer, "before anything of the second arrives");
    let (same, message) = arrived(&mut router).await;
    assert_eq!((&same, message), (&peer, Message::from("second")));
    router.send(&same, Message::from("reply")).unwrap();
    let reply = within(second.recv()).await.unwrap();
    assert_eq!(reply.into_vec(), [Bytes::from_static(b"reply")]);
    first.close().await;
}

#[test]
fn sockets_work_from_plain_threads() {
    let mut router = router();
    let mut dealer = dealer(router.endpoint());
    assert_eq!(dealer.recv_blocking(), Some(DealerEvent::Connected));
    dealer.send(Message::from("request")).unwrap();
    let Some(RouterEvent::Message { peer, .. }) = router.recv_blocking() else { panic!() };
    let sender = router.sender();
    let replier = std::thread::spawn(move || sender.send(&peer, Message::from("reply")));
    replier.join().unwrap().unwrap();
    assert_eq!(dealer.recv_blocking(), Some(DealerEvent::Message(Message::from("reply"))));
}

#[tokio::test]
async fn what_was_accepted_before_the_close_is_delivered() {
    let mut router = router();
    let dealer = connected(router.endpoint(), DealerConfig::default()).await;
    for _ in 0..40 {
        dealer.send(crate::support::zeros(1024 * 1024)).unwrap();
    }
    let closing = tokio::spawn(Dealer::close(dealer));
    for _ in 0..40 {
        assert_eq!(arrived(&mut router).await.1.byte_len(), 1024 * 1024);
    }
    within(closing).await.unwrap();
}

#[tokio::test]
async fn three_hundred_short_connections_leave_the_router_serving() {
    let mut router = router();
    for _ in 0..300 {
        let mut dealer = connected(router.endpoint(), DealerConfig::default()).await;
        dealer.send(Message::from("echo")).unwrap();
        let (peer, message) = arrived(&mut router).await;
        router.send(&peer, message).unwrap();
        assert_eq!(received(&mut dealer).await, Message::from("echo"));
        dealer.close().await;
        assert_eq!(gone(&mut router).await, peer);
    }
}

/// A foreign DEALER that has set an identity.
async fn named(identity: &str, endpoint: &luna_transport::Endpoint) -> zeromq::DealerSocket {
    use zeromq::Socket;
    let mut options = zeromq::SocketOptions::default();
    options.peer_identity(identity.parse().unwrap());
    let mut dealer = zeromq::DealerSocket::with_options(options);
    dealer.connect(&endpoint.to_string()).await.unwrap();
    dealer
}
