//! What clients ask: one struct for every kind of request.

mod operations;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use self::operations::{Drain, Warm};
use crate::{
    by_component,
    id::{AdapterId, BlobDigest, ModelDigest, ModelName, RequestId, UploadId},
    model::{Component, Dtype, Family},
    receipt::{ExecutionMode, Fidelity},
    tensor::TensorRef,
    tokens::{Chunk, Layer},
};

macro_rules! kinds {
    ($list:ident: $($kind:literal => $header:ty),+ $(,)?) => {
        $(impl crate::header::Header for $header {
            const KIND: &'static str = $kind;
        })+

        /// Every kind of this direction, in the order of the documentation.
        pub const $list: &[&str] = &[$($kind),+];
    };
}
pub(crate) use kinds;

kinds! { REQUEST_KINDS:
    "clip_encode" => ClipEncode,
    "has_lora" => HasLora,
    "upload_lora" => UploadLora,
    "list_loras" => ListLoras,
    "evict_lora" => EvictLora,
    "list_models" => ListModels,
    "register_model" => RegisterModel,
    "status" => Status,
    "explain" => Explain,
    "warm" => Warm,
    "drain" => Drain,
    "cancel" => Cancel,
    "heartbeat" => Heartbeat,
}

/// Encodes prompts with one stack of adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClipEncode {
    /// Chosen by the client.
    pub id: RequestId,
    /// The model's name.
    pub model: ModelName,
    /// When given, the model of that name must have this digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<ModelDigest>,
    /// What to encode; one result for each.
    pub prompts: Vec<Prompt>,
    /// Adapters in order of application.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stack: Vec<StackEntry>,
    /// How to encode.
    #[serde(default, skip_serializing_if = "EncodeOptions::is_default")]
    pub options: EncodeOptions,
    /// Time left for the answer, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ms: Option<u32>,
    /// Whether it is computed anew in any case: not answered from the cache, not kept there, and
    /// not computed together with an equal request.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_cache: bool,
    /// Names of features the farm must know to answer rightly; an unknown one is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
}

/// One prompt: text that the worker tokenises, or tokens. Exactly one of `text`, `texts` and `tokens`
/// is given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// ComfyUI prompt syntax, the same for every component of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// ComfyUI prompt syntax, another text for every component of the model (`CLIPTextEncodeSDXL`);
    /// the shorter ones are filled up with chunks of the empty prompt.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "by_component::optional"
    )]
    pub texts: Option<BTreeMap<Component, String>>,
    /// Tokens for every component of the model.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "by_component::optional"
    )]
    pub tokens: Option<BTreeMap<Component, TokensRef>>,
    /// Adapters applied on top of the merged stack, for this prompt alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hook_stack: Vec<StackEntry>,
}

/// Tokens of one prompt for one component.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokensRef {
    /// Chunks in order.
    pub chunks: Vec<Chunk>,
    /// float32 `[rows, width]`: the vectors that the chunks insert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vectors: Option<TensorRef>,
}

/// An adapter and how strongly it applies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StackEntry {
    /// The adapter.
    pub adapter: AdapterId,
    /// Factor on the adapter's change of a weight.
    pub strength_patch: f64,
    /// Factor on the weight before the change.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub strength_model: f64,
}

/// How to encode; every field has ComfyUI's default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EncodeOptions {
    /// ComfyUI's `CLIPSetLastLayer`: -1 to -24, resolved by the worker for every component.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_skip: Option<i32>,
    /// The resolved layer of a component; wins over `clip_skip`.
    #[serde(
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "by_component::required"
    )]
    pub layers: BTreeMap<Component, LayerChoice>,
    /// Whether the pooled output is projected where the family does so.
    pub projected: bool,
    /// Whether prompt weights are applied.
    pub weighted: bool,
    /// The execution mode; the worker's setting when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<ExecutionMode>,
    /// How merged weights are rounded; the worker's setting when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<Fidelity>,
    /// What becomes of text-encoder keys that the model does not have.
    pub matching: Matching,
    /// Element type of the results.
    pub output_dtype: Dtype,
    /// Whether the reply lists the tokens that were encoded.
    pub return_tokens: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            clip_skip: None,
            layers: BTreeMap::new(),
            projected: true,
            weighted: true,
            mode: None,
            fidelity: None,
            matching: Matching::Strict,
            output_dtype: Dtype::Float32,
            return_tokens: false,
        }
    }
}

impl EncodeOptions {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What becomes of text-encoder keys that the model does not have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// The request fails with `lora_mismatch`.
    #[default]
    Strict,
    /// They have no effect, and the receipt lists them.
    Lenient,
}

