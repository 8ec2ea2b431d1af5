//! What workers and the broker say to each other.
//!
//! A `work` message carries the client's header frame and attachments unread, a `done` message
//! carries the reply's. So the broker forwards both without parsing or copying them.

use serde::{Deserialize, Serialize};

use crate::{
    code::{ErrorCode, Failure},
    id::{AdapterId, BlobDigest, ModelName, RequestDigest, WorkerName},
    model::Family,
    reply::ModelInfo,
    request::{ModelFile, kinds},
};

kinds! { WORKER_KINDS:
    "ready" => Ready,
    "alive" => Alive,
    "done" => Done,
    "fetch" => Fetch,
    "registered" => Registered,
    "disconnect" => Disconnect,
}

kinds! { BROKER_KINDS:
    "work" => Work,
    "cancel_work" => CancelWork,
    "blob" => Blob,
    "no_blob" => NoBlob,
    "evict" => Evict,
    "announce" => Announce,
    "register" => Register,
    "prefetch" => Prefetch,
    "drain_worker" => DrainWorker,
    "released" => Released,
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
    /// The models it serves, loaded or not.
    pub models: Vec<ModelInfo>,
    /// Grows with every change of the inventory.
    pub revision: u64,
    /// What it holds.
    pub inventory: Inventory,
    /// Dispatches it holds, so that a restarted broker knows what still runs.
    pub in_flight: Vec<u64>,
    /// Whether it takes no new requests.
    pub draining: bool,
    /// Its earlier processes, oldest first, and what each was busy with when it ended, as far as
    /// its journal knows. At most [`DEATHS_MAX`](crate::limits::DEATHS_MAX), with at most
    /// [`DEATHS_BUSY_MAX`](crate::limits::DEATHS_BUSY_MAX) requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub died_with: Vec<Death>,
}

/// How a process of a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// Its epoch.
    pub epoch: u64,
    /// How long ago that was, in seconds. No date, as clocks differ.
    pub ago_s: u32,
    /// The requests that it was reading, loading for or computing: none if it ended in peace. What
    /// else it had in hand is innocent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub busy_with: Vec<Busy>,
}

/// A request that a worker's process was busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Busy {
    /// The `key` of the `work`.
    pub key: RequestDigest,
    /// The `alone` of the `work`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alone: bool,
}

/// What a worker holds and where, each adapter in the nearest place that has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inventory {
    /// Adapters on its device.
    pub device: Vec<AdapterId>,
    /// Adapters in its main memory.
    pub host: Vec<AdapterId>,
    /// Adapters in its blob cache on disk.
    pub disk: Vec<AdapterId>,
    /// Models in memory.
    pub models: Vec<ModelName>,
}

impl Inventory {
    /// Tells inventories apart, whatever the order of what they list: the first eight bytes of the
    /// BLAKE3 digest of every place with its ids, sorted.
    pub fn digest(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        for (place, adapters) in [&self.device, &self.host, &self.disk].into_iter().enumerate() {
            let mut ids: Vec<_> = adapters.iter().map(AdapterId::as_bytes).collect();
            ids.sort_unstable();
            hasher.update(&[u8::try_from(place).unwrap_or(u8::MAX)]);
            hasher.update(&(ids.len() as u64).to_le_bytes());
            for id in ids {
                hasher.update(id);
            }
        }
        let mut models: Vec<_> = self.models.iter().map(ModelName::as_str).collect();
        models.sort_unstable();
        for model in models {
            hasher.update(&(model.len() as u64).to_le_bytes());
            hasher.update(model.as_bytes());
        }
        let digest = *hasher.finalize().as_bytes();
        digest.iter().take(8).rev().fold(0, |number, &byte| (number << 8) | u64::from(byte))
    }
}

/// A worker shows that it lives, and what changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// The epoch of its `ready`.
    pub epoch: u64,
    /// The revision of its inventory.
    pub revision: u64,
    /// The inventory, when it changed since the last message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory: Option<Inventory>,
    /// The digest of its whole inventory, see [`Inventory::digest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_digest: Option<u64>,
    /// Dispatches it holds.
    pub in_flight: Vec<u64>,
    /// Adapters on their way that no dispatch needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefetching: Vec<AdapterId>,
    /// Whether it takes no new requests.
    pub draining: bool,
    /// Why it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_reason: Option<String>,
}

/// A dispatch is answered: the attachments are the reply's header frame and its attachments.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// The epoch of the worker's `ready`.
    pub epoch: u64,
    /// The dispatch.
    pub dispatch: u64,
    /// The error's code when the reply is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<ErrorCode>,
    /// Time on the device, in milliseconds; the broker measures for itself when it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_ms: Option<f64>,
    /// Time to fetch and read the adapters that were not resident, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_ms: Option<f64>,
}

/// A worker asks for bytes of a blob: an adapter's canonical form, or a model's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// Its digest.
    pub blob: BlobDigest,
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
    /// What is asked for, under the name that is the same for every equal request: for the journal
    /// of what the worker died with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<RequestDigest>,
    /// Whether the worker has nothing else while it has this: for the journal as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alone: bool,
}

/// A dispatch is no longer wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelWork {
    /// The dispatch.
    pub dispatch: u64,
}

/// Bytes of a blob, in the one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its digest.
    pub blob: BlobDigest,
    /// The first byte.
    pub offset: u64,
    /// Bytes of the whole blob.
    pub size: u64,
}

/// The broker does not hold a blob that a worker asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoBlob {
    /// Its digest.
    pub blob: BlobDigest,
    /// Why not.
    pub reason: String,
}

/// The worker lets go of adapters that it does not need for work in hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evict {
    /// The adapters.
    pub adapters: Vec<AdapterId>,
}

/// The worker brings adapters into memory when it has nothing else to fetch. It lists them as
/// `prefetching` until they are there or it has given them up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    /// The adapters.
    pub adapters: Vec<AdapterId>,
}

/// The worker takes no new requests from now on and stays, or takes them again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainWorker {
    /// Why, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether it takes new requests again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undo: bool,
}

/// Others have what a draining worker held: nothing keeps it from leaving but work in hand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {}

/// The broker does not know the sender, or missed a change: send `ready`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {}

/// The worker serves one more model from now on, and says what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// Names this question in `registered`.
    pub ticket: u64,
    /// What people will call the model.
    pub name: ModelName,
    /// Which components it has.
    pub family: Family,
    /// Where its files are.
    pub files: Vec<ModelFile>,
}

/// The answer to `register`: exactly one of `model` and `failure`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// The epoch of the worker's `ready`.
    pub epoch: u64,
    /// The question.
    pub ticket: u64,
    /// What the model is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelInfo>,
    /// Why the worker cannot serve it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_places_and_models_but_not_the_order() {
        let ids = |names: &[&str]| -> Vec<_> {
            names.iter().map(|name| AdapterId::of(name.as_bytes())).collect()
        };
        let inventory = |device: &[&str], host: &[&str], models: &[&str]| Inventory {
            device: ids(device),
            host: ids(host),
            disk: Vec::new(),
            models: models.iter().map(|name| name.parse().expect("a name")).collect(),
        };
        let one = inventory(&["a", "b"], &["c"], &["sd15", "sdxl"]).digest();
        assert_eq!(one, inventory(&["b", "a"], &["c"], &["sdxl", "sd15"]).digest());
        assert_ne!(one, inventory(&["a"], &["b", "c"], &["sd15", "sdxl"]).digest());
        assert_ne!(one, inventory(&["a", "b"], &["c"], &["sd15"]).digest());
        assert_ne!(Inventory::default().digest(), one);
    }
}
