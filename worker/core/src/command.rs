//! What the scheduler tells the shell to do.

use std::{collections::BTreeMap, time::Instant};

use protocol::{AdapterId, AdapterSource, Failure, ModelName};

/// The broker's number for one request given to this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DispatchId(pub u64);

/// What the shell has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Fetch an adapter from the broker and report with `handle_size`, then `handle_loaded` or
    /// `handle_load_failed`.
    Fetch(AdapterId),
    /// Fetch an adapter that nobody waits for yet, when nothing else is to be fetched, and report in
    /// the same way. One at a time; [`Command::Fetch`] makes it urgent.
    Prefetch(AdapterId),
    /// Nobody waits for this adapter any more: fetch no further bytes of it. What is complete
    /// already may still be reported.
    StopFetch(AdapterId),
    /// Read an adapter from the cache on disk and report with `handle_loaded`,
    /// `handle_load_failed` or `handle_disk_lost`.
    ReadDisk(AdapterId),
    /// Store the adapter that was just reported as loaded in the cache on disk; report with
    /// `handle_disk_lost` when that fails.
    WriteDisk(AdapterId),
    /// Move an adapter from main memory to the device. Where they are one, there is nothing to do.
    Promote(AdapterId),
    /// Move an adapter from the device to main memory. Where they are one, there is nothing to do.
    Demote(AdapterId),
    /// Let go of a copy of an adapter.
    Forget(AdapterId, Place),
    /// Load a model and report with `handle_model_loaded` or `handle_model_failed`.
    LoadModel(ModelName),
    /// Let go of a model's weights.
    UnloadModel(ModelName),
    /// Give a dispatch to a lane and report with `handle_finished`.
    Run(RunDispatch),
    /// Nobody wants the answer of this running dispatch any more; it is to report all the same.
    Interrupt(DispatchId),
    /// Answer a dispatch with a failure.
    Fail(DispatchId, Failure),
}

/// Which copy of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The one on the device or in main memory.
    Memory,
    /// The one in the cache on disk.
    Disk,
}

/// A dispatch that is ready for a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDispatch {
    /// The dispatch.
    pub dispatch: DispatchId,
    /// The adapters it needs and where they were when it was let in.
    pub sources: BTreeMap<AdapterId, AdapterSource>,
    /// When it arrived.
    pub arrived: Instant,
    /// When its last adapter and its model were there.
    pub loaded: Instant,
}
