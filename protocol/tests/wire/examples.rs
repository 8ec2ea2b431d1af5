//! One fixed example of every kind of message, complete enough to show every field.

mod replies;

use std::collections::BTreeMap;

use luna_protocol::{
    AdapterId, BlobDigest, Chunk, Component, Dtype, ErrorCode, ExecutionMode, Failure, Family,
    Fidelity, Header, Layer, ModelDigest, RequestDigest, TensorRef, VectorAt, header, reply,
    request, worker,
};

/// A message as bytes, under the name of its snapshot.
pub(crate) struct Example {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) header: Vec<u8>,
}

/// Every example, in the order of the documentation.
pub(crate) fn all() -> Vec<Example> {
    let mut examples = requests();
    examples.extend(operations());
    examples.extend(replies::replies());
    examples.extend(replies::model_replies());
    examples.extend(from_workers());
    examples.extend(to_workers());
    examples
}

fn requests() -> Vec<Example> {
    let id = || id("r-1");
    vec![
        example("clip_encode", &clip_encode_text()),
        example("clip_encode_texts", &clip_encode_texts()),
        example("clip_encode_tokens", &clip_encode_tokens()),
        example("has_lora", &request::HasLora { id: id(), adapters: vec![adapter("anime")] }),
        example(
            "upload_lora_begin",
            &upload(request::UploadOp::Begin {
                size: 3,
                format: request::UploadFormat::Lora,
                digest: Some(BlobDigest::of(b"abc")),
                label: Some("anime.safetensors".to_owned()),
            }),
        ),
        example(
            "upload_lora_chunk",
            &upload(request::UploadOp::Chunk { upload: self::id("u-7"), offset: 1 << 20 }),
        ),
        example(
            "upload_lora_commit",
            &upload(request::UploadOp::Commit { upload: self::id("u-7") }),
        ),
        example(
            "upload_lora_abort",
            &upload(request::UploadOp::Abort { upload: self::id("u-7"), keep: false }),
        ),
        example(
            "upload_lora_abort_keep",
            &upload(request::UploadOp::Abort { upload: self::id("u-7"), keep: true }),
        ),
        example("list_loras", &request::ListLoras { id: id() }),
        example(
            "evict_lora",
            &request::EvictLora { id: id(), adapters: vec![adapter("anime")], delete: true },
        ),
        example("list_models", &request::ListModels { id: id() }),
        example(
            "register_model",
            &request::RegisterModel {
                id: id(),
                name: self::id("sdxl-base"),
                family: Family::Sdxl,
                files: vec![
                    request::ModelFile::Path("/models/clip_l.safetensors".to_owned()),
                    request::ModelFile::Blob(BlobDigest::of(b"abc")),
                ],
                budget_ms: Some(60_000),
            },
        ),
        example("status", &request::Status { id: id() }),
        example(
            "explain",
            &request::Explain {
                id: id(),
                model: self::id("sd15"),
                model_digest: Some(ModelDigest::of(b"model")),
                adapters: vec![adapter("anime")],
                chunks: 4,
            },
        ),
        example("cancel", &request::Cancel { id: id(), request: self::id("r-0") }),
        example("heartbeat", &request::Heartbeat {}),
    ]
}

fn operations() -> Vec<Example> {
    let id = || id("r-1");
    vec![
        example(
            "warm",
            &request::Warm {
                id: id(),
                adapters: vec![adapter("anime")],
                model: Some(self::id("sd15")),
                workers: 2,
                budget_ms: Some(5000),
            },
        ),
        example(
            "drain",
            &request::Drain {
                id: id(),
                worker: Some(self::id("gpu-0")),
                reason: Some("a new driver".to_owned()),
                undo: true,
            },
        ),
    ]
}

fn clip_encode_text() -> request::ClipEncode {
    request::ClipEncode {
        id: id("r-1"),
        model: id("sdxl-base"),
        model_digest: Some(ModelDigest::of(b"model")),
        prompts: vec![request::Prompt {
            text: Some("a (red:1.2) fox".to_owned()),
            hook_stack: vec![entry("hook", 1.0, 1.0)],
            ..request::Prompt::default()
        }],
        stack: vec![entry("anime", 0.8, 1.0), entry("detail", -0.5, 0.25)],
        options: request::EncodeOptions {
            clip_skip: Some(-2),
            layers: BTreeMap::from([
                (Component::ClipL, request::LayerChoice { layer: Layer::Last, final_norm: false }),
                (
                    Component::ClipG,
                    request::LayerChoice { layer: Layer::Hidden(-2), final_norm: true },
                ),
            ]),
            projected: false,
            weighted: false,
            mode: Some(ExecutionMode::Functional),
            fidelity: Some(Fidelity::Exact),
            matching: request::Matching::Lenient,
            output_dtype: Dtype::Float16,
            return_tokens: true,
        },
        budget_ms: Some(5000),
        no_cache: true,
        requires: vec!["hooks".to_owned()],
    }
}

fn clip_encode_texts() -> request::ClipEncode {
    let texts = [(Component::ClipL, "a fox"), (Component::ClipG, "a red fox in the snow")];
    let texts = texts.map(|(component, text)| (component, text.to_owned()));
    request::ClipEncode {
        id: id("r-1"),
        model: id("sdxl-base"),
        model_digest: None,
        prompts: vec![request::Prompt { texts: Some(texts.into()), ..request::Prompt::default() }],
        stack: Vec::new(),
        options: request::EncodeOptions::default(),
        budget_ms: None,
        no_cache: false,
        requires: Vec::new(),
    }
}

