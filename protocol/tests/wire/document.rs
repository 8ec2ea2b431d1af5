//! The page for people who write clients elsewhere: it must name whatever is on the wire.

use std::collections::BTreeSet;

use luna_protocol::{ErrorCode, limits, reply, request, worker};
use serde_json::Value;

use crate::examples;

const DOCUMENT: &str = include_str!("../../../docs/wire-protocol.md");

#[test]
fn every_kind_is_documented() {
    for kind in [request::REQUEST_KINDS, reply::REPLY_KINDS].concat() {
        let heading = format!("\n### `{kind}`\n");
        assert!(DOCUMENT.contains(&heading), "`{kind}` has no section");
    }
    for kind in [worker::WORKER_KINDS, worker::BROKER_KINDS].concat() {
        assert!(DOCUMENT.contains(&format!("\n| `{kind}` |")), "`{kind}` has no row");
    }
}

#[test]
fn every_field_is_documented() {
    let mut fields = BTreeSet::new();
    for example in examples::all() {
        collect(&rmp_serde::from_slice(&example.header).unwrap(), &mut fields);
    }
    let missing: Vec<_> =
        fields.iter().filter(|field| !DOCUMENT.contains(&format!("`{field}`"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_error_code_is_documented_with_its_advice_on_retrying() {
    for code in ErrorCode::ALL {
        let retryable = if code.is_retryable() { "yes" } else { "no" };
        let row = format!("\n| `{code}` | {retryable} |");
        assert!(DOCUMENT.contains(&row), "`{code}` has no row with `{retryable}`");
    }
}

#[test]
fn every_limit_is_documented_with_its_value() {
    let rows: [(&str, u64); 19] = [
        ("bytes of a header", limits::HEADER_BYTES_MAX as u64),
        ("nesting of a header", limits::HEADER_DEPTH_MAX as u64),
        ("frames of a message", limits::FRAMES_MAX as u64),
        ("bytes of one attachment of a client", limits::ATTACHMENT_BYTES_MAX as u64),
        ("bytes of an upload chunk", limits::UPLOAD_CHUNK_BYTES_MAX as u64),
        ("bytes of an uploaded file", limits::UPLOAD_BYTES_MAX),
        ("bytes of an uploaded file of format `model`", limits::MODEL_BYTES_MAX),
        ("bytes of a path of a model's file", limits::PATH_BYTES_MAX as u64),
        ("bytes of a label", limits::LABEL_BYTES_MAX as u64),
        ("adapters named in one `warm`", limits::WARM_ADAPTERS_MAX as u64),
        ("bytes of a reason", limits::REASON_BYTES_MAX as u64),
        ("prompts of a request", limits::PROMPTS_MAX as u64),
        ("bytes of a prompt's text", limits::PROMPT_BYTES_MAX as u64),
        ("chunks of one prompt for one component", limits::CHUNKS_MAX as u64),
        ("chunks of a request", limits::REQUEST_CHUNKS_MAX as u64),
        (
            "bytes of a request's vectors, shared ones counted for every prompt",
            limits::REQUEST_VECTORS_BYTES_MAX,
        ),
        ("entries of a stack", limits::STACK_ENTRIES_MAX as u64),
        ("adapters named in one request", limits::ADAPTERS_MAX as u64),
        ("`budget_ms`", u64::from(limits::BUDGET_MS_MAX)),
    ];
    for (name, value) in rows {
        assert!(DOCUMENT.contains(&format!("\n| {name} | {value}")), "{name}: {value}");
    }
    assert!(DOCUMENT.contains(&format!("\n| absolute strength | {}", limits::STRENGTH_MAX)));
    assert!(DOCUMENT.contains(&format!("| {} | time for the answer", limits::BUDGET_MS_DEFAULT)));
}

/// The names of all fields, however deep.
fn collect(value: &Value, fields: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                fields.insert(name.clone());
                collect(value, fields);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, fields)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