/// Which hidden state of a component is its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerChoice {
    /// `"last"`, or the layer's index; negative counts from the end.
    pub layer: Layer,
    /// Whether the final layer norm is applied to a layer other than the last.
    #[serde(default)]
    pub final_norm: bool,
}

impl Serialize for Layer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Last => serializer.serialize_str("last"),
            Self::Hidden(index) => serializer.serialize_i32(*index),
        }
    }
}

impl<'de> Deserialize<'de> for Layer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Wire {
            Index(i32),
            Name(String),
        }
        match Wire::deserialize(deserializer)? {
            Wire::Index(index) => Ok(Self::Hidden(index)),
            Wire::Name(name) if name == "last" => Ok(Self::Last),
            Wire::Name(name) => {
                Err(de::Error::custom(format!("layer `{name}`: expected `last` or an index")))
            }
        }
    }
}

/// Asks which adapters the farm holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasLora {
    /// Chosen by the client.
    pub id: RequestId,
    /// The adapters in question.
    pub adapters: Vec<AdapterId>,
}

/// One step of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadLora {
    /// Chosen by the client, new for every step.
    pub id: RequestId,
    /// What to do.
    #[serde(flatten)]
    pub op: UploadOp,
}

/// The steps of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum UploadOp {
    /// Announces a file.
    Begin {
        /// Bytes of the whole file.
        size: u64,
        /// What the file is.
        format: UploadFormat,
        /// BLAKE3 of the whole file; checked at `commit` when given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        digest: Option<BlobDigest>,
        /// What people call it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<String>,
    },
    /// Brings the bytes from `offset` on as the one attachment.
    Chunk {
        /// The upload that `begin` opened.
        upload: UploadId,
        /// Where the bytes belong; chunks come in order.
        offset: u64,
    },
    /// Ends the upload: everything is verified, then visible.
    Commit {
        /// The upload that `begin` opened.
        upload: UploadId,
    },
    /// Ends the upload here.
    Abort {
        /// The upload that `begin` opened.
        upload: UploadId,
        /// Whether what came is kept for whoever begins the same file again; only an upload whose
        /// digest was announced can be.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        keep: bool,
    },
}

/// What an uploaded file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UploadFormat {
    /// A LoRA file as found in the wild; the broker makes it canonical.
    Lora,
    /// A canonical adapter; its digest is its id.
    Canonical,
    /// A model's file, for `register_model`.
    Model,
}

/// Lists the adapters that the farm holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListLoras {
    /// Chosen by the client.
    pub id: RequestId,
}

/// Takes adapters out of the workers' memory, and out of the blob store too if asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictLora {
    /// Chosen by the client.
    pub id: RequestId,
    /// The adapters to evict.
    pub adapters: Vec<AdapterId>,
    /// Whether the blob store forgets them as well.
    #[serde(default)]
    pub delete: bool,
}

/// Lists the models that workers serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListModels {
    /// Chosen by the client.
    pub id: RequestId,
}

/// Has the workers serve one more model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterModel {
    /// Chosen by the client.
    pub id: RequestId,
    /// What people will call it.
    pub name: ModelName,
    /// Which components it has.
    pub family: Family,
    /// One checkpoint or stand-alone encoder, or one stand-alone encoder for every component.
    pub files: Vec<ModelFile>,
    /// Time left for the answer, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ms: Option<u32>,
}

/// Where a model's file is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelFile {
    /// An absolute path on the workers' machines, inside a directory that they allow.
    Path(String),
    /// A file that was uploaded.
    Blob(BlobDigest),
}

/// Asks how the farm is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Chosen by the client.
    pub id: RequestId,
}

/// Asks where a `clip_encode` would go now, and why. Nothing is computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// Chosen by the client.
    pub id: RequestId,
    /// The model's name.
    pub model: ModelName,
    /// When given, the model of that name must have this digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<ModelDigest>,
    /// The adapters of the stack and of all hook stacks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterId>,
    /// Chunks of all prompts and components together.
    #[serde(default = "one_chunk", skip_serializing_if = "is_one_chunk")]
    pub chunks: u32,
}

/// Cancels a request of the same client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// Chosen by the client.
    pub id: RequestId,
    /// The request to cancel.
    pub request: RequestId,
}

/// Shows that the sender is alive; answered in kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {}

fn one_chunk() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_one_chunk(chunks: &u32) -> bool {
    *chunks == 1
}

fn one() -> f64 {
    1.0
}

#[expect(
    clippy::float_cmp,
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's signature; exactly the default"
)]
fn is_one(value: &f64) -> bool {
    *value == 1.0
}
