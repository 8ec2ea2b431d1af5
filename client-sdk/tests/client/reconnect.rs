//! Farms that are not there, not there yet, or not there any more.

use std::time::{Duration, Instant};

use luna_client::{Client, EncodeRequest, ErrorKind};
use protocol::request::ClipEncode;

use crate::farm::{Farm, answer, run};

#[test]
fn a_farm_that_restarts_half_way_answers_what_was_open() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = format!("ipc://{}", directory.path().join("farm.sock").display());
    let first = Farm::start_at(&endpoint, |_| Vec::new());
    let client = Client::builder().endpoint(&endpoint).build().unwrap();
    let pending = client.start_encode(EncodeRequest::new("sd15").prompt("a fox")).unwrap();
    first.wait();
    let asked = first.seen_of::<ClipEncode>();
    drop(first);

    let second = Farm::start_at(&endpoint, answer);
    run(pending.outcome()).unwrap();
    let again = second.seen_of::<ClipEncode>();
    assert_eq!((asked.len(), again.len()), (1, 1));
    assert_eq!(again[0].id, asked[0].id);
    assert!(again[0].budget_ms <= asked[0].budget_ms);
}

#[test]
fn a_farm_that_starts_late_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = format!("ipc://{}", directory.path().join("farm.sock").display());
    let client = Client::builder().endpoint(&endpoint).build().unwrap();
    let pending = client.start_encode(EncodeRequest::new("sd15").prompt("a fox")).unwrap();
    let _farm = Farm::start_at(&endpoint, answer);
    run(pending.outcome()).unwrap();
}

#[test]
fn a_farm_that_was_never_there_is_unreachable_and_the_error_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = format!("ipc://{}", directory.path().join("none.sock").display());
    let builder =
        || Client::builder().endpoint(&endpoint).connect_timeout(Duration::from_millis(100));

    let started = Instant::now();
    let error = run(builder().build().unwrap().status()).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(error.is_retryable());
    let message = error.to_string();
    assert!(
        message.contains(&endpoint) && message.contains("start one with: luna up"),
        "{message}"
    );

    let error = run(builder().connect()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
}

#[test]
fn a_farm_that_left_is_waited_for_until_the_deadline() {
    let farm = Farm::start(answer);
    let client = Client::builder()
        .endpoint(farm.endpoint())
        .connect_timeout(Duration::from_millis(10))
        .timeout(Duration::from_millis(300));
    let client = run(client.connect()).unwrap();
    drop(farm);
    let error = run(client.encode(EncodeRequest::new("sd15").prompt("a fox"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

#[test]
fn connecting_waits_for_the_farm() {
    let farm = Farm::start(answer);
    let client = run(Client::connect(farm.endpoint())).unwrap();
    assert_eq!(client.endpoint(), farm.endpoint());
    run(client.clone().encode(EncodeRequest::new("sd15").prompt("a fox"))).unwrap();
}

#[test]
fn settings_that_cannot_be_used_are_refused() {
    for (builder, reason) in [
        (Client::builder().endpoint("nonsense"), "write `tcp://"),
        (Client::builder().endpoint("tcp://127.0.0.1:0"), "name the port"),
        (Client::builder().timeout(Duration::ZERO), "the time budget is 0ns"),
        (Client::builder().connect_timeout(Duration::ZERO), "connect timeout is zero"),
    ] {
        let error = builder.build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(reason), "{error}");
    }
}
