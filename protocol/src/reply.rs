//! What the broker answers: one struct for every kind of terminal reply.

mod operations;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::operations::{DrainReply, WarmAdapter, WarmReply};
use crate::{
    by_component,
    code::{ErrorReply, Failure},
    id::{AdapterId, BlobDigest, ModelDigest, ModelName, RequestId, UploadId, WorkerName},
    model::{Component, Dtype, Family},
    receipt::Receipt,
    request::kinds,
    tensor::TensorRef,
    tokens::Chunk,
};

kinds! { REPLY_KINDS:
    "clip_encode_reply" => ClipEncodeReply,
    "has_lora_reply" => HasLoraReply,
    "upload_lora_reply" => UploadLoraReply,
    "list_loras_reply" => ListLorasReply,
    "evict_lora_reply" => EvictLoraReply,
    "list_models_reply" => ListModelsReply,
    "register_model_reply" => RegisterModelReply,
    "status_reply" => StatusReply,
    "explain_reply" => ExplainReply,
    "warm_reply" => WarmReply,
    "drain_reply" => DrainReply,
    "cancel_reply" => CancelReply,
    "error" => ErrorReply,
}

/// The embeddings, and what was done to make them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClipEncodeReply {
    /// The request's id.
    pub id: RequestId,
    /// One result for every prompt, in order.
    pub results: Vec<ConditioningRef>,
    /// What was done.
    pub receipt: Receipt,
}

/// One prompt's conditioning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConditioningRef {
    /// `[1, positions of all chunks, width]`; the components' features side by side, L first.
    pub cond: TensorRef,
    /// `[1, width]`.
    pub pooled: TensorRef,
    /// The tokens that were encoded, when `return_tokens` asked for them.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "by_component::optional"
    )]
    pub tokens: Option<BTreeMap<Component, Vec<Chunk>>>,
}

/// Which of the adapters the farm holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HasLoraReply {
    /// The request's id.
    pub id: RequestId,
    /// Held, in the order asked.
    pub present: Vec<AdapterId>,
    /// Not held, in the order asked.
    pub missing: Vec<AdapterId>,
}

/// Where an upload stands after a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadLoraReply {
    /// The step's id.
    pub id: RequestId,
    /// The upload, while it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<UploadId>,
    /// Bytes that the farm has; after `begin`, the first chunk starts here.
    pub received: u64,
    /// Largest chunk that is accepted, in bytes.
    pub chunk_bytes_max: u32,
    /// Bytes beyond `received` that may be on their way, while the upload is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credit_bytes: Option<u64>,
    /// After `begin`: another client is sending this file; begin again after this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u32>,
    /// The adapter, once the farm holds it. After `begin`: nothing needs to be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterId>,
    /// The file, once the farm holds it, when it is a model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<BlobDigest>,
    /// What was found in the file, after `commit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<KeyReport>,
}

/// What a LoRA file's keys were taken for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyReport {
    /// Weights that the adapter changes.
    pub targets: u32,
    /// Keys that name a text encoder but that nothing takes.
    pub unmatched: Vec<String>,
    /// Keys of other models, for example the UNet's.
    pub ignored: u32,
}

/// The adapters that the farm holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListLorasReply {
    /// The request's id.
    pub id: RequestId,
    /// One entry for every adapter, by id.
    pub loras: Vec<LoraInfo>,
}

/// An adapter that the farm holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoraInfo {
    /// The adapter.
    pub adapter: AdapterId,
    /// Bytes of its canonical form; 0 when only workers hold it.
    pub bytes: u64,
    /// What people call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether the blob store holds it.
    pub stored: bool,
    /// The workers that hold it in memory.
    pub workers: Vec<WorkerName>,
}

/// What was evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictLoraReply {
    /// The request's id.
    pub id: RequestId,
    /// Adapters that the farm held and was told to let go.
    pub evicted: Vec<AdapterId>,
    /// Adapters that the farm did not hold.
    pub unknown: Vec<AdapterId>,
}

/// The models that workers serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListModelsReply {
    /// The request's id.
    pub id: RequestId,
    /// One entry for every name and digest.
    pub models: Vec<ModelStatus>,
}

/// A model and the workers that serve it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// What the model is.
    #[serde(flatten)]
    pub model: ModelInfo,
    /// The workers that serve it.
    pub workers: Vec<WorkerName>,
    /// Those of them that have it in memory now; the others load it when a request comes.
    #[serde(default)]
    pub loaded: Vec<WorkerName>,
}

/// A model is served from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterModelReply {
    /// The request's id.
    pub id: RequestId,
    /// What the model is.
    pub model: ModelInfo,
    /// The workers that serve it.
    pub workers: Vec<WorkerName>,
    /// The workers that cannot, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<WorkerFailure>,
}

