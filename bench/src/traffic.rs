//! What is sent: requests and replies of given sizes, as bytes with a place for the request's id.
//!
//! Headers are written once and stamped for every request, so that the load spends its time on
//! sockets. Every request differs from every other in its text, and asks not to be answered from a
//! cache, so that the broker's caches and its coalescing find nothing.

use anyhow::ensure;
use bytes::Bytes;
use protocol::{frames, header};
use serde_json::{Value, json};

/// The model that the workers pretend to serve.
pub(crate) const MODEL: &str = "m";

/// Where a header has the request's id.
const PLACEHOLDER: &str = "########";

/// Requests of one size, and replies of one size.
#[derive(Debug, Clone)]
pub(crate) struct Traffic {
    request: Template,
    reply: Template,
    attachments: Vec<Bytes>,
}

/// A header with places for the eight hexadecimal digits of a request's id.
#[derive(Debug, Clone)]
struct Template {
    bytes: Vec<u8>,
    places: Vec<usize>,
}

impl Traffic {
    /// Requests whose header frame has `request_bytes`, or the fewest that a header can have, and
    /// replies whose attachments have `reply_bytes`.
    pub(crate) fn new(request_bytes: usize, reply_bytes: usize) -> anyhow::Result<Self> {
        ensure!(request_bytes <= protocol::limits::PROMPT_BYTES_MAX, "requests are too large");
        ensure!(
            reply_bytes <= protocol::limits::ATTACHMENT_BYTES_MAX,
            "replies of {reply_bytes} bytes are larger than any prompt's"
        );
        let request = padded_request(request_bytes);
        Ok(Self {
            request,
            reply: Template::new(&reply_header(reply_bytes)),
            attachments: vec![Bytes::from(vec![0x2A; reply_bytes])],
        })
    }

    /// Bytes of a request's header frame.
    pub(crate) fn request_bytes(&self) -> usize {
        self.request.bytes.len()
    }

    /// The frames of request `serial`.
    pub(crate) fn request(&self, serial: u32) -> Vec<Bytes> {
        frames::frames_of(self.request.stamp(&format!("{serial:08x}")), Vec::new())
    }

    /// The reply's header and attachments for a request's header; nothing when that has no id of
    /// ours.
    pub(crate) fn reply(&self, request: &[u8]) -> Option<(Bytes, Vec<Bytes>)> {
        let id = header::peek(request).ok()?.id?;
        let is_ours = id.as_str().len() == PLACEHOLDER.len();
        is_ours.then(|| (self.reply.stamp(id.as_str()), self.attachments.clone()))
    }
}

/// The number of the request that a reply's id names.
pub(crate) fn serial_of(id: &protocol::RequestId) -> Option<u32> {
    u32::from_str_radix(id.as_str(), 16).ok()
}

impl Template {
    fn new(header: &Value) -> Self {
        let bytes = rmp_serde::to_vec_named(header).expect("JSON can be written as MessagePack");
        let width = PLACEHOLDER.len();
        let is_place = |place: &usize| bytes[*place..].starts_with(PLACEHOLDER.as_bytes());
        let places = (0..bytes.len().saturating_sub(width)).filter(is_place).collect();
        Self { bytes, places }
    }

    /// The header with `id`, which has as many bytes as the placeholder.
    fn stamp(&self, id: &str) -> Bytes {
        let mut bytes = self.bytes.clone();
        for &place in &self.places {
            bytes[place..place + PLACEHOLDER.len()].copy_from_slice(id.as_bytes());
        }
        bytes.into()
    }
}

/// A request whose header is filled up with text.
fn padded_request(bytes: usize) -> Template {
    let of = |padding: usize| {
        Template::new(&json!({
            "kind": "clip_encode",
            "id": PLACEHOLDER,
            "model": MODEL,
            // The text begins with the id, so no two requests are alike.
            "prompts": [{ "text": format!("{PLACEHOLDER}.{}", "a".repeat(padding)) }],
            "no_cache": true,
        }))
    };
    let mut padding = bytes.saturating_sub(of(0).bytes.len());
    // A longer text has a longer length in front of it.
    while padding > 0 && of(padding).bytes.len() > bytes {
        padding -= 1;
    }
    of(padding)
}

/// A reply as a worker gives it, whose tensors are not looked at by anybody.
fn reply_header(bytes: usize) -> Value {
    let tensor = json!({ "dtype": "float32", "shape": [1, bytes / 4], "attachment": 0 });
    json!({
        "kind": "clip_encode_reply",
        "id": PLACEHOLDER,
        "results": [{ "cond": tensor, "pooled": tensor }],
        "receipt": {
            "model": MODEL,
            "model_digest": digest(),
            "weights_dtype": "float16",
            "stack": [],
            "mode": "functional",
            "fidelity": "comfyui",
            "worker": "bench",
            "attempts": 1,
            "times": { "queue_ms": 0.0, "load_ms": 0.0, "compute_ms": 0.0 },
        },
    })
}

/// The digest of the model that is not there.
pub(crate) fn digest() -> String {
    "cc".repeat(32)
}

#[cfg(test)]
mod tests {
    use protocol::{Envelope, reply::ClipEncodeReply, request::ClipEncode};

    use super::*;

    #[test]
    fn a_request_has_its_size_and_no_two_are_alike() {
        for bytes in [100, 256, 300, 4_000] {
            let traffic = Traffic::new(bytes, 64).unwrap();
            assert!(traffic.request_bytes().abs_diff(bytes) <= 2, "{bytes}");
        }
        let traffic = Traffic::new(1, 64).unwrap();
        assert!(traffic.request_bytes() < 80, "{}", traffic.request_bytes());

        let read = |serial| -> ClipEncode {
            Envelope::open(traffic.request(serial)).unwrap().read().unwrap()
        };
        let (first, second) = (read(1), read(0xFFFF_FFFF));
        assert_eq!((first.id.as_str(), second.id.as_str()), ("00000001", "ffffffff"));
        assert_ne!(first.prompts, second.prompts);
    }

    #[test]
    fn a_reply_answers_the_request_that_it_was_made_for() {
        let traffic = Traffic::new(256, 1_000).unwrap();
        let request = Envelope::open(traffic.request(77)).unwrap();
        let (header, attachments) = traffic.reply(&request.header).unwrap();

        assert_eq!(attachments[0].len(), 1_000);
        let reply = Envelope::open(frames::frames_of(header, attachments)).unwrap();
        let reply: ClipEncodeReply = reply.read().unwrap();
        assert_eq!(serial_of(&reply.id), Some(77));
        assert!(traffic.reply(b"nonsense").is_none());
    }
}
