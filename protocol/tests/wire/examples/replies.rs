//! One reply of every kind.

use std::collections::BTreeMap;

use luna_protocol::{
    AdapterReceipt, AdapterSource, BlobDigest, CacheUse, Chunk, Component, Dtype, ErrorCode,
    ErrorReply, ExecutionMode, FailedPatch, Failure, Fidelity, MergedWeights, ModelDigest, Receipt,
    TensorRef, Times, reply,
};

use super::{Example, adapter, example, id, model_info};

pub(super) fn replies() -> Vec<Example> {
    let id = || id("r-1");
    let mut examples = vec![example("clip_encode_reply", &clip_encode_reply())];
    examples.extend(lora_replies());
    examples.extend([
        example("status_reply", &status_reply()),
        example("explain_reply", &explain_reply()),
        example(
            "warm_reply",
            &reply::WarmReply {
                id: id(),
                adapters: vec![reply::WarmAdapter {
                    adapter: adapter("anime"),
                    held: vec![super::id("gpu-0")],
                    fetching: vec![super::id("gpu-1")],
                }],
            },
        ),
        example(
            "drain_reply",
            &reply::DrainReply {
                id: id(),
                worker: Some(super::id("gpu-0")),
                draining: true,
                in_flight: 1,
            },
        ),
        example("cancel_reply", &reply::CancelReply { id: id(), cancelled: true }),
        example(
            "error",
            &ErrorReply {
                id: Some(id()),
                code: ErrorCode::Overloaded,
                retryable: true,
                message: "the queue holds 256 requests: try again later".to_owned(),
                retry_after_ms: Some(250),
            },
        ),
    ]);
    examples
}

fn lora_replies() -> Vec<Example> {
    let id = || id("r-1");
    vec![
        example(
            "has_lora_reply",
            &reply::HasLoraReply {
                id: id(),
                present: vec![adapter("anime")],
                missing: vec![adapter("detail")],
            },
        ),
        example(
            "upload_lora_reply",
            &reply::UploadLoraReply {
                id: id(),
                upload: Some(super::id("u-7")),
                received: 3,
                chunk_bytes_max: 1 << 20,
                credit_bytes: Some(4 << 20),
                wait_ms: Some(250),
                adapter: Some(adapter("anime")),
                blob: Some(BlobDigest::of(b"abc")),
                report: Some(reply::KeyReport {
                    targets: 72,
                    unmatched: vec!["lora_te_odd".to_owned()],
                    ignored: 264,
                }),
            },
        ),
        example(
            "list_loras_reply",
            &reply::ListLorasReply {
                id: id(),
                loras: vec![reply::LoraInfo {
                    adapter: adapter("anime"),
                    bytes: 4096,
                    label: Some("anime.safetensors".to_owned()),
                    stored: true,
                    workers: vec![super::id("gpu-0")],
                }],
            },
        ),
        example(
            "evict_lora_reply",
            &reply::EvictLoraReply {
                id: id(),
                evicted: vec![adapter("anime")],
                unknown: vec![adapter("detail")],
            },
        ),
    ]
}

pub(super) fn model_replies() -> Vec<Example> {
    let id = || id("r-1");
    vec![
        example(
            "list_models_reply",
            &reply::ListModelsReply {
                id: id(),
                models: vec![reply::ModelStatus {
                    model: model_info(),
                    workers: vec![super::id("gpu-0")],
                    loaded: vec![super::id("gpu-0")],
                }],
            },
        ),
        example(
            "register_model_reply",
            &reply::RegisterModelReply {
                id: id(),
                model: model_info(),
                workers: vec![super::id("gpu-0")],
                failed: vec![reply::WorkerFailure {
                    worker: super::id("gpu-1"),
                    failure: Failure::new(ErrorCode::Forbidden, "`/models` is not allowed"),
                }],
            },
        ),
    ]
}

fn clip_encode_reply() -> reply::ClipEncodeReply {
    reply::ClipEncodeReply {
        id: id("r-1"),
        results: vec![reply::ConditioningRef {
            cond: TensorRef { dtype: Dtype::Float32, shape: vec![1, 77, 768], attachment: 0 },
            pooled: TensorRef { dtype: Dtype::Float32, shape: vec![1, 768], attachment: 1 },
            tokens: Some(BTreeMap::from([(
                Component::ClipL,
                vec![Chunk { ids: vec![49406, 49407], ..Chunk::default() }],
            )])),
        }],
        receipt: Receipt {
            model: id("sd15"),
            model_digest: ModelDigest::of(b"model"),
            weights_dtype: Dtype::Float16,
            stack: vec![AdapterReceipt {
                adapter: adapter("anime"),
                strength_patch: 0.8,
                strength_model: 1.0,
                applied: 72,
                not_matched: vec!["clip_l.layer.13".to_owned()],
                failed: vec![FailedPatch {
                    key: "clip_l.layer.0".to_owned(),
                    reason: "the weight is [2], the patch is [3]".to_owned(),
                }],
                source: AdapterSource::Broker,
            }],
            hook_stacks: vec![vec![AdapterReceipt {
                adapter: adapter("detail"),
                strength_patch: 0.5,
                strength_model: 1.0,
                applied: 72,
                not_matched: Vec::new(),
                failed: Vec::new(),
                source: AdapterSource::Resident,
            }]],
            mode: ExecutionMode::Functional,
            fidelity: Fidelity::Comfyui,
            merged_weights: Some(MergedWeights::Cached),
            worker: id("gpu-0"),
            attempts: 1,
            times: Times { queue_ms: 0.5, load_ms: 12.0, compute_ms: 3.25 },
            cache: Some(CacheUse::Hit),
            warnings: vec!["1 key was not matched".to_owned()],
        },
    }
}

fn explain_reply() -> reply::ExplainReply {
    let verdict = |worker| reply::WorkerVerdict {
        worker: id(worker),
        refused: None,
        score: None,
        free: true,
    };
    let score = reply::Score {
        queue_ms: 3.5,
        load_ms: 12.0,
        model_ms: 0.25,
        compute_ms: 4.0,
        total_ms: 19.75,
    };
    reply::ExplainReply {
        id: id("r-1"),
        workers: vec![
            reply::WorkerVerdict { score: Some(score), ..verdict("gpu-0") },
            reply::WorkerVerdict { refused: Some(reply::Refusal::Draining), ..verdict("gpu-1") },
        ],
        chosen: Some(id("gpu-0")),
    }
}

fn status_reply() -> reply::StatusReply {
    reply::StatusReply {
        id: id("r-1"),
        version: "0.1.0".to_owned(),
        uptime_ms: 61_000,
        ready: false,
        reasons: vec!["no worker is connected".to_owned()],
        workers: vec![reply::WorkerStatus {
            worker: id("gpu-0"),
            pid: 4711,
            device: "cuda:0".to_owned(),
            models: vec![id("sd15")],
            loaded: vec![id("sd15")],
            resident: 2,
            host: 3,
            disk: 4,
            in_flight: 1,
            draining: true,
            drain_reason: Some("a new driver".to_owned()),
            prefetching: 5,
            silent_ms: 120,
        }],
        queued: 3,
        in_flight: 1,
        loras: 2,
        lora_bytes: 8192,
        counters: reply::Counters {
            accepted: 10,
            answered: 7,
            failed: 1,
            requeued: 2,
            workers_lost: 1,
            coalesced: 3,
            cache_hits: 4,
            ejected: 5,
            quarantined: 6,
            refused_overload: 7,
        },
    }
}
