//! The light head of a `clip_encode`: what routing needs to know, and nothing of the payload.
//!
//! The header frame itself is forwarded to the worker unread; the worker checks the rest of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, Failure, Header, ModelDigest, ModelName, RequestId, limits,
    request::ClipEncode,
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, SeqAccess, Visitor},
};

/// Attachments of one request. The `work` message that carries them has three frames of its own.
const ATTACHMENTS_MAX: usize = 64;
const _: () = assert!(ATTACHMENTS_MAX + 3 <= limits::FRAMES_MAX);

/// Bytes of one request, header and attachments. A connection takes messages of 64 MiB, and the
/// `work` message that carries the request must stay below that with its own header: a worker
/// would drop its connection, and so would the next one that is given the request.
const REQUEST_BYTES_MAX: usize = (64 << 20) - (4 << 10);

/// Bytes of text that fill one chunk, roughly: 75 tokens of four letters.
const CHUNK_TEXT_BYTES: usize = 300;

/// The fields of a `clip_encode` that the broker decides by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EncodeHead {
    pub(crate) id: RequestId,
    pub(crate) model: ModelName,
    #[serde(default)]
    pub(crate) model_digest: Option<ModelDigest>,
    prompts: Vec<PromptHead>,
    #[serde(default)]
    stack: Vec<EntryHead>,
    #[serde(default)]
    pub(crate) budget_ms: Option<u32>,
    #[serde(default)]
    pub(crate) no_cache: bool,
    #[serde(default)]
    requires: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PromptHead {
    #[serde(default)]
    text: Option<Length>,
    #[serde(default)]
    texts: Option<BTreeMap<String, Length>>,
    #[serde(default)]
    tokens: Option<BTreeMap<String, TokensHead>>,
    #[serde(default)]
    hook_stack: Vec<EntryHead>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct TokensHead {
    chunks: Count,
}

/// Bytes of a text that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Length(usize);

/// Elements of an array that are not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Count(usize);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct EntryHead {
    adapter: AdapterId,
}

impl Header for EncodeHead {
    const KIND: &'static str = ClipEncode::KIND;
}

impl EncodeHead {
    /// Reads the head and checks it against the limits of the wire.
    pub(crate) fn read(envelope: &Envelope) -> Result<Self, Failure> {
        let head: Self = envelope
            .read()
            .map_err(|error| Failure::new(ErrorCode::InvalidRequest, error.to_string()))?;
        head.check()?;
        check_attachments(&envelope.attachments)?;
        check_size(envelope)?;
        Ok(head)
    }

    /// Every adapter that the request needs, once.
    pub(crate) fn adapters(&self) -> BTreeSet<AdapterId> {
        let hooks = self.prompts.iter().flat_map(|prompt| &prompt.hook_stack);
        self.stack.iter().chain(hooks).map(|entry| entry.adapter).collect()
    }

    /// About how many chunks are to be encoded, over all prompts and components.
    pub(crate) fn chunks(&self) -> u32 {
        let chunks = self.prompts.iter().map(PromptHead::chunks).fold(0, usize::saturating_add);
        u32::try_from(chunks.max(1)).unwrap_or(u32::MAX)
    }

