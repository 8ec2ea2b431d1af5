//! More than the wire takes: typed answers at every limit, and a closed connection far beyond.

use bytes::Bytes;
use luna_client::{AdapterId, EncodeRequest, ErrorCode, StackEntry, VectorTable};
use protocol::request::{ClipEncode, HasLora, Prompt, Status};

use crate::support::{Farm, MODEL, assert_error, base_message, base_request, chunk, tokens};

#[tokio::test]
async fn a_prompt_of_ten_thousand_words_is_too_large() {
    let mut farm = Farm::start().await;
    let words = EncodeRequest::new(MODEL).prompt("cat ".repeat(10_000));
    farm.assert_refuses(words, ErrorCode::TooLarge, &["chunks", "32"]).await;
    let bytes = EncodeRequest::new(MODEL).prompt("x".repeat(65_537));
    farm.assert_refuses(bytes, ErrorCode::TooLarge, &["65537", "65536"]).await;
}

#[tokio::test]
async fn more_prompts_chunks_or_stack_entries_than_fit_are_too_large() {
    let mut farm = Farm::start().await;
    let too_large = ErrorCode::TooLarge;
    let prompts = (0..33).fold(EncodeRequest::new(MODEL), |request, _| request.prompt("a cat"));
    farm.assert_refuses(prompts, too_large, &["`prompts` has 33", "32"]).await;

    let chunks = tokens(vec![chunk(); 33], VectorTable::default());
    farm.assert_refuses(chunks, too_large, &["33 chunks", "`clip_l`", "32"]).await;

    let long = "cat ".repeat(30 * 75);
    let total = (0..5).fold(EncodeRequest::new(MODEL), |request, _| request.prompt(&*long));
    farm.assert_refuses(total, too_large, &["150 chunks", "128"]).await;

    let adapter = farm.good_lora().await;
    let entry = StackEntry { adapter, strength_patch: 0.0, strength_model: 1.0 };
    let stack = (0..257).fold(base_request(), |request, _| request.stack_entry(entry));
    farm.assert_refuses(stack, too_large, &["`stack` has 257", "256"]).await;
}

#[tokio::test]
async fn a_message_over_a_limit_is_answered_too_large() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;

    let text = Some("x".repeat(1 << 20));
    let prompts = vec![Prompt { text, ..Prompt::default() }];
    let header = ClipEncode { prompts, ..base_message(wire.next_id()) };
    wire.send(&header, Vec::new());
    let error = wire.next_error().await;
    assert_eq!(error.id, None, "a header that is too large is not read");
    assert_error(&error, ErrorCode::TooLarge, &["header has 1048", "1048576"]);
    farm.assert_serves().await;

    let large = Bytes::from(vec![0; (8 << 20) + 1]);
    let small = Bytes::from_static(b"0123");
    for (attachments, words) in [
        (vec![small.clone(), large], ["attachment 1 has 8388609 bytes", "8388608"]),
        (vec![small.clone(); 65], ["`attachments` has 65", "64"]),
    ] {
        let message = base_message(wire.next_id());
        wire.send(&message, attachments);
        assert_error(&wire.next_error().await, ErrorCode::TooLarge, &words);
        farm.assert_serves().await;
    }

    let status = Status { id: wire.next_id() };
    wire.send(&status, vec![small; 71]);
    assert_error(&wire.next_error().await, ErrorCode::TooLarge, &["73 frames", "72"]);

    let adapters = vec![AdapterId::of(b"x"); 4097];
    let many = HasLora { id: wire.next_id(), adapters };
    wire.send(&many, Vec::new());
    let words = ["`adapters` has 4097", "4096"];
    assert_error(&wire.next_error().await, ErrorCode::TooLarge, &words);
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_message_far_over_the_limit_costs_its_sender_the_connection_and_nobody_else_anything() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let huge = vec![Bytes::from(vec![0; (64 << 20) + 1])];
    let many = vec![Bytes::from_static(b"x"); 300];
    for attachments in [huge, many] {
        let message = base_message(wire.next_id());
        wire.send(&message, attachments);
        wire.disconnected().await;
        farm.assert_serves().await;
        wire.connected().await;
    }
    let id = wire.next_id();
    wire.send(&base_message(id.clone()), Vec::new());
    assert_eq!(wire.next().await.peek.id, Some(id), "it may come back");
}
