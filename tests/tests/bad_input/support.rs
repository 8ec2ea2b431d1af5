//! A farm whose answer to one prompt is known, and requests and files made to be refused.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fixtures::Size;
use luna_client::{
    AdapterId, Chunk, Client, Component, ComponentTokens, EncodeRequest, Encoding, ErrorCode,
    VectorTable,
};
use luna_e2e::{Cluster, WireClient, models};
use protocol::{
    CHUNK_TOKENS, ErrorReply, RequestId,
    request::{ClipEncode, EncodeOptions, Prompt},
};
use safetensors::{Dtype, tensor::TensorView};

/// The model that every farm here serves: CLIP-L, 32 wide, 4 layers.
pub(crate) const MODEL: &str = "tiny";

/// Width of that model.
pub(crate) const WIDTH: usize = 32;

/// Ids that its vocabulary has.
pub(crate) const VOCABULARY: u32 = 49_408;

const PROMPT: &str = "a (red:1.3) cat on the ((mat))";
const START: u32 = 49_406;
const END: u32 = 49_407;

/// A farm of one worker, and what it answered when nothing bad had happened.
pub(crate) struct Farm {
    pub(crate) cluster: Cluster,
    pub(crate) client: Client,
    base: Vec<u32>,
}

impl Farm {
    pub(crate) async fn start() -> Self {
        let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
        let client = cluster.client().await;
        let base = bits(&client.encode(base_request()).await.expect("the farm answers"));
        Self { cluster, client, base }
    }

    /// A connection for frames that no SDK sends.
    pub(crate) async fn wire(&self) -> WireClient {
        WireClient::connect(self.cluster.endpoint()).await
    }

    /// The answer without any adapter, bit by bit.
    pub(crate) fn base(&self) -> &[u32] {
        &self.base
    }

    /// A good LoRA that the farm holds.
    pub(crate) async fn good_lora(&self) -> AdapterId {
        let file = models::seeded_lora(Size::Tiny, 1, 4);
        self.client.upload_lora(file, |_| {}).await.expect("a good LoRA is accepted").adapter
    }

    /// Asserts that the same processes give the same answer as in the beginning.
    pub(crate) async fn assert_serves(&mut self) {
        let answer = self.client.encode(base_request()).await.expect("a good request is answered");
        assert_eq!(bits(&answer), self.base, "the base answer changed");
        let pid = self.cluster.worker(0).id();
        assert!(self.cluster.broker().is_running() && self.cluster.worker(0).is_running());
        let status = self.client.status().await.expect("the broker answers");
        let pids: Vec<_> = status.workers.iter().map(|worker| worker.pid).collect();
        assert_eq!(pids, [pid], "the worker is another one");
        assert_eq!(status.counters.workers_lost, 0);
    }

    /// Asserts that `request` is refused with `code` and a message that has all `words`, and that
    /// the farm goes on.
    pub(crate) async fn assert_refuses(
        &mut self,
        request: EncodeRequest,
        code: ErrorCode,
        words: &[&str],
    ) {
        let error = self.client.encode(request).await.expect_err(words[0]);
        assert_eq!(error.code(), Some(code), "{error}");
        assert_words(&error.to_string(), words);
        self.assert_serves().await;
    }

    /// The same for a request that the SDK does not send.
    pub(crate) async fn assert_refuses_on_wire(
        &mut self,
        wire: &mut WireClient,
        request: &ClipEncode,
        code: ErrorCode,
        words: &[&str],
    ) {
        wire.send(request, Vec::new());
        let error = wire.next_error().await;
        assert_eq!(error.id.as_ref(), Some(&request.id), "{}", error.message);
        assert_error(&error, code, words);
        self.assert_serves().await;
    }
}

/// Asserts code and message of an error from the wire.
#[track_caller]
pub(crate) fn assert_error(error: &ErrorReply, code: ErrorCode, words: &[&str]) {
    assert_eq!(error.code, code, "{}", error.message);
    assert_eq!(error.retryable, code.is_retryable(), "{}", error.message);
    assert_words(&error.message, words);
}

/// Asserts that a message has all of `words`.
#[track_caller]
pub(crate) fn assert_words(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

/// A request of one prompt without adapters.
pub(crate) fn base_request() -> EncodeRequest {
    EncodeRequest::new(MODEL).prompt(PROMPT)
}

/// The same as a message.
pub(crate) fn base_message(id: RequestId) -> ClipEncode {
    ClipEncode {
        id,
        model: MODEL.parse().expect("it is a name"),
        model_digest: None,
        prompts: vec![Prompt { text: Some(PROMPT.to_owned()), ..Prompt::default() }],
        stack: Vec::new(),
        options: EncodeOptions::default(),
        budget_ms: None,
        no_cache: false,
        requires: Vec::new(),
    }
}

/// As many chunks as one request may have: the tiny model needs tens of milliseconds for them.
pub(crate) fn slow_message(id: RequestId) -> ClipEncode {
    let text = "cat ".repeat(4 * 75);
    let prompt = Prompt { text: Some(text), ..Prompt::default() };
    ClipEncode { prompts: vec![prompt; 32], ..base_message(id) }
}

/// A chunk of `"cat"`: start, one word, end, padding.
pub(crate) fn chunk() -> Chunk {
    let mut ids = vec![END; CHUNK_TOKENS];
    ids[..2].copy_from_slice(&[START, 2368]);
    Chunk { ids, ..Chunk::default() }
}

/// A request of tokens for CLIP-L.
pub(crate) fn tokens(chunks: Vec<Chunk>, vectors: VectorTable) -> EncodeRequest {
    let tokens = ComponentTokens { chunks, vectors };
    EncodeRequest::new(MODEL).tokens(BTreeMap::from([(Component::ClipL, tokens)]))
}

/// Every element of the answer to one prompt, bit by bit.
pub(crate) fn bits(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}

/// A safetensors file of float32 tensors, every element 0.01.
pub(crate) fn file(tensors: &[(&str, &[usize])]) -> Bytes {
    filled_file(tensors, 0.01)
}

/// A safetensors file of float32 tensors, every element `value`.
pub(crate) fn filled_file(tensors: &[(&str, &[usize])], value: f32) -> Bytes {
    let names: BTreeSet<_> = tensors.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), tensors.len(), "every tensor has a name of its own");
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| value.to_le_bytes().repeat(shape.iter().product()))
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), data).expect("the data fits");
        (*name, view)
    });
    safetensors::serialize(views, None).expect("the tensors can be written").into()
}

/// A copy of `bytes` with one bit flipped.
pub(crate) fn flipped(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped
}
