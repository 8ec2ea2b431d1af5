//! The answers to what operators ask.

use serde::{Deserialize, Serialize};

use crate::id::{AdapterId, RequestId, WorkerName};

/// Who has the adapters that were to be warmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmReply {
    /// The request's id.
    pub id: RequestId,
    /// One entry for every adapter, in the order asked.
    pub adapters: Vec<WarmAdapter>,
}

/// Who has one adapter, and who is getting it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmAdapter {
    /// The adapter.
    pub adapter: AdapterId,
    /// The workers that hold it in memory.
    pub held: Vec<WorkerName>,
    /// The workers that were told to fetch it and do not hold it yet.
    pub fetching: Vec<WorkerName>,
}

/// Whether the worker or the broker drains now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReply {
    /// The request's id.
    pub id: RequestId,
    /// The worker; absent for the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Whether it takes no new requests.
    pub draining: bool,
    /// Requests that it has and finishes.
    pub in_flight: u32,
}
