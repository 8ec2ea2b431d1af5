//! Messages and commands as the words that tests compare.

use bytes::Bytes;
use protocol::{ErrorReply, Header as _, frames, request::Heartbeat};

use crate::BlobOp;

pub(super) fn show_reply(frames: &[Bytes]) -> String {
    let delimiter = if frames::is_delimited(frames) { "(delimited) " } else { "" };
    let header = &frames[if frames::is_delimited(frames) { 2 } else { 1 }];
    if header.starts_with(b"reply to") {
        return format!("{delimiter}{}", String::from_utf8_lossy(header));
    }
    let peek = protocol::header::peek(header).unwrap();
    let id = peek.id.map_or_else(|| "?".to_owned(), |id| id.to_string());
    if peek.kind == ErrorReply::KIND {
        let error: ErrorReply = protocol::header::read(header).unwrap();
        return format!("{delimiter}error {id} {}", error.code);
    }
    if peek.kind == Heartbeat::KIND {
        return format!("{delimiter}heartbeat");
    }
    format!("{delimiter}{} {id}", peek.kind)
}

pub(super) fn show_op(op: &BlobOp) -> String {
    match op {
        BlobOp::Begin { size, .. } => format!("begin {size}"),
        BlobOp::Append { bytes, .. } => format!("append {}", bytes.len()),
        BlobOp::Commit { .. } => "commit".to_owned(),
        BlobOp::Abort { .. } => "abort".to_owned(),
        BlobOp::Keep { .. } => "keep".to_owned(),
        BlobOp::DropParts { parts } => format!("drop parts {}", parts.len()),
        BlobOp::Read { offset, length, .. } => format!("read {offset}+{length}"),
        BlobOp::Delete { blobs } => format!("delete {}", blobs.len()),
        BlobOp::Remember { registrations } => format!("remember {}", registrations.len()),
    }
}
