//! What routing is asked, and what it answers.

use protocol::{AdapterId, ModelDigest, WorkerName, reply::Refusal};

use crate::{cost::Shape, peer::WorkerPeer};

/// What routing needs to know about one request.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Model, size, and whether there is a stack.
    pub shape: &'a Shape,
    /// The digest that the model must have, if one is asked for.
    pub digest: Option<ModelDigest>,
    /// The adapters that are needed, each once.
    pub adapters: &'a [Needed],
    /// Processes that were lost together with this request.
    pub died_on: &'a [WorkerPeer],
    /// Another one for every request; decides between workers with equal scores.
    pub number: u64,
}

/// An adapter that a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needed {
    /// The adapter.
    pub adapter: AdapterId,
    /// Its size in the blob store; nothing when only workers hold it.
    pub stored_bytes: Option<u64>,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// The worker.
    pub peer: WorkerPeer,
    /// Whether it has a slot free; else the request waits for one.
    pub free: bool,
    /// What makes up the estimate.
    pub score: ScoreUs,
}

/// Estimated time until the answer, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScoreUs {
    /// Work that the worker has already, and that waits for it.
    pub queue: u64,
    /// Loading adapters.
    pub load: u64,
    /// Loading the model.
    pub model: u64,
    /// On the device.
    pub compute: u64,
}

/// What routing says of one worker with regard to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The worker.
    pub worker: WorkerName,
    /// Its connection.
    pub peer: WorkerPeer,
    /// Whether it has a slot free.
    pub free: bool,
    /// The estimate, or why the request does not go there.
    pub score: Result<ScoreUs, Refusal>,
}

impl ScoreUs {
    /// All of it.
    pub const fn total(&self) -> u64 {
        self.queue.saturating_add(self.work())
    }

    /// What the request adds to the worker's queue.
    pub const fn work(&self) -> u64 {
        self.load.saturating_add(self.model).saturating_add(self.compute)
    }
}