/// What a worker could not do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFailure {
    /// The worker.
    pub worker: WorkerName,
    /// Why not.
    pub failure: Failure,
}

/// A model as a worker holds it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelInfo {
    /// What people call it.
    pub name: ModelName,
    /// The digest of its weights.
    pub digest: ModelDigest,
    /// Which components it has.
    pub family: Family,
    /// How the weights are stored.
    pub weights_dtype: Dtype,
    /// Bytes that the weights take on the device.
    pub bytes: u64,
    /// Positions of one chunk of every component: 77, or more for a `LongCLIP`.
    #[serde(deserialize_with = "by_component::required")]
    pub chunk_tokens: BTreeMap<Component, u32>,
}

/// How the farm is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// The request's id.
    pub id: RequestId,
    /// The broker's version.
    pub version: String,
    /// Time since the broker started, in milliseconds.
    pub uptime_ms: u64,
    /// Whether encodes are answered now.
    pub ready: bool,
    /// Why not, when not.
    pub reasons: Vec<String>,
    /// The workers, by name.
    pub workers: Vec<WorkerStatus>,
    /// Requests that wait for a worker.
    pub queued: u32,
    /// Requests that workers have.
    pub in_flight: u32,
    /// Adapters in the blob store.
    pub loras: u32,
    /// Bytes of the blob store.
    pub lora_bytes: u64,
    /// What happened since the broker started.
    pub counters: Counters,
}

/// What happened since the broker started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Encodes accepted.
    pub accepted: u64,
    /// Encodes answered with embeddings.
    pub answered: u64,
    /// Encodes answered with an error.
    pub failed: u64,
    /// Encodes given to another worker because one was lost.
    pub requeued: u64,
    /// Workers lost without saying goodbye.
    pub workers_lost: u64,
    /// Encodes computed together with an equal one.
    #[serde(default)]
    pub coalesced: u64,
    /// Encodes answered from the cache.
    #[serde(default)]
    pub cache_hits: u64,
    /// Times that a worker was left out for a while because it kept failing.
    #[serde(default)]
    pub ejected: u64,
    /// Requests that are not tried any more because workers died of them.
    #[serde(default)]
    pub quarantined: u64,
    /// Encodes refused because the farm was full.
    #[serde(default)]
    pub refused_overload: u64,
}

/// One worker, as the broker sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its name.
    pub worker: WorkerName,
    /// Its process id.
    pub pid: u32,
    /// Its device, for example `cpu` or `cuda:0`.
    pub device: String,
    /// The models it serves.
    pub models: Vec<ModelName>,
    /// Those of them that it has in memory now.
    #[serde(default)]
    pub loaded: Vec<ModelName>,
    /// Adapters on its device.
    pub resident: u32,
    /// Further adapters in its main memory.
    #[serde(default)]
    pub host: u32,
    /// Further adapters in its blob cache on disk.
    #[serde(default)]
    pub disk: u32,
    /// Requests it has.
    pub in_flight: u32,
    /// Whether it takes no new requests.
    pub draining: bool,
    /// Why it drains, as it or an operator said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_reason: Option<String>,
    /// Adapters that it is fetching although no request needs them yet.
    #[serde(default)]
    pub prefetching: u32,
    /// Time since it was last heard, in milliseconds.
    pub silent_ms: u64,
}

/// Where a request would go now, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExplainReply {
    /// The request's id.
    pub id: RequestId,
    /// What every worker would mean for it, by name.
    pub workers: Vec<WorkerVerdict>,
    /// The worker that it would go to; it waits for one that has no slot free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<WorkerName>,
}

/// What routing says of one worker: `refused`, or a `score`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerVerdict {
    /// The worker.
    pub worker: WorkerName,
    /// Why the request does not go there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
    /// When it would be done there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<Score>,
    /// Whether a slot is free.
    pub free: bool,
}

/// Why a request does not go to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It does not serve the model of this name and digest.
    NotServed,
    /// It takes no new requests.
    Draining,
    /// It has no slots at all.
    NoSlots,
    /// It keeps failing while others do not, and is left out for a while.
    Ejected,
    /// It is kept for a request that has to run alone, because workers died of it.
    Isolated,
    /// The request was lost together with this very process before.
    DiedHere,
    /// It holds an adapter nowhere, and the blob store does not either.
    LacksAdapter,
}

/// Estimated time until the answer, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Work that the worker has already, and that waits for it.
    pub queue_ms: f64,
    /// Loading the adapters that are not on its device.
    pub load_ms: f64,
    /// Loading the model, unless it is in memory.
    pub model_ms: f64,
    /// On the device.
    pub compute_ms: f64,
    /// All of it; the lowest wins.
    pub total_ms: f64,
}

/// Whether a request was cancelled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReply {
    /// The request's id.
    pub id: RequestId,
    /// Whether the named request was still open; it is answered with `cancelled`.
    pub cancelled: bool,
}
