//! What may be bound, and how a socket file comes and goes.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use luna_transport::{
    BindError, ConnectError, Dealer, DealerConfig, DealerEvent, Router, RouterConfig,
};
use tempfile::tempdir;

use crate::support::{bind, dealer, endpoint, event, ipc, router};

#[test]
fn a_network_address_is_refused_and_named() {
    for text in ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://10.0.0.1:0", "tcp://farm.example:1"] {
        let error = Router::bind(&endpoint(text), RouterConfig::default()).unwrap_err();
        assert!(matches!(error, BindError::BindRefused { .. }));
        let words = error.to_string();
        assert!(words.contains(text) && words.contains("keys"), "{words}");
    }
}

#[test]
fn port_zero_becomes_a_real_port() {
    let router = router();
    assert_ne!(router.endpoint().tcp_port(), Some(0));
    assert!(router.endpoint().to_string().starts_with("tcp://127.0.0.1:"));
}

#[test]
fn an_address_in_use_is_refused_and_stays_served() {
    let directory = tempdir().unwrap();
    for endpoint in [endpoint("tcp://127.0.0.1:0"), ipc(&directory.path().join("s"))] {
        let first = bind(&endpoint);
        let error = Router::bind(first.endpoint(), RouterConfig::default()).unwrap_err();
        assert!(matches!(error, BindError::AddrInUse { .. }), "{error:?}");
        let mut dealer = dealer(first.endpoint());
        assert_eq!(dealer.recv_blocking(), Some(DealerEvent::Connected));
    }
}

#[test]
fn a_socket_file_is_private_and_removed_at_the_end() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("luna.sock");
    let router = bind(&ipc(&path));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    drop(router);
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[tokio::test]
async fn the_socket_file_of_a_killed_process_is_replaced() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("luna.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());

    let router = bind(&ipc(&path));
    let mut dealer = dealer(router.endpoint());
    assert_eq!(event(&mut dealer).await, DealerEvent::Connected);
}

#[test]
fn a_file_that_is_no_socket_is_kept() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    std::fs::write(&path, "precious").unwrap();
    let error = Router::bind(&ipc(&path), RouterConfig::default()).unwrap_err();
    assert!(matches!(error, BindError::NotASocket { .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_missing_directory_is_named() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("absent/luna.sock");
    let error = Router::bind(&ipc(&path), RouterConfig::default()).unwrap_err();
    assert!(matches!(error, BindError::MissingDirectory { .. }));
    assert!(error.to_string().contains("absent` of"), "{error}");
}

#[test]
fn limits_out_of_range_are_named() {
    let mut config = RouterConfig::default();
    config.inbox.messages_max = 100_000;
    let error = Router::bind(&endpoint("tcp://127.0.0.1:0"), config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`inbox` of the ROUTER is out of range: write 1 to 50000 messages and at least 1 byte"
    );
    let error = Dealer::connect(&endpoint("tcp://127.0.0.1:0"), DealerConfig::default());
    assert!(matches!(error.unwrap_err(), ConnectError::PortZero { .. }));
}
