//! Models that are to be served from now on: asked for by the broker, found or fetched, read, and
//! answered.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use protocol::{
    BlobDigest, Failure, ModelName, limits,
    reply::ModelInfo,
    request::ModelFile,
    worker::{Blob, Register, Registered},
};
use worker_core::{Arrived, Progress};

use super::Service;
use crate::{
    failure::WireError as _,
    model::{LoadedModel, ModelSpec},
    models::{Closed, FileEvent, FileTask, LoadTask, NoRegistration},
};

impl Service {
    pub(super) fn handle_register(&mut self, register: Register) {
        let ticket = register.ticket;
        let asked = if self.draining {
            Err(NoRegistration::Draining(register.name))
        } else {
            tracing::info!(model = %register.name, "asked to serve a model");
            self.registrations.ask(register)
        };
        match asked {
            Ok(files) => {
                for file in files {
                    self.files.give(FileTask::Find(file));
                }
            }
            Err(error) => self.send_registered(ticket, Err(error.to_failure())),
        }
    }

    /// A chunk of a model's file, for the disk.
    pub(super) fn handle_model_chunk(&mut self, blob: &Blob, chunk: &Bytes) {
        match self.model_fetches.handle_chunk(blob, chunk.len(), Instant::now()) {
            Ok(Arrived::Next) => self.files.give(FileTask::Append(blob.blob, chunk.clone())),
            Ok(Arrived::Ignored) => {}
            Err(bad) => self.model_file_failed(&ModelFile::Blob(blob.blob), &bad.to_failure()),
        }
    }

    pub(super) fn handle_file(&mut self, event: FileEvent) {
        let now = Instant::now();
        match event {
            FileEvent::Begun(blob) if self.registrations.need(&ModelFile::Blob(blob)) => {
                let wanted = self.catalogue.blobs().chain(self.registrations.blobs());
                self.files.give(FileTask::Keep(wanted.collect()));
                self.model_fetches.start(blob, limits::MODEL_BYTES_MAX, now);
            }
            // It was given up meanwhile, and that was told.
            FileEvent::Begun(_) => {}
            FileEvent::Stored(blob, bytes) => {
                if self.model_fetches.handle_stored(&blob, bytes, now) == Progress::Complete {
                    self.files.give(FileTask::Finish(blob));
                }
            }
            FileEvent::Found(file, path) => {
                if let ModelFile::Blob(blob) = &file {
                    // Whoever asked for it last may have made its fetch begin once more.
                    self.model_fetches.stop(blob, now);
                }
                self.registrations.found(&file, &path);
                self.read_next();
            }
            FileEvent::Failed(file, failure) => self.model_file_failed(&file, &failure),
        }
    }

    /// A file cannot be had: no model of it can be served.
    pub(super) fn model_file_failed(&mut self, file: &ModelFile, failure: &Failure) {
        for name in self.registrations.waiting_for(file) {
            self.end_registration(&name, &Err(failure.clone()));
        }
    }

    /// A model was read, or cannot be.
    pub(super) fn handle_read(
        &mut self,
        spec: ModelSpec,
        result: Result<Arc<LoadedModel>, Failure>,
    ) {
        let name = spec.name.clone();
        self.registrations.read_ended();
        let answer = result.and_then(|model| {
            let registered = self.catalogue.register(spec, &model, &mut self.scheduler);
            let answer = registered.cloned().map_err(|error| error.to_failure());
            // Whatever does not stay is freed beside the loop.
            self.loader.give(LoadTask::Free(model));
            answer
        });
        let is_served = answer.is_ok();
        self.end_registration(&name, &answer);
        if is_served {
            self.send_ready();
        }
        self.read_next();
    }

    /// Nothing that is asked for now will be served: the broker is to ask another worker.
    pub(super) fn refuse_registrations(&mut self) {
        for name in self.registrations.names() {
            let failure = NoRegistration::Draining(name.clone()).to_failure();
            self.end_registration(&name, &Err(failure));
        }
    }

    fn read_next(&mut self) {
        if let Some(spec) = self.registrations.next_to_read() {
            self.loader.give(LoadTask::Read(spec));
        }
    }

    fn end_registration(&mut self, name: &ModelName, answer: &Result<ModelInfo, Failure>) {
        match answer {
            Ok(model) => tracing::info!(model = %name, digest = model.digest.short(), "serving"),
            Err(failure) => tracing::warn!(model = %name, %failure, "model is not served"),
        }
        let Closed { tickets, unwanted } = self.registrations.close(name);
        for blob in unwanted {
            self.abandon(blob);
        }
        for ticket in tickets {
            self.send_registered(ticket, answer.clone());
        }
    }

    fn abandon(&mut self, blob: BlobDigest) {
        self.model_fetches.stop(&blob, Instant::now());
        self.files.give(FileTask::Abandon(blob));
    }

    fn send_registered(&self, ticket: u64, answer: Result<ModelInfo, Failure>) {
        let epoch = self.identity.epoch;
        let (model, failure) = match answer {
            Ok(model) => (Some(model), None),
            Err(failure) => (None, Some(failure)),
        };
        self.send(&Registered { epoch, ticket, model, failure }, Vec::new());
    }
}
