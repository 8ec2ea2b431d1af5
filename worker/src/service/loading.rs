//! Adapters and models that arrive: from the broker, from disk, from the loader.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use protocol::{AdapterId, ErrorCode, Failure, ModelName, worker::Blob};
use worker_core::{BadChunk, Origin, Progress};

use super::Service;
use crate::{
    arrival::{Arrival, VerifiedAdapter, read_adapter},
    model::LoadedModel,
};

impl Service {
    /// A chunk of an adapter. The first one tells the size, and that may end the fetch.
    pub(super) fn handle_blob(&mut self, blob: &Blob, attachments: &[Bytes]) {
        let now = Instant::now();
        let adapter = AdapterId::from(blob.blob);
        let chunk = attachments.first().map_or(&[][..], |chunk| chunk);
        match self.fetches.handle_chunk(blob, chunk, now) {
            Ok(Progress::Partial) if blob.offset == 0 => {
                self.scheduler.handle_size(adapter, blob.size, now);
            }
            Ok(Progress::Complete(bytes)) => {
                self.scheduler.handle_size(adapter, blob.size, now);
                if self.scheduler.registry().is_coming(&adapter) {
                    self.verify(adapter, bytes);
                }
            }
            Ok(Progress::Partial | Progress::Ignored) => {}
            Err(bad) => {
                let code = match bad {
                    BadChunk::TooLarge { .. } => ErrorCode::TooLarge,
                    BadChunk::Size { .. } | BadChunk::Length { .. } => ErrorCode::Internal,
                };
                self.load_failed(adapter, &Failure::new(code, bad.to_string()));
            }
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
        }
    }

    fn handle_adapter(&mut self, adapter: AdapterId, origin: Origin, verified: VerifiedAdapter) {
        let now = Instant::now();
        let VerifiedAdapter { patches, blob } = verified;
        let bytes = blob.len() as u64;
        tracing::info!(adapter = adapter.short(), bytes, ?origin, "adapter loaded");
        // It may have come twice, once from each side.
        self.fetches.stop(&adapter.into(), now);
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
                self.catalog.keep(model);
                self.scheduler.handle_model_loaded(name, now);
            }
            Err(failure) => {
                tracing::error!(model = %name, %failure, "model could not be loaded");
                self.scheduler.handle_model_failed(name, &failure, now);
            }
        }
    }

    pub(super) fn load_failed(&mut self, adapter: AdapterId, failure: &Failure) {
        let now = Instant::now();
        tracing::warn!(adapter = adapter.short(), %failure, "adapter could not be loaded");
        self.fetches.stop(&adapter.into(), now);
        self.scheduler.handle_load_failed(adapter, failure, now);
    }
}
