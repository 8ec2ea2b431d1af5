//! A `clip_encode` as the executor takes it: decoded, within limits, and free of contradictions.
//!
//! What depends on the model (vocabulary, widths, layers) is checked where the model is.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use bytes::Bytes;
use protocol::{
    AdapterId, Component, ComponentTokens, Dtype, ErrorCode, Failure, RequestId, VectorTable,
    header, limits,
    request::{ClipEncode, EncodeOptions, Prompt, StackEntry, TokensRef},
    tensor,
};

use crate::execution::check_supported;

/// What ComfyUI's `CLIPSetLastLayer` takes. Other layers are asked for by `layers`.
const CLIP_SKIPS: RangeInclusive<i32> = -24..=-1;

/// A valid request and the prompts it brought.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) model: protocol::ModelName,
    pub(crate) model_digest: Option<protocol::ModelDigest>,
    pub(crate) prompts: Vec<RequestPrompt>,
    pub(crate) stack: Vec<StackEntry>,
    pub(crate) options: EncodeOptions,
}

/// One prompt with what applies to it alone.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RequestPrompt {
    pub(crate) input: PromptInput,
    pub(crate) hook_stack: Vec<StackEntry>,
}

/// What is to be encoded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PromptInput {
    Text(String),
    /// Another text for every component.
    Texts(BTreeMap<Component, String>),
    Tokens(BTreeMap<Component, ComponentTokens>),
}

impl Request {
    /// Decodes the client's header frame and attachments.
    pub(crate) fn decode(header: &[u8], attachments: &[Bytes]) -> Result<Self, Failure> {
        let request: ClipEncode =
            header::read(header).map_err(|error| invalid(error.to_string()))?;
        check_features(&request)?;
        check_stack("the stack", &request.stack)?;
        let count = request.prompts.len();
        if count == 0 {
            return Err(invalid("`prompts` is empty: send at least one prompt"));
        }
        if count > limits::PROMPTS_MAX {
            let most = limits::PROMPTS_MAX;
            return Err(too_large(format!(
                "the request has {count} prompts: at most {most} are accepted"
            )));
        }
        check_vector_bytes(&request.prompts)?;
        let prompts = request
            .prompts
            .into_iter()
            .enumerate()
            .map(|(index, prompt)| decode_prompt(index, prompt, attachments))
            .collect::<Result<Vec<_>, _>>()?;
        check_chunk_count(&prompts)?;
        let ClipEncode { id, model, model_digest, stack, options, .. } = request;
        Ok(Self { id, model, model_digest, prompts, stack, options })
    }

    /// The adapters that the request needs.
    pub(crate) fn adapters(&self) -> BTreeSet<AdapterId> {
        let hooks = self.prompts.iter().flat_map(|prompt| &prompt.hook_stack);
        self.stack.iter().chain(hooks).map(|entry| entry.adapter).collect()
    }
}

/// Refuses what this version cannot honour, instead of leaving it out.
fn check_features(request: &ClipEncode) -> Result<(), Failure> {
    if let Some(feature) = request.requires.first() {
        return Err(unsupported(format!(
            "this farm does not know the required feature `{feature}`"
        )));
    }
    if let Some(skip) = request.options.clip_skip.filter(|skip| !CLIP_SKIPS.contains(skip)) {
        let (first, last) = (CLIP_SKIPS.end(), CLIP_SKIPS.start());
        return Err(invalid(format!("`clip_skip` is {skip}: expected {first} to {last}")));
    }
    check_supported(&request.options).map_err(|error| unsupported(error.to_string()))
}

fn check_stack(name: &str, stack: &[StackEntry]) -> Result<(), Failure> {
    if stack.len() > limits::STACK_ENTRIES_MAX {
        let (found, most) = (stack.len(), limits::STACK_ENTRIES_MAX);
        return Err(too_large(format!("{name} has {found} entries: at most {most} are accepted")));
    }
    for entry in stack {
        for (field, strength) in
            [("strength_patch", entry.strength_patch), ("strength_model", entry.strength_model)]
        {
            if !strength.is_finite() || strength.abs() > limits::STRENGTH_MAX {
                let most = limits::STRENGTH_MAX;
                return Err(invalid(format!(
                    "`{field}` of adapter {} is {strength}: expected a number from -{most} to {most}",
                    entry.adapter
                )));
            }
        }
    }
    Ok(())
}

