//! The Rust client of a Luna farm.
//!
//! ```no_run
//! use luna_client::{Client, EncodeRequest};
//!
//! # async fn example() -> Result<(), luna_client::Error> {
//! let client = Client::connect(luna_client::DEFAULT_ENDPOINT).await?;
//! let lora = client.upload_lora("anime.safetensors", |_| {}).await?;
//!
//! let request = EncodeRequest::new("sd15").prompt("a (red:1.2) fox").lora(lora.adapter, 0.8);
//! let encoding = client.encode(request).await?;
//! assert_eq!(encoding.conditionings[0].cond.shape, [1, 77, 768]);
//! assert_eq!(encoding.receipt.stack[0].adapter, lora.adapter);
//! # Ok(())
//! # }
//! ```
//!
//! * **Any runtime.** The client has a thread of its own; its futures only wait for that thread.
//! * **One outcome.** Every call ends with a result or an [`Error`] by its time budget plus a
//!   quarter of a second, also without a farm. Dropping the future of an encode cancels it.
//! * **Reconnection.** A farm that restarts is waited for, and what is open is sent again.
//! * **Checked answers.** An [`Encoding`] is handed out only if the farm says that it applied
//!   exactly the adapters and strengths that were asked for, in the mode and with the fidelity that
//!   were named, and its tensors are as announced.

mod builder;
mod call;
mod client;
mod content;
mod driver;
mod encode;
mod error;
mod file_source;
mod lora;
mod model;
mod operations;
mod upload;
mod verify;

pub use builder::{ClientBuilder, DEFAULT_ENDPOINT};
pub use client::Client;
pub use client_core::Unclaimed;
pub use encode::{Conditioning, EncodeRequest, Encoding, PendingEncode, Tensor};
pub use error::{Error, ErrorKind};
pub use lora::Uploaded;
pub use model::{RegisterModel, UploadedFile};
pub use operations::{DrainTarget, Warm};
pub use protocol::{
    AdapterId, AdapterReceipt, AdapterSource, BlobDigest, CacheUse, Chunk, Component,
    ComponentTokens, Dtype, ErrorCode, ExecutionMode, FailedPatch, Failure, Family, Fidelity,
    Layer, MergedWeights, ModelDigest, ModelName, Receipt, Times, VectorAt, VectorTable,
    WorkerName,
    reply::{
        Counters, DrainReply, EvictLoraReply, ExplainReply, HasLoraReply, KeyReport, LoraInfo,
        ModelInfo, ModelStatus, Refusal, RegisterModelReply, Score, StatusReply, WarmAdapter,
        WarmReply, WorkerFailure, WorkerStatus, WorkerVerdict,
    },
    request::{LayerChoice, StackEntry},
};
pub use upload::Progress;
