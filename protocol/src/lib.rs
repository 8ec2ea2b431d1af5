//! The wire: ids, messages, error codes and their bytes.
//!
//! Every message is multipart: `[ "LUNA/1", header, attachment* ]`. The header is a MessagePack map
//! whose `kind` says which struct of [`request`], [`reply`] or [`worker`] it is; attachments are raw
//! bytes. A client sends a request and gets exactly one terminal reply with the request's id:
//!
//! ```text
//! client ── clip_encode ──▶ broker ── work ──▶ worker
//! client ◀─ clip_encode_reply ─ broker ◀─ done ─ worker        (or `error` instead)
//! ```
//!
//! `docs/wire-protocol.md` is the same for people who write clients in other languages.
//! Nothing here does I/O or reads a clock.

mod by_component;
pub mod code;
pub mod frames;
pub mod header;
pub mod id;
pub mod limits;
pub mod model;
pub mod receipt;
pub mod reply;
pub mod request;
pub mod tensor;
pub mod tokens;
pub mod worker;

pub use code::{ErrorCode, ErrorReply, Failure};
pub use frames::{Envelope, InvalidFrames};
pub use header::{Header, InvalidHeader};
pub use id::{
    AdapterId, BlobDigest, InvalidId, ModelDigest, ModelName, RequestDigest, RequestId, UploadId,
    WorkerName,
};
pub use model::{Component, Dtype, Family, UnknownDtype, UnknownFamily};
pub use receipt::{
    AdapterReceipt, AdapterSource, CacheUse, ExecutionMode, FailedPatch, Fidelity, MergedWeights,
    Receipt, Times, UnknownFidelity, UnknownMode,
};
pub use tensor::TensorRef;
pub use tokens::{CHUNK_TOKENS, Chunk, ComponentTokens, Layer, VectorAt, VectorTable};