/// Bounds what [`decode_prompt`] copies: every table may be the same attachment.
fn check_vector_bytes(prompts: &[Prompt]) -> Result<(), Failure> {
    let tables = prompts
        .iter()
        .flat_map(|prompt| prompt.tokens.iter().flat_map(BTreeMap::values))
        .filter_map(|tokens| tokens.vectors.as_ref()?.byte_count());
    let (total, most) = (tables.fold(0, u64::saturating_add), limits::REQUEST_VECTORS_BYTES_MAX);
    if total > most {
        return Err(too_large(format!(
            "the request has {total} bytes of vectors: at most {most} are accepted"
        )));
    }
    Ok(())
}

fn decode_prompt(
    index: usize,
    prompt: Prompt,
    attachments: &[Bytes],
) -> Result<RequestPrompt, Failure> {
    check_stack(&format!("the hook stack of prompt {index}"), &prompt.hook_stack)?;
    let hook_stack = prompt.hook_stack;
    let input = match (prompt.text, prompt.texts, prompt.tokens) {
        (Some(text), None, None) => PromptInput::Text(check_text(index, text)?),
        (None, Some(texts), None) => {
            let check = |(component, text)| check_text(index, text).map(|text| (component, text));
            PromptInput::Texts(texts.into_iter().map(check).collect::<Result<_, _>>()?)
        }
        (None, None, Some(tokens)) => {
            let decode = |(component, tokens)| {
                decode_tokens(index, component, tokens, attachments)
                    .map(|tokens| (component, tokens))
            };
            PromptInput::Tokens(tokens.into_iter().map(decode).collect::<Result<_, _>>()?)
        }
        _ => {
            return Err(invalid(format!(
                "prompt {index} must have exactly one of `text`, `texts` and `tokens`"
            )));
        }
    };
    Ok(RequestPrompt { input, hook_stack })
}

fn check_text(index: usize, text: String) -> Result<String, Failure> {
    let (found, most) = (text.len(), limits::PROMPT_BYTES_MAX);
    if found > most {
        return Err(too_large(format!(
            "prompt {index} has {found} bytes: at most {most} are accepted"
        )));
    }
    Ok(text)
}

fn decode_tokens(
    index: usize,
    component: Component,
    tokens: TokensRef,
    attachments: &[Bytes],
) -> Result<ComponentTokens, Failure> {
    let count = tokens.chunks.len();
    if count == 0 {
        return Err(invalid(format!(
            "prompt {index} has no chunks for `{component}`: send at least one"
        )));
    }
    let vectors = match &tokens.vectors {
        None => VectorTable::default(),
        Some(reference) => {
            let at = |reason: String| {
                invalid(format!("vectors of prompt {index} for `{component}`: {reason}"))
            };
            let [_rows, width] = reference.shape[..] else {
                return Err(at(format!("shape {:?} is not `[rows, width]`", reference.shape)));
            };
            if reference.dtype != Dtype::Float32 {
                return Err(at(format!("dtype `{}` is not `float32`", reference.dtype)));
            }
            let bytes = reference.bytes(attachments).map_err(|error| at(error.to_string()))?;
            VectorTable { width: width as usize, elements: tensor::f32_from_bytes(bytes) }
        }
    };
    Ok(ComponentTokens { chunks: tokens.chunks, vectors })
}

fn check_chunk_count(prompts: &[RequestPrompt]) -> Result<(), Failure> {
    let mut total = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        let PromptInput::Tokens(tokens) = &prompt.input else { continue };
        for (component, tokens) in tokens {
            let (count, most) = (tokens.chunks.len(), limits::CHUNKS_MAX);
            if count > most {
                return Err(too_large(format!(
                    "prompt {index} has {count} chunks for `{component}`: at most {most} are accepted"
                )));
            }
            total += count;
        }
    }
    if total > limits::REQUEST_CHUNKS_MAX {
        let most = limits::REQUEST_CHUNKS_MAX;
        return Err(too_large(format!(
            "the request has {total} chunks: at most {most} are accepted"
        )));
    }
    Ok(())
}

pub(crate) fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::InvalidRequest, message)
}

pub(crate) fn too_large(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::TooLarge, message)
}

