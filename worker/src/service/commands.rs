//! What the scheduler wants done, and what the lanes did.

use std::{sync::Arc, time::Instant};

use protocol::{AdapterId, limits};
use worker_core::{Command, Place, RunDispatch};

use super::Service;
use crate::{
    executor::{Job, Outcome},
    interrupt::Interrupt,
    models::LoadTask,
};

impl Service {
    /// Performs commands until there are none, then asks for the chunks that are due.
    pub(super) fn perform_commands(&mut self) {
        while let Some(command) = self.scheduler.poll_command() {
            self.perform(command);
        }
        let mut chunks = Vec::new();
        for fetches in [&mut self.fetches, &mut self.model_fetches] {
            chunks.extend(std::iter::from_fn(|| fetches.poll_request()));
        }
        for chunk in chunks {
            self.send_fetch(chunk);
        }
        self.announce_change();
    }

    fn perform(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Fetch(adapter) => {
                self.fetches.start(adapter.into(), limits::UPLOAD_BYTES_MAX, now);
            }
            Command::Prefetch(adapter) => {
                self.fetches.start_background(adapter.into(), limits::UPLOAD_BYTES_MAX, now);
            }
            Command::StopFetch(adapter) => self.stop_fetch(adapter),
            Command::ReadDisk(adapter) => match &self.cache {
                Some(cache) => cache.read(adapter),
                None => self.scheduler.handle_disk_lost(adapter),
            },
            Command::WriteDisk(adapter) => self.write_disk(adapter),
            // On a CPU main memory is the device.
            Command::Promote(_) | Command::Demote(_) => {}
            Command::Forget(adapter, Place::Memory) => {
                tracing::info!(adapter = adapter.short(), "adapter left memory");
                self.adapters.remove(&adapter);
            }
            Command::Forget(adapter, Place::Disk) => {
                if let Some(cache) = &self.cache {
                    cache.remove(adapter);
                }
            }
            Command::LoadModel(model) => {
                let served = self.catalogue.find(&model, None);
                let served = served.expect("the scheduler knows models of the catalogue");
                self.loader.give(LoadTask::Reload(Arc::clone(served)));
            }
            Command::UnloadModel(model) => {
                tracing::info!(%model, "model left memory");
                if let Some(weights) = self.catalogue.take(&model) {
                    self.loader.give(LoadTask::Free(weights));
                }
            }
            Command::Run(run) => self.run(run),
            Command::Interrupt(dispatch) => {
                if let Some(interrupt) = self.running.get(&dispatch) {
                    interrupt.set();
                }
            }
            Command::Fail(dispatch, failure) => {
                let id = self.work.remove(&dispatch).map(|item| item.id);
                self.send_failure(dispatch, id, failure);
                self.note_end(dispatch);
            }
        }
    }

    fn write_disk(&mut self, adapter: AdapterId) {
        let unsaved = self.unsaved.take_if(|(unsaved, _)| *unsaved == adapter);
        let written = match (&self.cache, unsaved) {
            (Some(cache), Some((_, blob))) => cache.write(adapter, blob).is_ok(),
            _ => false,
        };
        if !written {
            self.scheduler.handle_disk_lost(adapter);
        }
    }

    fn run(&mut self, run: RunDispatch) {
        let dispatch = run.dispatch;
        let item = self.work.get_mut(&dispatch).expect("what runs is wanted");
        let request = item.request.take().expect("a dispatch runs once");
        let (attempt, queued_ms, busy) = (item.attempt, item.queued_ms, item.busy);
        self.note_begin(dispatch, busy);
        let weights = self.catalogue.weights(&request.model);
        let model = Arc::clone(weights.expect("the model of what runs is in memory"));
        let tensors = |id: &AdapterId| {
            let patches = self.adapters.get(id).expect("an adapter on the device has tensors");
            (*id, Arc::clone(patches))
        };
        let adapters = run.sources.keys().map(tensors).collect();
        let interrupt = Interrupt::default();
        self.running.insert(dispatch, interrupt.clone());
        let job = Job { run, request, model, adapters, attempt, queued_ms, interrupt };
        self.executor.run(job);
    }

    pub(super) fn handle_outcome(&mut self, outcome: Outcome) {
        let Outcome { dispatch, result } = outcome;
        self.running.remove(&dispatch);
        self.note_end(dispatch);
        if self.scheduler.is_wanted(dispatch)
            && let Some(item) = self.work.remove(&dispatch)
        {
            match result {
                Ok(reply) => self.send_reply(dispatch, item.id, reply),
                Err(failure) => self.send_failure(dispatch, Some(item.id), failure),
            }
        }
        self.scheduler.handle_finished(dispatch, Instant::now());
    }
}
