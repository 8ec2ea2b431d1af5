//! Encode requests and what comes back.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use protocol::{
    AdapterId, Chunk, Component, ComponentTokens, Dtype, ExecutionMode, Fidelity, ModelDigest,
    ModelName, Receipt, RequestId, TensorRef, VectorTable,
    request::{ClipEncode, EncodeOptions, LayerChoice, Matching, Prompt, StackEntry, TokensRef},
    tensor,
};

use crate::{
    builder::check_timeout,
    call::Call,
    error::Error,
    verify::{self, Expected},
};

/// Prompts, the stack of LoRAs to encode them with, and how.
///
/// Every setting has ComfyUI's default. Limits are the farm's to check.
#[derive(Debug, Clone)]
pub struct EncodeRequest {
    model: String,
    model_digest: Option<ModelDigest>,
    prompts: Vec<PromptSource>,
    stack: Vec<StackEntry>,
    options: EncodeOptions,
    timeout: Option<Duration>,
    no_cache: bool,
    /// Whether a hook was named before any prompt: there is nothing that it could apply to.
    has_stray_hook: bool,
}

/// One prompt, and the adapters that apply to it alone, on top of the request's stack.
#[derive(Debug, Clone)]
struct PromptSource {
    source: Source,
    hook_stack: Vec<StackEntry>,
}

#[derive(Debug, Clone)]
enum Source {
    Text(String),
    Texts(BTreeMap<Component, String>),
    Tokens(BTreeMap<Component, ComponentTokens>),
}

/// The farm's answer to an [`EncodeRequest`], checked against it.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoding {
    /// One for every prompt, in order.
    pub conditionings: Vec<Conditioning>,
    /// What was really done.
    pub receipt: Receipt,
}

/// One prompt's conditioning.
#[derive(Debug, Clone, PartialEq)]
pub struct Conditioning {
    /// `[1, positions of all chunks, width]`; the components' features side by side, L first.
    pub cond: Tensor,
    /// `[1, width]`.
    pub pooled: Tensor,
    /// The tokens that were encoded, if [`EncodeRequest::return_tokens`] asked for them.
    pub tokens: Option<BTreeMap<Component, Vec<Chunk>>>,
}

/// A dense tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Sizes of the dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements in row-major order, as many as the shape says.
    pub data: Vec<f32>,
}

/// An encode under way. Dropping it cancels the request.
#[derive(Debug)]
pub struct PendingEncode {
    call: Call,
    expected: Expected,
}

impl EncodeRequest {
    /// A request to the model of this name, with nothing to encode yet.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            model_digest: None,
            prompts: Vec::new(),
            stack: Vec::new(),
            options: EncodeOptions::default(),
            timeout: None,
            no_cache: false,
            has_stray_hook: false,
        }
    }

    /// Adds a prompt in ComfyUI's syntax, which the worker tokenises.
    #[must_use]
    pub fn prompt(mut self, text: impl Into<String>) -> Self {
        self.prompts.push(PromptSource::new(Source::Text(text.into())));
        self
    }

    /// Adds a prompt with a text of its own for every component of the model, as ComfyUI's
    /// `CLIPTextEncodeSDXL` does.
    #[must_use]
    pub fn texts(mut self, texts: impl IntoIterator<Item = (Component, String)>) -> Self {
        let texts = texts.into_iter().collect();
        self.prompts.push(PromptSource::new(Source::Texts(texts)));
        self
    }

    /// Adds a prompt of tokens, for every component of the model.
    #[must_use]
    pub fn tokens(mut self, tokens: BTreeMap<Component, ComponentTokens>) -> Self {
        self.prompts.push(PromptSource::new(Source::Tokens(tokens)));
        self
    }

    /// Applies an adapter to the prompt that was added last, and to it alone, on top of the merged
    /// and rounded stack, as ComfyUI's hooks do. Before the first prompt it is a mistake, which
    /// encoding answers with [`ErrorKind::Invalid`](crate::ErrorKind::Invalid).
    #[must_use]
    pub fn hook(mut self, entry: StackEntry) -> Self {
        match self.prompts.last_mut() {
            Some(prompt) => prompt.hook_stack.push(entry),
            None => self.has_stray_hook = true,
        }
        self
    }

    /// Applies an adapter after those that were named before.
    #[must_use]
    pub fn lora(self, adapter: AdapterId, strength: f64) -> Self {
        self.stack_entry(StackEntry { adapter, strength_patch: strength, strength_model: 1.0 })
    }

    /// Applies an adapter after those that were named before, with both factors.
    #[must_use]
    pub fn stack_entry(mut self, entry: StackEntry) -> Self {
        self.stack.push(entry);
        self
    }

    /// Takes the hidden state of an earlier layer, counted from the end: -1 to -24.
    #[must_use]
    pub fn clip_skip(mut self, layer: i32) -> Self {
        self.options.clip_skip = Some(layer);
        self
    }

    /// Chooses the layer of one component, which wins over [`EncodeRequest::clip_skip`].
    #[must_use]
    pub fn layer(mut self, component: Component, choice: LayerChoice) -> Self {
        self.options.layers.insert(component, choice);
        self
    }

    /// Overrides the worker's execution mode. The receipt must name it, unless it is
    /// [`ExecutionMode::Auto`].
    #[must_use]
    pub fn mode(mut self, mode: ExecutionMode) -> Self {
        self.options.mode = Some(mode);
        self
    }

    /// Overrides how the worker rounds merged weights. The receipt must name it.
    #[must_use]
    pub fn fidelity(mut self, fidelity: Fidelity) -> Self {
        self.options.fidelity = Some(fidelity);
        self
    }

    /// Accepts adapters with text-encoder keys that the model does not have; the receipt lists
    /// them. Without this they are an error.
    #[must_use]
    pub fn lenient(mut self) -> Self {
        self.options.matching = Matching::Lenient;
        self
    }

    /// Leaves the pooled output unprojected.
    #[must_use]
    pub fn unprojected(mut self) -> Self {
        self.options.projected = false;
        self
    }

    /// Ignores the weights of the prompt.
    #[must_use]
    pub fn unweighted(mut self) -> Self {
        self.options.weighted = false;
        self
    }

    /// Asks for the tokens that were encoded.
    #[must_use]
    pub fn return_tokens(mut self) -> Self {
        self.options.return_tokens = true;
        self
    }

    /// Insists on weights with this digest.
    #[must_use]
    pub fn model_digest(mut self, digest: ModelDigest) -> Self {
        self.model_digest = Some(digest);
        self
    }

    /// Has it computed in any case: an equal answer that the broker keeps, or that it is about to
    /// get for somebody else, is not taken. [`Receipt::cache`] tells of one that is.
    #[must_use]
    pub fn no_cache(mut self) -> Self {
        self.no_cache = true;
        self
    }

    /// Gives this request a time budget of its own.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    pub(crate) fn timeout_or(&self, default: Duration) -> Result<Duration, Error> {
        let timeout = self.timeout.unwrap_or(default);
        check_timeout(timeout)?;
        Ok(timeout)
    }

    /// The message, its attachments, and what a reply must agree with.
    pub(crate) fn into_wire(
        self,
        id: RequestId,
    ) -> Result<(ClipEncode, Vec<Bytes>, Expected), Error> {
        if self.has_stray_hook {
            let message = "`hook` was called before any prompt: call it after the prompt it is for";
            return Err(Error::invalid(message));
        }
        let model: ModelName =
            self.model.parse().map_err(|error| Error::invalid(format!("model {error}")))?;
        let mut attachments = Vec::new();
        let prompts = self.prompts.into_iter().map(|prompt| prompt.into_wire(&mut attachments));
        let header = ClipEncode {
            id,
            model,
            model_digest: self.model_digest,
            prompts: prompts.collect::<Result<_, _>>()?,
            stack: self.stack,
            options: self.options,
            budget_ms: None,
            no_cache: self.no_cache,
            requires: Vec::new(),
        };
        let expected = Expected::of(&header);
        Ok((header, attachments, expected))
    }
}

