//! What operators ask: adapters brought into memory ahead of requests, and processes that leave in
//! peace.

use serde::{Deserialize, Serialize};

use crate::id::{AdapterId, ModelName, RequestId, WorkerName};

/// Has workers bring adapters into memory before requests need them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warm {
    /// Chosen by the client.
    pub id: RequestId,
    /// The adapters.
    pub adapters: Vec<AdapterId>,
    /// The model that they will be used with; the one that most workers serve when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Workers that are to have each of them; no more than there are.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub workers: u32,
    /// How long the answer may wait until they are there, in milliseconds; it comes at once when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_ms: Option<u32>,
}

/// Has a worker or the broker take nothing new and finish what it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Chosen by the client.
    pub id: RequestId,
    /// The worker; the broker when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// What people are told why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether it is to take new requests again instead.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undo: bool,
}

const fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_one(number: &u32) -> bool {
    *number == 1
}
