//! What workers and the broker say to each other.
//!
//! A `work` message carries the client's header frame and attachments unread, a `done` message
//! carries the reply's. So the broker forwards both without parsing or copying them.

use serde::{Deserialize, Serialize};

use crate::{
    code::ErrorCode,
    id::{AdapterId, WorkerName},
    reply::ModelInfo,
    request::kinds,
};

kinds! { WORKER_KINDS:
    "ready" => Ready,
    "alive" => Alive,
    "done" => Done,
    "fetch" => Fetch,
    "disconnect" => Disconnect,
}

kinds! { BROKER_KINDS:
    "work" => Work,
    "cancel_work" => CancelWork,
    "blob" => Blob,
    "no_blob" => NoBlob,
    "evict" => Evict,
    "announce" => Announce,
}

/// A worker announces itself with everything it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// What people call it; a newer process of the same name replaces the older.
    pub worker: WorkerName,
    /// Random for every process, so that a restarted worker is another one.
    pub epoch: u64,
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Its device.
    pub device: String,
    /// Requests it takes at once: running and next.
    pub slots: u32,
    /// The models it serves.
    pub models: Vec<ModelInfo>,
    /// Grows with every change of the resident set.
    pub revision: u64,
    /// Adapters in its memory.
    pub resident: Vec<AdapterId>,
    /// Dispatches it holds, so that a restarted broker knows what still runs.
    pub in_flight: Vec<u64>,
    /// Whether it takes no new requests.
    pub draining: bool,
}

/// A worker shows that it lives, and what changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// The epoch of its `ready`.
    pub epoch: u64,
    /// The revision of its resident set.
    pub revision: u64,
    /// The resident set, when it changed since the last message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident: Option<Vec<AdapterId>>,
    /// Dispatches it holds.
    pub in_flight: Vec<u64>,
    /// Whether it takes no new requests.
    pub draining: bool,
}

/// A dispatch is answered: the attachments are the reply's header frame and its attachments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The epoch of the worker's `ready`.
    pub epoch: u64,
    /// The dispatch.
    pub dispatch: u64,
    /// The error's code when the reply is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<ErrorCode>,
}

/// A worker asks for bytes of an adapter's canonical form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// The adapter.
    pub adapter: AdapterId,
    /// The first byte.
    pub offset: u64,
    /// At most this many bytes come back.
    pub length: u32,
}

/// A worker leaves in peace; what it held goes to others without blame.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disconnect {
    /// The epoch of the worker's `ready`.
    pub epoch: u64,
}

/// A request for a worker: the attachments are the client's header frame and its attachments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Names this dispatch in `done`, `cancel_work` and heartbeats.
    pub dispatch: u64,
    /// How many workers were given the request, this one included.
    pub attempt: u32,
    /// Time the request waited at the broker, in milliseconds.
    pub queued_ms: u32,
    /// Time left for the answer, in milliseconds.
    pub budget_ms: u32,
}

/// A dispatch is no longer wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelWork {
    /// The dispatch.
    pub dispatch: u64,
}

/// Bytes of an adapter's canonical form, in the one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// The adapter.
    pub adapter: AdapterId,
    /// The first byte.
    pub offset: u64,
    /// Bytes of the whole blob.
    pub size: u64,
}

/// The broker does not hold an adapter that a worker asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoBlob {
    /// The adapter.
    pub adapter: AdapterId,
    /// Why not.
    pub reason: String,
}

/// The worker lets go of adapters that it does not need for work in hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evict {
    /// The adapters.
    pub adapters: Vec<AdapterId>,
}

/// The broker does not know the sender, or missed a change: send `ready`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {}