impl PromptSource {
    fn new(source: Source) -> Self {
        Self { source, hook_stack: Vec::new() }
    }

    fn into_wire(self, attachments: &mut Vec<Bytes>) -> Result<Prompt, Error> {
        let Self { source, hook_stack } = self;
        Ok(Prompt { hook_stack, ..source.into_wire(attachments)? })
    }
}

impl Source {
    fn into_wire(self, attachments: &mut Vec<Bytes>) -> Result<Prompt, Error> {
        match self {
            Self::Text(text) => Ok(Prompt { text: Some(text), ..Prompt::default() }),
            Self::Texts(texts) => Ok(Prompt { texts: Some(texts), ..Prompt::default() }),
            Self::Tokens(components) => {
                let mut tokens = BTreeMap::new();
                for (component, ComponentTokens { chunks, vectors }) in components {
                    let vectors = attach(component, &vectors, attachments)?;
                    tokens.insert(component, TokensRef { chunks, vectors });
                }
                Ok(Prompt { tokens: Some(tokens), ..Prompt::default() })
            }
        }
    }
}

impl PendingEncode {
    pub(crate) fn new(call: Call, expected: Expected) -> Self {
        Self { call, expected }
    }

    /// The id that the farm knows the request by, for logs.
    pub fn id(&self) -> &RequestId {
        self.call.id()
    }

    /// Waits for the answer. Dropping the future cancels the request.
    ///
    /// # Errors
    /// As [`Client::encode`](crate::Client::encode).
    pub async fn outcome(self) -> Result<Encoding, Error> {
        let (reply, attachments) = self.call.reply().await?;
        verify::encoding(reply, &attachments, &self.expected).map_err(Error::protocol)
    }

    /// Cancels the request, as dropping it does.
    pub fn cancel(self) {}
}

/// The reference to a vector table, once it is attached; nothing for an empty one.
fn attach(
    component: Component,
    table: &VectorTable,
    attachments: &mut Vec<Bytes>,
) -> Result<Option<TensorRef>, Error> {
    if table.elements.is_empty() {
        return Ok(None);
    }
    let rows = table.rows();
    if rows * table.width != table.elements.len() {
        let (elements, width) = (table.elements.len(), table.width);
        let message = format!(
            "the vectors of `{component}` have {elements} elements: no multiple of {width}"
        );
        return Err(Error::invalid(message));
    }
    let too_many = |_| Error::invalid(format!("the vectors of `{component}` are too many"));
    let attachment = u16::try_from(attachments.len()).map_err(too_many)?;
    let sizes =
        [u32::try_from(rows).map_err(too_many)?, u32::try_from(table.width).map_err(too_many)?];
    attachments.push(tensor::f32_to_bytes(&table.elements));
    Ok(Some(TensorRef { dtype: Dtype::Float32, shape: sizes.to_vec(), attachment }))
}
