//! What other threads bring to the loop: adapters and models, verified.

use std::panic::{AssertUnwindSafe, catch_unwind};

use adapter::PatchSet;
use protocol::{AdapterId, ErrorCode, Failure, ModelName};
use worker_core::Origin;

use crate::model::LoadedModel;

/// Something that was being brought here.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// An adapter whose digest was checked, or why there is none.
    Adapter { adapter: AdapterId, origin: Origin, result: Result<VerifiedAdapter, Failure> },
    /// The copy of an adapter on disk is gone, rotten, or could not be written.
    DiskLost(AdapterId),
    /// A model, or why it cannot be loaded.
    Model { name: ModelName, result: Result<LoadedModel, Failure> },
}

/// An adapter in the two forms that are needed of it.
#[derive(Debug)]
pub(crate) struct VerifiedAdapter {
    pub(crate) patches: PatchSet,
    /// Its canonical bytes.
    pub(crate) blob: Vec<u8>,
}

/// Checks digest and form of the adapter in `blob`. A defect here costs one adapter: without an
/// answer it would stay on its way for ever.
pub(crate) fn read_adapter(adapter: AdapterId, blob: Vec<u8>, origin: Origin) -> Arrival {
    let patches = catch_unwind(AssertUnwindSafe(|| verify(adapter, &blob))).unwrap_or_else(|_| {
        let message = format!("the worker met a defect while reading adapter {adapter}");
        Err(Failure::new(ErrorCode::Internal, message))
    });
    let result = patches.map(|patches| VerifiedAdapter { patches, blob });
    Arrival::Adapter { adapter, origin, result }
}

/// The adapter in `blob`, if it is the one of that name.
fn verify(adapter: AdapterId, blob: &[u8]) -> Result<PatchSet, Failure> {
    let found = AdapterId::of(blob);
    if found != adapter {
        let message = format!("the broker sent adapter {found} when asked for {adapter}");
        return Err(Failure::new(ErrorCode::Internal, message));
    }
    PatchSet::from_bytes(blob).map_err(|error| {
        Failure::new(ErrorCode::LoraRejected, format!("adapter {adapter}: {error}"))
    })
}
