//! Time budgets that cannot be kept, and clients that are gone before their answer.

use std::time::{Duration, Instant};

use luna_client::{EncodeRequest, ErrorCode, ErrorKind};
use luna_e2e::WireClient;
use protocol::{
    Envelope, ErrorReply, Header, UploadId,
    reply::{CancelReply, ClipEncodeReply, UploadLoraReply},
    request::{Cancel, ClipEncode, UploadFormat, UploadLora, UploadOp},
};

use crate::support::{Farm, MODEL, assert_error, base_message, slow_message};

/// Longest time for the farm to notice that a client has gone.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_budget_of_one_millisecond_ends_in_deadline_exceeded() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    for (budget_ms, words) in [(1, ["time budget", "ran out"]), (0, ["0 ms", "arriving"])] {
        let message = ClipEncode { budget_ms: Some(budget_ms), ..slow_message(wire.next_id()) };
        let code = ErrorCode::DeadlineExceeded;
        farm.assert_refuses_on_wire(&mut wire, &message, code, &words).await;
    }

    let many =
        (0..32).fold(EncodeRequest::new(MODEL), |request, _| request.prompt("cat ".repeat(4 * 75)));
    let error = farm.client.encode(many.timeout(Duration::from_millis(1))).await;
    let error = error.expect_err("a millisecond is not enough");
    assert_eq!(error.code(), Some(ErrorCode::DeadlineExceeded), "{error}");
    assert!(error.is_retryable());
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_budget_that_is_no_time_is_refused() {
    let mut farm = Farm::start().await;
    for timeout in [Duration::ZERO, Duration::from_secs(601)] {
        let request = EncodeRequest::new(MODEL).prompt("a cat").timeout(timeout);
        let error = farm.client.encode(request).await.expect_err("the SDK refuses it");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let mut wire = farm.wire().await;
    let message = ClipEncode { budget_ms: Some(600_001), ..base_message(wire.next_id()) };
    let words = ["`budget_ms` is 600001", "600000"];
    farm.assert_refuses_on_wire(&mut wire, &message, ErrorCode::TooLarge, &words).await;
}

#[tokio::test]
async fn a_request_of_an_id_that_is_open_is_answered_once() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let before = accepted(&farm).await;
    let message = slow_message(wire.next_id());
    for _ in 0..3 {
        wire.send(&message, Vec::new());
    }
    assert_eq!(wire.next().await.peek.id.as_ref(), Some(&message.id));
    // A second answer would come before this one.
    let cancel = Cancel { id: wire.next_id(), request: message.id.clone() };
    let (reply, _) = wire.ask::<_, CancelReply>(&cancel, Vec::new()).await.expect("it is answered");
    assert!(!reply.cancelled, "it is answered already");
    assert_eq!(accepted(&farm).await, before + 1);
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_cancel_of_an_open_request_ends_it_and_one_of_an_unknown_request_says_so() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let unknown = Cancel { id: wire.next_id(), request: "never-sent".parse().expect("a name") };
    let (reply, _) =
        wire.ask::<_, CancelReply>(&unknown, Vec::new()).await.expect("it is answered");
    assert!(!reply.cancelled);

    let open = slow_message(wire.next_id());
    wire.send(&open, Vec::new());
    let cancel = Cancel { id: wire.next_id(), request: open.id.clone() };
    wire.send(&cancel, Vec::new());
    let error = next_of(&mut wire, ErrorReply::KIND).await;
    let error: ErrorReply = error.read().expect("an error can be read");
    assert_eq!(error.id, Some(open.id));
    assert_error(&error, ErrorCode::Cancelled, &["cancel"]);
    farm.assert_serves().await;

    // What another connection asked cannot be cancelled.
    let (mut other, foreign) = (farm.wire().await, slow_message(wire.next_id()));
    wire.send(&foreign, Vec::new());
    let cancel = Cancel { id: other.next_id(), request: foreign.id.clone() };
    let (reply, _) =
        other.ask::<_, CancelReply>(&cancel, Vec::new()).await.expect("it is answered");
    assert!(!reply.cancelled);
    assert_eq!(next_of(&mut wire, ClipEncodeReply::KIND).await.peek.id, Some(foreign.id));
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_client_that_leaves_half_way_leaves_nothing_behind() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    for _ in 0..8 {
        let message = slow_message(wire.next_id());
        wire.send(&message, Vec::new());
    }
    let upload = half_an_upload(&mut wire).await;
    wire.close().await;

    let started = Instant::now();
    loop {
        let status = farm.client.status().await.expect("the broker answers");
        if status.queued == 0 && status.in_flight == 0 {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "requests of nobody are still there: {status:?}");
    }
    farm.assert_serves().await;

    let mut other = farm.wire().await;
    let commit = UploadOp::Commit { upload: upload.clone() };
    let error = other.upload_step(commit, Vec::new()).await.expect_err("it went with its client");
    assert_error(&error, ErrorCode::InvalidRequest, &[upload.as_str(), "not open"]);
    farm.assert_serves().await;
}

/// Sends half of a file. Replies to encodes may come in between.
async fn half_an_upload(wire: &mut WireClient) -> UploadId {
    let begin =
        UploadOp::Begin { size: 1000, format: UploadFormat::Lora, digest: None, label: None };
    let step = UploadLora { id: wire.next_id(), op: begin };
    wire.send(&step, Vec::new());
    let reply = next_of(wire, UploadLoraReply::KIND).await;
    let reply: UploadLoraReply = reply.read().expect("a reply can be read");
    let upload = reply.upload.expect("the upload is open");
    let op = UploadOp::Chunk { upload: upload.clone(), offset: 0 };
    let step = UploadLora { id: wire.next_id(), op };
    wire.send(&step, vec![vec![0; 500].into()]);
    next_of(wire, UploadLoraReply::KIND).await;
    upload
}

/// The next message of this kind; others are skipped.
async fn next_of(wire: &mut WireClient, kind: &str) -> Envelope {
    loop {
        let envelope = wire.next().await;
        if envelope.peek.kind == kind {
            return envelope;
        }
    }
}

async fn accepted(farm: &Farm) -> u64 {
    farm.client.status().await.expect("the broker answers").counters.accepted
}
