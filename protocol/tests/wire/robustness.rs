//! Headers that nobody should send: each one is refused or read, none panics or allocates much.

use bytes::Bytes;
use luna_protocol::{
    Envelope, ErrorCode, ErrorReply, Header, InvalidFrames, InvalidHeader, Layer, frames::MAGIC,
    header, limits, reply, request, worker,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::examples;

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        read_as_every_kind(&bytes);
    }

    #[test]
    fn a_damaged_header_never_panics(
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        byte: u8,
        cut: bool,
    ) {
        let mut bytes = which.get(&examples::all()).header.clone();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        read_as_every_kind(&bytes);
    }

    #[test]
    fn arbitrary_frames_never_panic(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..8), 0..80),
    ) {
        let frames: Vec<_> = parts.into_iter().map(Bytes::from).collect();
        let _ = Envelope::open(frames.clone());
        let _ = Envelope::open([vec![Bytes::from_static(MAGIC)], frames].concat());
    }
}

#[test]
fn a_duplicated_field_is_refused() {
    let id = ("id", json!("r-1"));
    let twice = raw(&[("kind", json!("status")), id.clone(), id.clone()]);
    assert_malformed::<request::Status>(&twice, "duplicate field `id`");
    let twice = raw(&[("kind", json!("a")), ("kind", json!("b"))]);
    assert!(header::peek(&twice).is_err());

    let op = ("op", json!("commit"));
    let twice = raw(&[id.clone(), op.clone(), op.clone(), ("upload", json!("u-1"))]);
    assert_malformed::<request::UploadLora>(&twice, "duplicate field `op`");
    let upload = ("upload", json!("u-1"));
    let twice = raw(&[id, op, upload.clone(), upload]);
    assert_malformed::<request::UploadLora>(&twice, "duplicate field `upload`");
}

#[test]
fn a_component_that_is_named_twice_is_refused() {
    let tokens = packed(&json!({ "chunks": [] }));
    let both = map(&[("clip_l", tokens.clone()), ("clip_l", tokens)]);
    let mut prompt = vec![0x91];
    prompt.extend(map(&[("tokens", both)]));
    let bytes = map(&[
        ("id", packed(&json!("r-1"))),
        ("model", packed(&json!("sd15"))),
        ("prompts", prompt),
    ]);
    assert_malformed::<request::ClipEncode>(&bytes, "`clip_l` is given twice");
}

#[test]
fn bytes_after_the_map_are_refused() {
    let mut bytes = raw(&[("kind", json!("status")), ("id", json!("r-1"))]);
    bytes.extend([0xc0, 0xc0]);
    assert_eq!(header::read::<request::Status>(&bytes), Err(InvalidHeader::Trailing(2)));
    assert_eq!(header::peek(&bytes), Err(InvalidHeader::Trailing(2)));
}

#[test]
fn nesting_without_end_is_refused_without_a_stack_overflow() {
    let mut bytes = map(&[("kind", packed(&json!("upload_lora"))), ("id", packed(&json!("r")))]);
    bytes[0] = 0x83;
    bytes.extend(packed(&json!("x")));
    bytes.extend(std::iter::repeat_n(0x91, 500_000));
    bytes.push(0xc0);
    assert_malformed::<request::UploadLora>(&bytes, "depth");
    assert!(header::peek(&bytes).is_err());
}

#[test]
fn lengths_that_promise_more_than_the_frame_holds_are_refused() {
    let array_32 = vec![0xdd, 0xff, 0xff, 0xff, 0xff];
    let id = packed(&json!("r-1"));
    let bytes = map(&[("id", id.clone()), ("adapters", array_32)]);
    assert!(header::read::<request::HasLora>(&bytes).is_err());
    let string_32 = vec![0xdb, 0xff, 0xff, 0xff, 0xff, b'a'];
    assert!(header::read::<request::Status>(&map(&[("id", string_32)])).is_err());
    let map_32 = [0xdf, 0xff, 0xff, 0xff, 0xff];
    assert!(header::peek(&map_32).is_err());
}

#[test]
fn a_header_over_the_limit_is_not_even_read() {
    let bytes = vec![0x80; limits::HEADER_BYTES_MAX + 1];
    let error = header::peek(&bytes).unwrap_err();
    assert_eq!(error, InvalidHeader::TooLarge { bytes: limits::HEADER_BYTES_MAX + 1 });
    assert!(error.to_string().contains("at most 1048576"));
}

#[test]
fn a_missing_field_is_named() {
    assert_malformed::<request::Status>(&raw(&[("kind", json!("status"))]), "missing field `id`");
    let no_model = raw(&[("id", json!("r-1")), ("prompts", json!([]))]);
    assert_malformed::<request::ClipEncode>(&no_model, "missing field `model`");
    let no_op = raw(&[("id", json!("r-1"))]);
    assert_malformed::<request::UploadLora>(&no_op, "missing field `op`");
    let no_offset = raw(&[("id", json!("r-1")), ("op", json!("chunk")), ("upload", json!("u"))]);
    assert_malformed::<request::UploadLora>(&no_offset, "missing field `offset`");
}

#[test]
fn fields_of_a_newer_version_are_skipped() {
    let newer = [("future", json!({ "deep": [1, { "a": null }] })), ("id", json!("r-1"))];
    let expected = request::Status { id: "r-1".parse().unwrap() };
    assert_eq!(header::read::<request::Status>(&raw(&newer)).unwrap(), expected);

    let upload = [("op", json!("commit")), ("upload", json!("u-1"))];
    let read: request::UploadLora = header::read(&raw(&[&newer[..], &upload].concat())).unwrap();
    assert_eq!(read.op, request::UploadOp::Commit { upload: "u-1".parse().unwrap() });
}