    fn check(&self) -> Result<(), Failure> {
        // No feature has been added since the first version, so nothing can be required yet.
        if let Some(feature) = self.requires.first() {
            return Err(Failure::new(
                ErrorCode::Unsupported,
                format!("the request requires `{feature:.80}`, which this farm does not know"),
            ));
        }
        if self.prompts.is_empty() {
            return Err(Failure::new(
                ErrorCode::InvalidRequest,
                "`prompts` is empty: give at least one",
            ));
        }
        at_most("prompts", self.prompts.len(), limits::PROMPTS_MAX)?;
        at_most("stack", self.stack.len(), limits::STACK_ENTRIES_MAX)?;
        for prompt in &self.prompts {
            at_most("hook_stack", prompt.hook_stack.len(), limits::STACK_ENTRIES_MAX)?;
        }
        match self.budget_ms {
            Some(budget_ms) if budget_ms > limits::BUDGET_MS_MAX => Err(Failure::new(
                ErrorCode::TooLarge,
                format!(
                    "`budget_ms` is {budget_ms}: at most {} is accepted",
                    limits::BUDGET_MS_MAX
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl PromptHead {
    fn chunks(&self) -> usize {
        let texts = self.text.iter().chain(self.texts.iter().flat_map(BTreeMap::values));
        let texts = texts.map(|length| 1 + length.0 / CHUNK_TEXT_BYTES);
        let tokens = self.tokens.iter().flat_map(BTreeMap::values).map(|tokens| tokens.chunks.0);
        texts.chain(tokens).fold(0, usize::saturating_add)
    }
}

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LengthVisitor;
        impl Visitor<'_> for LengthVisitor {
            type Value = Length;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Length, E> {
                Ok(Length(text.len()))
            }
        }
        deserializer.deserialize_str(LengthVisitor)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountVisitor;
        impl<'de> Visitor<'de> for CountVisitor {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Count, A::Error> {
                let mut count = 0;
                while access.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Count(count))
            }
        }
        deserializer.deserialize_seq(CountVisitor)
    }
}

/// Refuses attachments that are too many or too large.
fn check_attachments(attachments: &[Bytes]) -> Result<(), Failure> {
    at_most("attachments", attachments.len(), ATTACHMENTS_MAX)?;
    let large = attachments.iter().position(|bytes| bytes.len() > limits::ATTACHMENT_BYTES_MAX);
    match large {
        Some(index) => Err(Failure::new(
            ErrorCode::TooLarge,
            format!(
                "attachment {index} has {} bytes: at most {} are accepted",
                attachments[index].len(),
                limits::ATTACHMENT_BYTES_MAX
            ),
        )),
        None => Ok(()),
    }
}

/// Refuses what would be too large for a worker's connection.
fn check_size(envelope: &Envelope) -> Result<(), Failure> {
    let attached = envelope.attachments.iter().map(Bytes::len).sum::<usize>();
    let bytes = envelope.header.len() + attached;
    if bytes > REQUEST_BYTES_MAX {
        let message =
            format!("the request has {bytes} bytes: at most {REQUEST_BYTES_MAX} are accepted");
        return Err(Failure::new(ErrorCode::TooLarge, message));
    }
    Ok(())
}

fn at_most(name: &str, count: usize, max: usize) -> Result<(), Failure> {
    if count > max {
        let message = format!("`{name}` has {count} entries: at most {max} are accepted");
        return Err(Failure::new(ErrorCode::TooLarge, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use protocol::{
        Chunk, Component, frames,
        request::{Prompt, StackEntry, TokensRef},
    };

    use super::*;

    #[test]
    fn the_head_names_every_adapter_once() {
        let mut request = request();
        request.stack = vec![entry(b"a"), entry(b"b"), entry(b"a")];
        request.prompts[0].hook_stack = vec![entry(b"c"), entry(b"b")];

        let head = read(&request, vec![]).unwrap();
        let expected: BTreeSet<_> = [b"a", b"b", b"c"].map(|name| AdapterId::of(name)).into();
        assert_eq!(head.adapters(), expected);
        assert_eq!(head.model, request.model);
    }

    #[test]
    fn every_limit_has_its_answer() {
        let mut none = request();
        none.prompts.clear();
        let mut prompts = request();
        prompts.prompts = vec![Prompt::default(); limits::PROMPTS_MAX + 1];
        let mut stack = request();
        stack.stack = vec![entry(b"a"); limits::STACK_ENTRIES_MAX + 1];
        let mut hooks = request();
        hooks.prompts[0].hook_stack = stack.stack.clone();
        let mut budget = request();
        budget.budget_ms = Some(limits::BUDGET_MS_MAX + 1);
        let mut requires = request();
        requires.requires = vec!["time_travel".to_owned()];

        for (request, code, part) in [
            (none, ErrorCode::InvalidRequest, "`prompts` is empty"),
            (prompts, ErrorCode::TooLarge, "`prompts` has 33"),
            (stack, ErrorCode::TooLarge, "`stack` has 257"),
            (hooks, ErrorCode::TooLarge, "`hook_stack` has 257"),
            (budget, ErrorCode::TooLarge, "`budget_ms` is 600001"),
            (requires, ErrorCode::Unsupported, "`time_travel`"),
        ] {
            let failure = read(&request, vec![]).unwrap_err();
            assert_eq!(failure.code, code);
            assert!(failure.message.contains(part), "{failure}");
        }
    }

    #[test]
    fn chunks_are_counted_and_those_of_a_text_estimated() {
        let text = |bytes| Prompt { text: Some("x".repeat(bytes)), ..Prompt::default() };
        let chunks = |count| TokensRef { chunks: vec![Chunk::default(); count], vectors: None };
        let tokens = [(Component::ClipL, chunks(2)), (Component::ClipG, chunks(3))];
        let tokens = Prompt { tokens: Some(tokens.into()), ..Prompt::default() };
        for (prompts, chunks) in
            [(vec![text(10)], 1), (vec![text(10), text(700)], 4), (vec![tokens, text(0)], 6)]
        {
            let request = ClipEncode { prompts, ..request() };
            assert_eq!(read(&request, vec![]).unwrap().chunks(), chunks);
        }
    }

    #[test]
    fn attachments_are_limited_in_number_and_size() {
        let many = vec![Bytes::from_static(b"x"); ATTACHMENTS_MAX + 1];
        assert_eq!(read(&request(), many).unwrap_err().code, ErrorCode::TooLarge);
        let large = vec![Bytes::from(vec![0; limits::ATTACHMENT_BYTES_MAX + 1])];
        assert_eq!(read(&request(), large).unwrap_err().code, ErrorCode::TooLarge);
    }

    #[test]
    fn a_request_fits_into_one_message_to_a_worker() {
        let full = vec![Bytes::from(vec![0; limits::ATTACHMENT_BYTES_MAX]); 8];
        let failure = read(&request(), full).unwrap_err();
        assert_eq!(failure.code, ErrorCode::TooLarge);
        assert!(failure.message.contains("at most 67104768"), "{failure}");
        read(&request(), vec![Bytes::from(vec![0; limits::ATTACHMENT_BYTES_MAX]); 7]).unwrap();
    }

    fn request() -> ClipEncode {
        ClipEncode {
            id: "1".parse().unwrap(),
            model: "sd15".parse().unwrap(),
            model_digest: None,
            prompts: vec![Prompt { text: Some("a cat".to_owned()), ..Prompt::default() }],
            stack: vec![],
            options: protocol::request::EncodeOptions::default(),
            budget_ms: None,
            no_cache: false,
            requires: vec![],
        }
    }

    fn entry(name: &[u8]) -> StackEntry {
        StackEntry { adapter: AdapterId::of(name), strength_patch: 1.0, strength_model: 1.0 }
    }

    fn read(request: &ClipEncode, attachments: Vec<Bytes>) -> Result<EncodeHead, Failure> {
        let envelope = Envelope::open(frames::frames(request, attachments)).unwrap();
        EncodeHead::read(&envelope)
    }
}
