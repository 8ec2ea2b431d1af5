//! Adapters and models that arrive: from the broker, from disk, from the loader.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use protocol::{AdapterId, Failure, ModelName, worker::Blob};
use worker_core::{Arrived, Origin, Progress};

use super::Service;
use crate::{
    arrival::{Arrival, VerifiedAdapter, read_adapter},
    failure::WireError as _,
    model::LoadedModel,
};

impl Service {
    /// A chunk of an adapter or of a model's file, or, if somebody uploaded one as the other, both.
    pub(super) fn handle_blob(&mut self, blob: &Blob, attachments: &[Bytes]) {
        let chunk = attachments.first().cloned().unwrap_or_default();
        self.handle_adapter_chunk(blob, &chunk);
        self.handle_model_chunk(blob, &chunk);
    }

    /// The first chunk tells the size, and that may end the fetch.
    fn handle_adapter_chunk(&mut self, blob: &Blob, chunk: &Bytes) {
        let now = Instant::now();
        let adapter = AdapterId::from(blob.blob);
        match self.fetches.handle_chunk(blob, chunk.len(), now) {
            Ok(Arrived::Next) => {}
            Ok(Arrived::Ignored) => return,
            Err(bad) => return self.load_failed(adapter, &bad.to_failure()),
        }
        let partial = self.partial.entry(adapter).or_default();
        partial.extend_from_slice(chunk);
        let stored = partial.len() as u64;
        let progress = self.fetches.handle_stored(&blob.blob, stored, now);
        if blob.offset == 0 || progress == Progress::Complete {
            self.scheduler.handle_size(adapter, blob.size, now);
        }
        if progress == Progress::Complete
            && let Some(bytes) = self.partial.remove(&adapter)
            && self.scheduler.awaits(&adapter)
        {
            self.verify(adapter, bytes);
        }
    }

    /// Checks digest and form of a fetched adapter beside the loop.
    fn verify(&self, adapter: AdapterId, blob: Vec<u8>) {
        let arrived = self.arrived.clone();
        tokio::task::spawn_blocking(move || {
            // The loop may have ended; then nobody wants the adapter.
            let _ = arrived.send(read_adapter(adapter, blob, Origin::Broker));
        });
    }

    pub(super) fn handle_arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Adapter { adapter, origin, result: Ok(verified) } => {
                self.handle_adapter(adapter, origin, verified);
            }
            Arrival::Adapter { adapter, result: Err(failure), .. } => {
                self.load_failed(adapter, &failure);
            }
            Arrival::DiskLost(adapter) => self.scheduler.handle_disk_lost(adapter),
            Arrival::Model { name, result } => self.handle_model(&name, result),
            Arrival::Read { spec, result } => self.handle_read(spec, result),
            Arrival::File(event) => self.handle_file(event),
        }
    }

    fn handle_adapter(&mut self, adapter: AdapterId, origin: Origin, verified: VerifiedAdapter) {
        let now = Instant::now();
        let VerifiedAdapter { patches, blob } = verified;
        let bytes = blob.len() as u64;
        tracing::info!(adapter = adapter.short(), bytes, ?origin, "adapter loaded");
        // It may have come twice, once from each side.
        self.stop_fetch(adapter);
        self.adapters.insert(adapter, Arc::new(patches));
        if self.cache.is_some() && origin == Origin::Broker {
            self.unsaved = Some((adapter, blob));
        }
        self.scheduler.handle_loaded(adapter, bytes, origin, now);
        self.perform_commands();
        self.unsaved = None;
    }

    fn handle_model(&mut self, name: &ModelName, result: Result<LoadedModel, Failure>) {
        let now = Instant::now();
        match result {
            Ok(model) => {
                self.catalogue.keep(model);
                self.scheduler.handle_model_loaded(name, now);
            }
            Err(failure) => {
                tracing::error!(model = %name, %failure, "model could not be loaded");
                self.scheduler.handle_model_failed(name, &failure, now);
            }
        }
    }

    /// Fetches no further bytes of an adapter, and drops those that came.
    pub(super) fn stop_fetch(&mut self, adapter: AdapterId) {
        self.fetches.stop(&adapter.into(), Instant::now());
        self.partial.remove(&adapter);
    }

    pub(super) fn load_failed(&mut self, adapter: AdapterId, failure: &Failure) {
        let now = Instant::now();
        tracing::warn!(adapter = adapter.short(), %failure, "adapter could not be loaded");
        self.stop_fetch(adapter);
        self.scheduler.handle_load_failed(adapter, failure, now);
    }
}