fn clip_encode_tokens() -> request::ClipEncode {
    let chunk = Chunk {
        ids: vec![49406, 320, 49407],
        weights: vec![1.0, 1.5, 1.0, 1.0],
        vectors: vec![VectorAt { position: 2, row: 0 }],
    };
    let tokens = request::TokensRef {
        chunks: vec![chunk],
        vectors: Some(TensorRef { dtype: Dtype::Float32, shape: vec![1, 768], attachment: 0 }),
    };
    request::ClipEncode {
        id: id("r-1"),
        model: id("sd15"),
        model_digest: None,
        prompts: vec![request::Prompt {
            tokens: Some(BTreeMap::from([(Component::ClipL, tokens)])),
            ..request::Prompt::default()
        }],
        stack: Vec::new(),
        options: request::EncodeOptions::default(),
        budget_ms: None,
        no_cache: false,
        requires: Vec::new(),
    }
}

fn from_workers() -> Vec<Example> {
    vec![
        example(
            "ready",
            &worker::Ready {
                worker: id("gpu-0"),
                epoch: u64::MAX,
                pid: 4711,
                version: "0.1.0".to_owned(),
                device: "cuda:0".to_owned(),
                slots: 2,
                models: vec![model_info()],
                revision: 5,
                inventory: inventory(),
                in_flight: vec![17],
                draining: false,
                died_with: vec![worker::Death {
                    epoch: 8,
                    ago_s: 5,
                    busy_with: vec![worker::Busy {
                        key: RequestDigest::of(b"request"),
                        alone: true,
                    }],
                }],
            },
        ),
        example(
            "alive",
            &worker::Alive {
                epoch: 9,
                revision: 6,
                inventory: Some(inventory()),
                resident_digest: Some(inventory().digest()),
                in_flight: vec![17, 18],
                prefetching: vec![adapter("photo")],
                draining: true,
                drain_reason: Some("a new driver".to_owned()),
            },
        ),
        example(
            "done",
            &worker::Done {
                epoch: 9,
                dispatch: 17,
                failed: Some(ErrorCode::LoraMismatch),
                compute_ms: Some(3.25),
                load_ms: Some(12.0),
            },
        ),
        example(
            "fetch",
            &worker::Fetch { blob: BlobDigest::of(b"abc"), offset: 0, length: 1 << 20 },
        ),
        example(
            "registered",
            &worker::Registered {
                epoch: 9,
                ticket: 3,
                model: Some(model_info()),
                failure: Some(Failure::new(ErrorCode::Forbidden, "`/models` is not allowed")),
            },
        ),
        example("disconnect", &worker::Disconnect { epoch: 9 }),
    ]
}

fn to_workers() -> Vec<Example> {
    vec![
        example(
            "work",
            &worker::Work {
                dispatch: 17,
                attempt: 1,
                queued_ms: 2,
                budget_ms: 4998,
                key: Some(RequestDigest::of(b"request")),
                alone: true,
            },
        ),
        example("cancel_work", &worker::CancelWork { dispatch: 17 }),
        example("blob", &worker::Blob { blob: BlobDigest::of(b"abc"), offset: 0, size: 4096 }),
        example(
            "no_blob",
            &worker::NoBlob { blob: BlobDigest::of(b"abc"), reason: "it was evicted".to_owned() },
        ),
        example("prefetch", &worker::Prefetch { adapters: vec![adapter("anime")] }),
        example(
            "drain_worker",
            &worker::DrainWorker { reason: Some("a new driver".to_owned()), undo: true },
        ),
        example("released", &worker::Released {}),
        example("evict", &worker::Evict { adapters: vec![adapter("anime")] }),
        example("announce", &worker::Announce {}),
        example(
            "register",
            &worker::Register {
                ticket: 3,
                name: id("sdxl-base"),
                family: Family::Sdxl,
                files: vec![request::ModelFile::Blob(BlobDigest::of(b"abc"))],
            },
        ),
    ]
}

/// The header's bytes, once they are known to read back as the same header.
fn example<H: Header + PartialEq + std::fmt::Debug>(name: &'static str, value: &H) -> Example {
    let bytes = header::write(value);
    assert_eq!(&header::read::<H>(&bytes).expect("an example reads back"), value);
    Example { name, kind: H::KIND, header: bytes }
}

fn upload(op: request::UploadOp) -> request::UploadLora {
    request::UploadLora { id: id("r-1"), op }
}

fn entry(name: &str, strength_patch: f64, strength_model: f64) -> request::StackEntry {
    request::StackEntry { adapter: adapter(name), strength_patch, strength_model }
}

fn model_info() -> reply::ModelInfo {
    reply::ModelInfo {
        name: id("sd15"),
        digest: ModelDigest::of(b"model"),
        family: Family::Sd15,
        weights_dtype: Dtype::Float16,
        bytes: 246_144_152,
        chunk_tokens: BTreeMap::from([(Component::ClipL, 77)]),
    }
}

fn inventory() -> worker::Inventory {
    worker::Inventory {
        device: vec![adapter("anime")],
        host: vec![adapter("detail")],
        disk: vec![adapter("hook")],
        models: vec![id("sd15")],
    }
}

fn adapter(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}

fn id<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a valid id")
}
