//! Receipts: what a reply says was really done.

use serde::{Deserialize, Serialize};

use crate::{
    id::{AdapterId, ModelDigest, ModelName, WorkerName},
    model::Dtype,
};

/// What was done to answer one `clip_encode`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// The model that answered.
    pub model: ModelName,
    /// The digest of its weights as the worker holds them.
    pub model_digest: ModelDigest,
    /// How the weights are stored.
    pub weights_dtype: Dtype,
    /// One entry for every entry of the request's stack, in its order.
    pub stack: Vec<AdapterReceipt>,
    /// One list for every prompt, with one entry for every entry of its hook stack; empty when no
    /// prompt has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hook_stacks: Vec<Vec<AdapterReceipt>>,
    /// The execution mode that ran.
    pub mode: ExecutionMode,
    /// How merged weights were rounded.
    pub fidelity: Fidelity,
    /// Whether the weights of the stack were there already; absent when the stack changes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_weights: Option<MergedWeights>,
    /// The worker that answered.
    pub worker: WorkerName,
    /// How many workers were given the request, this one included.
    pub attempts: u32,
    /// Where the time went.
    pub times: Times,
    /// Whether the broker had the answer already; the receipt then tells of the request that it was
    /// computed for. Absent when it was computed for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheUse>,
    /// Things the client should know although the request succeeded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// How the broker's cache was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheUse {
    /// The answer to an equal request was there.
    Hit,
}

/// What was done with one entry of a stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterReceipt {
    /// The adapter.
    pub adapter: AdapterId,
    /// Factor on the adapter's change of a weight.
    pub strength_patch: f64,
    /// Factor on the weight before the change.
    pub strength_model: f64,
    /// Weights that were changed; 0 for a LoRA without text-encoder keys.
    pub applied: u32,
    /// Text-encoder keys that the model does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_matched: Vec<String>,
    /// Patches that cannot be applied to the weights they name, which stay as they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<FailedPatch>,
    /// Where the adapter was when the request arrived.
    pub source: AdapterSource,
}

/// A patch that was not applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedPatch {
    /// The weight that it names.
    pub key: String,
    /// What does not fit.
    pub reason: String,
}

/// Where an adapter was when a request asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterSource {
    /// On the worker's device.
    Resident,
    /// In the worker's main memory.
    Host,
    /// In the worker's blob cache on disk.
    Disk,
    /// With the broker alone: the worker fetched it for this request.
    Broker,
}

/// Whether the weights of a stack were there when the request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergedWeights {
    /// Kept from an earlier request with the same stack.
    Cached,
    /// Built for this request.
    Built,
}

/// How exactly merged weights follow `ComfyUI`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fidelity {
    /// Merged weights are rounded to the storage type, as `ComfyUI` does.
    #[default]
    Comfyui,
    /// Merged weights keep their float32 values.
    Exact,
    /// Half-precision arithmetic.
    Fast,
}

impl Fidelity {
    /// The name on the wire and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Comfyui => "comfyui",
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

impl std::fmt::Display for Fidelity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A fidelity that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown fidelity `{0}`: expected `comfyui`, `exact` or `fast`")]
pub struct UnknownFidelity(String);

impl std::str::FromStr for Fidelity {
    type Err = UnknownFidelity;

    fn from_str(text: &str) -> Result<Self, UnknownFidelity> {
        [Self::Comfyui, Self::Exact, Self::Fast]
            .into_iter()
            .find(|fidelity| fidelity.as_str() == text)
            .ok_or_else(|| UnknownFidelity(text.to_owned()))
    }
}

/// How a stack is applied to the shared model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutionMode {
    /// The worker chooses.
    Auto,
    /// Adapters are attached to the model under a lock.
    Locking,
    /// Virtual weights are built for the stack; nothing shared changes.
    Functional,
    /// Different stacks run in one batch.
    Batched,
}

impl ExecutionMode {
    /// The name on the wire and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Locking => "locking",
            Self::Functional => "functional",
            Self::Batched => "batched",
        }
    }
}

impl std::fmt::Display for ExecutionMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An execution mode that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown execution mode `{0}`: expected `auto`, `locking`, `functional` or `batched`")]
pub struct UnknownMode(String);

impl std::str::FromStr for ExecutionMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        [Self::Auto, Self::Locking, Self::Functional, Self::Batched]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// Where the time of one request went, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Waiting at the broker and at the worker.
    pub queue_ms: f64,
    /// Fetching and reading adapters.
    pub load_ms: f64,
    /// On the device.
    pub compute_ms: f64,
}
