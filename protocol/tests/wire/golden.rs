//! The bytes of every kind of message, frozen: a change here breaks clients that exist.

use std::{collections::BTreeSet, fmt::Write};

use luna_protocol::{ErrorCode, reply, request, worker};

use crate::examples::{self, Example};

#[test]
fn every_kind_has_the_bytes_it_always_had() {
    for example in examples::all() {
        insta::assert_snapshot!(example.name, rendered(&example));
    }
}

#[test]
fn every_kind_has_an_example() {
    let shown: BTreeSet<_> = examples::all().into_iter().map(|example| example.kind).collect();
    let lists =
        [request::REQUEST_KINDS, reply::REPLY_KINDS, worker::WORKER_KINDS, worker::BROKER_KINDS];
    let known: BTreeSet<_> = lists.concat().into_iter().collect();
    assert_eq!(shown, known);
}

#[test]
fn no_error_code_was_renamed_or_changed_its_mind_about_retrying() {
    let table: Vec<_> = ErrorCode::ALL
        .iter()
        .map(|code| format!("{code} retryable={}", code.is_retryable()))
        .collect();
    insta::assert_snapshot!("error_codes", table.join("\n"));
}

/// What a person reads, then what travels, 32 bytes a line.
fn rendered(example: &Example) -> String {
    let value: serde_json::Value = rmp_serde::from_slice(&example.header).expect("MessagePack");
    let json = serde_json::to_string_pretty(&value).expect("JSON writes every value");
    let lines = example.header.chunks(32).map(hex);
    format!("{json}\n\n{}", lines.collect::<Vec<_>>().join("\n"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes every write");
        text
    })
}