#[test]
fn an_unknown_kind_can_still_be_answered_by_its_id() {
    let bytes = raw(&[("id", json!("r-9")), ("kind", json!("warm")), ("model", json!("sd15"))]);
    let peek = header::peek(&bytes).unwrap();
    assert_eq!((peek.kind.as_str(), peek.id), ("warm", Some("r-9".parse().unwrap())));
}

#[test]
fn an_error_code_of_a_newer_version_reads_as_internal() {
    let bytes = raw(&[
        ("code", json!("quarantined")),
        ("retryable", json!(false)),
        ("message", json!("it killed three workers")),
    ]);
    let reply: ErrorReply = header::read(&bytes).unwrap();
    assert_eq!((reply.code, reply.id), (ErrorCode::Internal, None));
}

#[test]
fn an_array_is_not_a_header() {
    let bytes = packed(&json!(["status", "r-1"]));
    assert_malformed::<request::Status>(&bytes, "not a map");
    assert!(header::peek(&bytes).is_err());
    assert!(header::peek(&[]).is_err());
}

#[test]
fn numbers_may_come_as_integers() {
    let entry = json!({ "adapter": "ab".repeat(32), "strength_patch": 1 });
    let entry: request::StackEntry = rmp_serde::from_slice(&packed(&entry)).unwrap();
    assert_eq!((entry.strength_patch, entry.strength_model), (1.0, 1.0));
}

#[test]
fn a_layer_is_last_or_an_index() {
    let read = |layer: Value| {
        let options = json!({ "layers": { "clip_l": { "layer": layer } } });
        rmp_serde::from_slice::<request::EncodeOptions>(&packed(&options))
            .map(|options| options.layers.into_values().next().unwrap().layer)
            .map_err(|error| error.to_string())
    };
    assert_eq!(read(json!("last")).unwrap(), Layer::Last);
    assert_eq!(read(json!(-2)).unwrap(), Layer::Hidden(-2));
    assert_eq!(read(json!(11)).unwrap(), Layer::Hidden(11));
    assert!(read(json!("first")).unwrap_err().contains("layer `first`: expected `last`"));
    assert!(read(json!(1u64 << 40)).is_err());
    assert!(read(json!(1.5)).is_err());
    assert!(read(json!(null)).is_err());
}

#[test]
fn frames_out_of_order_are_refused() {
    let frame = |bytes: &'static [u8]| Bytes::from_static(bytes);
    let open = |frames: Vec<Bytes>| Envelope::open(frames).unwrap_err();
    assert!(matches!(open(vec![]), InvalidFrames::Shape(_)));
    assert!(matches!(open(vec![frame(b"")]), InvalidFrames::Shape(_)));
    assert!(matches!(open(vec![frame(b""), frame(b""), frame(MAGIC)]), InvalidFrames::Shape(_)));
    assert!(matches!(open(vec![frame(b"LUNA/2"), frame(b"\x80")]), InvalidFrames::Shape(_)));
    assert!(matches!(open(vec![frame(MAGIC)]), InvalidFrames::Shape(_)));
    assert!(matches!(open(vec![frame(MAGIC), frame(b"\x80")]), InvalidFrames::Header(_)));
    let many = vec![frame(MAGIC); limits::FRAMES_MAX + 1];
    assert_eq!(open(many), InvalidFrames::TooMany(limits::FRAMES_MAX + 1));
}

macro_rules! read_as {
    ($bytes:expr, $($header:ty),+ $(,)?) => { $(let _ = header::read::<$header>($bytes);)+ };
}

fn read_as_every_kind(bytes: &[u8]) {
    let _ = header::peek(bytes);
    read_as!(bytes, request::ClipEncode, request::HasLora, request::UploadLora);
    read_as!(bytes, request::ListLoras, request::EvictLora, request::ListModels);
    read_as!(bytes, request::Status, request::Cancel, request::Heartbeat);
    read_as!(bytes, reply::ClipEncodeReply, reply::HasLoraReply, reply::UploadLoraReply);
    read_as!(bytes, reply::ListLorasReply, reply::EvictLoraReply, reply::ListModelsReply);
    read_as!(bytes, reply::StatusReply, reply::CancelReply, ErrorReply);
    read_as!(bytes, worker::Ready, worker::Alive, worker::Done, worker::Fetch);
    read_as!(bytes, worker::Disconnect, worker::Work, worker::CancelWork, worker::Blob);
    read_as!(bytes, worker::NoBlob, worker::Evict, worker::Announce);
}

fn assert_malformed<H: Header + std::fmt::Debug>(bytes: &[u8], reason: &str) {
    let error = header::read::<H>(bytes).expect_err("the header was accepted");
    let InvalidHeader::Malformed(text) = &error else { panic!("{error}") };
    assert!(text.contains(reason), "{text}");
}

/// A map with these fields in this order, duplicates and all.
fn raw(fields: &[(&str, Value)]) -> Vec<u8> {
    map(&fields.iter().map(|(name, value)| (*name, packed(value))).collect::<Vec<_>>())
}

fn map(fields: &[(&str, Vec<u8>)]) -> Vec<u8> {
    assert!(fields.len() < 16, "a fixmap holds at most 15 fields");
    let mut bytes = vec![0x80 | u8::try_from(fields.len()).expect("fewer than 16")];
    for (name, value) in fields {
        bytes.extend(packed(&json!(name)));
        bytes.extend(value);
    }
    bytes
}

fn packed(value: &Value) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("JSON fits MessagePack")
}
