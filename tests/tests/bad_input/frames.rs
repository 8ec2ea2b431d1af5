//! Bytes that are no message of this protocol, or none that this version knows.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    time::Duration,
};

use bytes::Bytes;
use luna_client::ErrorCode;
use protocol::{
    Component, Dtype, ErrorReply, Header, RequestId, TensorRef,
    frames::MAGIC,
    header,
    reply::StatusReply,
    request::{ClipEncode, Prompt, Status, TokensRef},
};
use serde::{Deserialize, Serialize};

use crate::support::{Farm, assert_error, base_message, chunk};

#[tokio::test]
async fn a_header_that_cannot_be_read_is_answered_without_an_id() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let id = wire.next_id();
    let good = header::write(&Status { id });
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("nothing", vec![], "not a map"),
        ("a byte that MessagePack never uses", vec![0xc1], "not a map"),
        ("text", b"{\"kind\":\"status\"}".to_vec(), "not a map"),
        ("an array", vec![0x92, 0xa6, b's', b't', b'a', b't', b'u', b's', 0xc0], "not a map"),
        ("half a map", good[..good.len() - 3].to_vec(), "cannot be read"),
        (
            "a map that announces four thousand million entries",
            vec![0xdf, 255, 255, 255, 255],
            "cannot be read",
        ),
        ("bytes after the map", [&good[..], b"more"].concat(), "4 bytes after"),
        ("no kind", map(&[("id", &text("r1"))]), "`kind`"),
        ("a number for a kind", map(&[("kind", &[7]), ("id", &text("r1"))]), "cannot be read"),
        ("an id with a space", map(&[("kind", &text("status")), ("id", &text("r 1"))]), "`r 1`"),
        ("nesting without end", map(&[("kind", &text("status")), ("x", &[0x91; 5000])]), "depth"),
    ];
    for (what, header, word) in cases {
        wire.send_header(header);
        let error = wire.next_error().await;
        assert_eq!(error.id, None, "{what}");
        assert_error(&error, ErrorCode::InvalidRequest, &[word]);
        let status = Status { id: wire.next_id() };
        wire.ask::<_, StatusReply>(&status, Vec::new()).await.expect(what);
    }
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_request_with_fields_missing_or_of_another_type_is_answered_with_its_id() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let kind = ("kind", &*text("clip_encode"));
    let id = ("id", &*text("r1"));
    let model = ("model", &*text("tiny"));
    for (header, word) in [
        (map(&[kind, id, ("prompts", &[0x90])]), "`model`"),
        (map(&[kind, id, model]), "`prompts`"),
        (map(&[kind, id, model, ("prompts", &[7])]), "sequence"),
        (map(&[kind, id, model, ("prompts", &[0xdd, 255, 255, 255, 255])]), "cannot be read"),
        (map(&[kind, id, model, ("prompts", &[0x91, 0x80]), ("stack", &[0xc3])]), "sequence"),
        (map(&[("kind", &text("upload_lora")), id, ("op", &text("explode"))]), "`explode`"),
    ] {
        wire.send_header(header);
        let error = wire.next_error().await;
        if let Some(found) = &error.id {
            assert_eq!(found.as_str(), "r1");
        }
        assert_error(&error, ErrorCode::InvalidRequest, &[word]);
        farm.assert_serves().await;
    }
}

#[tokio::test]
async fn frames_without_the_magic_are_answered_without_an_id() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let id = wire.next_id();
    let header = Bytes::from(header::write(&Status { id }));
    let (empty, magic) = (Bytes::new(), Bytes::from_static(MAGIC));
    for (frames, word) in [
        (vec![header.clone()], "first frame is another"),
        (vec![Bytes::from_static(b"LUNA/2"), header.clone()], "first frame is another"),
        (vec![Bytes::from_static(b"luna/1"), header.clone()], "first frame is another"),
        (vec![empty.clone(), header.clone()], "first frame is another"),
        (vec![empty.clone()], "there is none"),
        (vec![magic.clone()], "the header is missing"),
        (vec![empty.clone(), empty.clone(), magic, header], "first frame is another"),
    ] {
        let is_delimited = frames[0].is_empty();
        wire.send_frames(frames);
        let envelope = wire.next().await;
        assert_eq!(envelope.delimited, is_delimited, "the reply mirrors the frame of a REQ socket");
        let error: ErrorReply = envelope.read().expect("an error can be read");
        assert_eq!(error.id, None);
        assert_error(&error, ErrorCode::InvalidRequest, &["`LUNA/1`", word]);
    }
    farm.assert_serves().await;
}