pub(crate) fn unsupported(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use protocol::{Chunk, ExecutionMode, Fidelity, TensorRef, request::LayerChoice};

    use super::*;

    #[test]
    fn a_plain_request_is_taken_as_it_is() {
        let request = decode(&request("a cat"), &[]).unwrap();
        assert_eq!(request.prompts[0].input, PromptInput::Text("a cat".to_owned()));
        assert!(request.adapters().is_empty());
    }

    #[test]
    fn strengths_must_be_finite_and_the_error_names_them() {
        for strength in [f64::NAN, f64::INFINITY, 1e9] {
            let entry = StackEntry {
                adapter: AdapterId::of(b"x"),
                strength_patch: strength,
                strength_model: 1.0,
            };
            let failure =
                decode(&ClipEncode { stack: vec![entry], ..request("a") }, &[]).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidRequest);
            assert!(failure.message.contains("`strength_patch`"), "{failure}");
        }
    }

    #[test]
    fn a_clip_skip_is_one_that_comfyui_has() {
        let skipping = |skip| {
            let mut request = request("a");
            request.options.clip_skip = Some(skip);
            decode(&request, &[]).map_err(|failure| failure.to_string())
        };
        assert!(skipping(-1).is_ok() && skipping(-24).is_ok());
        for skip in [0, 1, -25, i32::MIN] {
            let error = skipping(skip).unwrap_err();
            assert_eq!(
                error,
                format!("invalid_request: `clip_skip` is {skip}: expected -1 to -24")
            );
        }
    }

    #[test]
    fn what_this_version_cannot_honour_is_refused_and_never_left_out() {
        let mut feature = request("a");
        feature.requires = vec!["time_travel".to_owned()];
        let mut mode = request("a");
        mode.options.mode = Some(ExecutionMode::Batched);
        let mut fidelity = request("a");
        fidelity.options.fidelity = Some(Fidelity::Fast);
        let refused = [(feature, "time_travel"), (mode, "batched"), (fidelity, "fast")];
        for (request, word) in refused {
            let failure = decode(&request, &[]).unwrap_err();
            assert_eq!(failure.code, ErrorCode::Unsupported);
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn a_hook_stack_is_checked_like_the_stack_and_its_adapters_are_needed() {
        let entry = |name: &[u8], strength_patch| StackEntry {
            adapter: AdapterId::of(name),
            strength_patch,
            strength_model: 1.0,
        };
        let mut hooked = ClipEncode { stack: vec![entry(b"x", 1.0)], ..request("a") };
        hooked.prompts[0].hook_stack = vec![entry(b"y", 0.5)];
        let decoded = decode(&hooked, &[]).unwrap();
        assert_eq!(decoded.adapters(), [b"x", b"y"].map(|name| AdapterId::of(name)).into());
        assert_eq!(decoded.prompts[0].hook_stack, hooked.prompts[0].hook_stack);

        hooked.prompts[0].hook_stack[0].strength_patch = f64::NAN;
        assert_eq!(decode(&hooked, &[]).unwrap_err().code, ErrorCode::InvalidRequest);
        hooked.prompts[0].hook_stack = vec![entry(b"y", 1.0); limits::STACK_ENTRIES_MAX + 1];
        let failure = decode(&hooked, &[]).unwrap_err();
        assert_eq!(failure.code, ErrorCode::TooLarge);
        assert!(failure.message.contains("hook stack of prompt 0"), "{failure}");
    }

    #[test]
    fn texts_of_components_are_taken_and_have_the_limit_of_texts() {
        let mut request = request("a");
        let texts = [(Component::ClipL, "a cat"), (Component::ClipG, "a dog")];
        let texts: BTreeMap<_, _> = texts.map(|(c, text)| (c, text.to_owned())).into();
        request.prompts[0] = Prompt { texts: Some(texts.clone()), ..Prompt::default() };
        let decoded = decode(&request, &[]).unwrap();
        assert_eq!(decoded.prompts[0].input, PromptInput::Texts(texts.clone()));

        request.prompts[0].text = Some("a".to_owned());
        assert_eq!(decode(&request, &[]).unwrap_err().code, ErrorCode::InvalidRequest);
        let long = "a".repeat(limits::PROMPT_BYTES_MAX + 1);
        let texts = Some(BTreeMap::from([(Component::ClipL, long)]));
        request.prompts[0] = Prompt { texts, ..Prompt::default() };
        assert_eq!(decode(&request, &[]).unwrap_err().code, ErrorCode::TooLarge);
    }

    #[test]
    fn no_prompt_no_chunk_and_both_kinds_of_input_are_invalid() {
        let mut none = request("a");
        none.prompts.clear();
        let mut both = request("a");
        both.prompts[0].tokens = Some(BTreeMap::new());
        let mut neither = request("a");
        neither.prompts[0].text = None;
        let empty = BTreeMap::from([(Component::ClipL, TokensRef::default())]);
        for request in [none, both, neither, tokens(empty)] {
            assert_eq!(decode(&request, &[]).unwrap_err().code, ErrorCode::InvalidRequest);
        }
    }

    #[test]
    fn too_many_chunks_are_too_large() {
        let chunks = vec![Chunk::default(); limits::CHUNKS_MAX + 1];
        let many = BTreeMap::from([(Component::ClipL, TokensRef { chunks, vectors: None })]);
        assert_eq!(decode(&tokens(many), &[]).unwrap_err().code, ErrorCode::TooLarge);
    }

    #[test]
    fn vectors_come_from_their_attachment_and_must_fit_it() {
        let table = |rows| TokensRef {
            chunks: vec![Chunk::default()],
            vectors: Some(TensorRef { dtype: Dtype::Float32, shape: vec![rows, 2], attachment: 0 }),
        };
        let attachments = [tensor::f32_to_bytes(&[1.0, 2.0, 3.0, 4.0])];
        let good = tokens(BTreeMap::from([(Component::ClipL, table(2))]));
        let PromptInput::Tokens(decoded) = &decode(&good, &attachments).unwrap().prompts[0].input
        else {
            panic!("tokens were sent");
        };
        assert_eq!(decoded[&Component::ClipL].vectors.row(1), Some(&[3.0, 4.0][..]));

        let bad = tokens(BTreeMap::from([(Component::ClipL, table(3))]));
        let failure = decode(&bad, &attachments).unwrap_err();
        assert!(failure.message.contains("needs 24"), "{failure}");
    }

    #[test]
    fn one_attachment_cannot_become_more_vectors_than_a_request_may_have() {
        let rows = 1 << 20;
        let table = TokensRef {
            chunks: vec![Chunk::default()],
            vectors: Some(TensorRef { dtype: Dtype::Float32, shape: vec![rows, 2], attachment: 0 }),
        };
        let attachments = [Bytes::from(vec![0; 8 << 20])];
        let prompt = Prompt {
            tokens: Some(BTreeMap::from([(Component::ClipL, table)])),
            ..Prompt::default()
        };
        let request =
            |prompts| ClipEncode { prompts: vec![prompt.clone(); prompts], ..request("a") };
        assert!(decode(&request(8), &attachments).is_ok());
        let failure = decode(&request(9), &attachments).unwrap_err();
        assert_eq!(failure.code, ErrorCode::TooLarge);
        assert!(failure.message.contains("of vectors"), "{failure}");
    }

    #[test]
    fn resolved_layers_survive_the_wire() {
        let mut layered = request("a");
        let choice = LayerChoice { layer: protocol::Layer::Hidden(-2), final_norm: true };
        layered.options.layers.insert(Component::ClipL, choice);
        assert_eq!(decode(&layered, &[]).unwrap().options.layers[&Component::ClipL], choice);
    }

    fn decode(request: &ClipEncode, attachments: &[Bytes]) -> Result<Request, Failure> {
        Request::decode(&header::write(request), attachments)
    }

    fn tokens(tokens: BTreeMap<Component, TokensRef>) -> ClipEncode {
        let mut request = request("a");
        request.prompts = vec![Prompt { tokens: Some(tokens), ..Prompt::default() }];
        request
    }

    fn request(text: &str) -> ClipEncode {
        ClipEncode {
            id: "r1".parse().unwrap(),
            model: "tiny".parse().unwrap(),
            model_digest: None,
            prompts: vec![Prompt { text: Some(text.to_owned()), ..Prompt::default() }],
            stack: Vec::new(),
            options: EncodeOptions::default(),
            budget_ms: None,
            no_cache: false,
            requires: Vec::new(),
        }
    }
}