#[tokio::test]
async fn an_unknown_kind_is_named_and_so_is_one_of_another_direction() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let teleport = Teleport { id: wire.next_id() };
    wire.send(&teleport, Vec::new());
    let error = wire.next_error().await;
    assert_eq!(error.id, Some(teleport.id));
    assert_error(&error, ErrorCode::Unsupported, &["`teleport`", "`clip_encode`"]);

    for kind in ["status_reply", "ready", "work", "done"] {
        wire.send_header(map(&[("kind", &text(kind)), ("id", &text("r1"))]));
        let error = wire.next_error().await;
        assert_error(&error, ErrorCode::Unsupported, &[&format!("`{kind}`")]);
        wire.send_header(map(&[("kind", &text(kind))]));
        assert_eq!(wire.next_error().await.code, ErrorCode::Unsupported);
    }

    wire.send_header(map(&[("kind", &text("status"))]));
    let error = wire.next_error().await;
    assert_error(&error, ErrorCode::InvalidRequest, &["`status`", "no `id`"]);
    farm.assert_serves().await;
}

#[tokio::test]
async fn a_tensor_that_its_attachment_does_not_hold_is_refused() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    for (shape, attachment, words) in [
        (vec![1, 32], 1, ["attachment 1", "has 1"]),
        (vec![2, 32], 0, ["128 bytes", "needs 256"]),
        (vec![u32::MAX, u32::MAX], 0, ["[4294967295, 4294967295]", "out of range"]),
        (vec![32], 0, ["[32]", "`[rows, width]`"]),
    ] {
        let message = with_vectors(wire.next_id(), shape, attachment);
        wire.send(&message, vec![vec![0; 128].into()]);
        let error = wire.next_error().await;
        assert_eq!(error.id, Some(message.id));
        assert_error(&error, ErrorCode::InvalidRequest, &words);
        farm.assert_serves().await;
    }
}

#[tokio::test]
async fn bytes_that_are_not_zeromq_cost_their_sender_the_connection() {
    let mut farm = Farm::start().await;
    let path =
        farm.cluster.endpoint().strip_prefix("ipc://").expect("the farm is on ipc").to_owned();
    for bytes in [&b"GET /metrics HTTP/1.1\r\nHost: farm\r\n\r\n"[..], &[0xff; 4096], &[0; 64]] {
        let mut stream = UnixStream::connect(&path).expect("the broker listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout can be set");
        // The broker may have closed before everything is written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut greeting = Vec::new();
        let _ = stream.read_to_end(&mut greeting);
        farm.assert_serves().await;
    }
    // A greeting that never ends keeps nobody waiting.
    let mut idle = UnixStream::connect(&path).expect("the broker listens");
    idle.write_all(&[0xff, 0]).expect("the broker listens");
    farm.assert_serves().await;
}

/// A request from the future.
#[derive(Debug, Serialize, Deserialize)]
struct Teleport {
    id: RequestId,
}

impl Header for Teleport {
    const KIND: &'static str = "teleport";
}

fn with_vectors(id: RequestId, shape: Vec<u32>, attachment: u16) -> ClipEncode {
    let vectors = Some(TensorRef { dtype: Dtype::Float32, shape, attachment });
    let tokens = TokensRef { chunks: vec![chunk()], vectors };
    let tokens = Some([(Component::ClipL, tokens)].into());
    ClipEncode { prompts: vec![Prompt { tokens, ..Prompt::default() }], ..base_message(id) }
}

/// A MessagePack map of at most 15 fields whose values are MessagePack already.
fn map(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let count = u8::try_from(fields.len()).expect("few fields");
    let mut map = vec![0x80 | count];
    for (name, value) in fields {
        map.extend(text(name));
        map.extend_from_slice(value);
    }
    map
}

/// A MessagePack text of at most 31 bytes.
fn text(text: &str) -> Vec<u8> {
    let count = u8::try_from(text.len()).expect("a short text");
    [&[0xa0 | count], text.as_bytes()].concat()
}
