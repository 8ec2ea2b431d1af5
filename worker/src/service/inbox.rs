//! What the broker says, and what becomes of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::{
    Envelope, ErrorCode, ExecutionMode, Failure, Header as _, header,
    request::ModelFile,
    worker::{
        Announce, Blob, Busy, CancelWork, DrainWorker, Evict, NoBlob, Prefetch, Register, Released,
        Work,
    },
};
use transport::DealerEvent;
use worker_core::{DispatchId, Needs};

use super::{Service, WorkItem};
use crate::{failure::WireError as _, request::Request};

impl Service {
    pub(super) fn handle_dealer(&mut self, event: DealerEvent) {
        match event {
            DealerEvent::Connected => {
                tracing::info!("connected to the broker");
                self.drain.connected();
                self.send_ready();
                self.registrations.handle_reconnect();
                let now = Instant::now();
                self.fetches.handle_reconnect(now);
                self.model_fetches.handle_reconnect(now);
            }
            DealerEvent::Disconnected => {
                tracing::warn!("lost the broker, reconnecting");
                self.drain.disconnected();
            }
            DealerEvent::Message(message) => match Envelope::open(message.into_frames()) {
                Ok(envelope) => self.handle_broker(&envelope),
                Err(error) => tracing::warn!(%error, "the broker sent what is no message"),
            },
        }
    }

    fn handle_broker(&mut self, envelope: &Envelope) {
        let handled = match envelope.peek.kind.as_str() {
            Work::KIND => {
                envelope.read().map(|work| self.handle_work(&work, &envelope.attachments))
            }
            CancelWork::KIND => envelope.read().map(|CancelWork { dispatch }| {
                self.work.remove(&DispatchId(dispatch));
                self.scheduler.handle_cancel(DispatchId(dispatch), Instant::now());
                self.note_end(DispatchId(dispatch));
                self.send_alive(); // so that the broker knows the slot is free
            }),
            Blob::KIND => {
                envelope.read().map(|blob| self.handle_blob(&blob, &envelope.attachments))
            }
            NoBlob::KIND => envelope.read().map(|no_blob| self.handle_no_blob(no_blob)),
            Register::KIND => envelope.read().map(|register| self.handle_register(register)),
            Evict::KIND => {
                envelope.read().map(|Evict { adapters }| self.scheduler.handle_evict(&adapters))
            }
            Prefetch::KIND => envelope.read().map(|prefetch| self.handle_prefetch(prefetch)),
            DrainWorker::KIND => envelope.read().map(|order| self.handle_drain(order)),
            Released::KIND => envelope.read().map(|Released {}| self.drain.released()),
            Announce::KIND => envelope.read().map(|Announce {}| self.send_ready()),
            // Its arrival is what counts, and `transport` has noted that; newer kinds are no concern.
            _ => Ok(()),
        };
        if let Err(error) = handled {
            tracing::warn!(kind = envelope.peek.kind, %error, "the broker sent a bad message");
        }
    }

    /// Late answers to a question asked twice change nothing.
    fn handle_no_blob(&mut self, NoBlob { blob, reason }: NoBlob) {
        if self.fetches.is_wanted(&blob) {
            let failure = Failure::new(ErrorCode::UnknownLora, reason.clone());
            self.load_failed(blob.into(), &failure);
        }
        if self.model_fetches.is_wanted(&blob) {
            // The broker keeps what it has registered, so this is worth another try.
            let message = format!("the broker did not send model file {blob}: {reason}");
            let failure = Failure::new(ErrorCode::Overloaded, message);
            self.model_file_failed(&ModelFile::Blob(blob), &failure);
        }
    }

    fn handle_prefetch(&mut self, Prefetch { adapters }: Prefetch) {
        if !self.draining {
            self.scheduler.handle_prefetch(&adapters);
        }
    }

    fn handle_work(&mut self, work: &Work, attachments: &[Bytes]) {
        let now = Instant::now();
        let dispatch = DispatchId(work.dispatch);
        if self.scheduler.is_wanted(dispatch) || self.running.contains_key(&dispatch) {
            return; // the broker repeated itself; one answer is enough
        }
        let Some((client_header, attachments)) = attachments.split_first() else {
            tracing::warn!(dispatch = work.dispatch, "work without a request");
            return;
        };
        let busy = work.key.map(|key| Busy { key, alone: work.alone });
        self.note_begin(dispatch, busy);
        let id = header::peek(client_header).ok().and_then(|peek| peek.id);
        let decoded = Request::decode(client_header, attachments);
        let checked = decoded.and_then(|request| {
            let found = self.catalogue.find(&request.model, request.model_digest);
            found.map_err(|error| error.to_failure())?;
            Ok(request)
        });
        match checked {
            Ok(request) => {
                let needs = self.needs(&request);
                let is_loaded = self.has_loaded(&needs);
                let id = request.id.clone();
                let (attempt, queued_ms) = (work.attempt, work.queued_ms);
                let item = WorkItem { id, request: Some(request), attempt, queued_ms, busy };
                self.work.insert(dispatch, item);
                let deadline = now + Duration::from_millis(u64::from(work.budget_ms));
                self.scheduler.handle_work(dispatch, needs, deadline, now);
                if is_loaded {
                    self.note_end(dispatch); // until a lane begins with it
                }
            }
            Err(failure) => {
                self.send_failure(dispatch, id, failure);
                self.note_end(dispatch);
            }
        }
    }

    /// Whether a request needs nothing that has to be read, which may kill as well.
    fn has_loaded(&self, needs: &Needs) -> bool {
        self.catalogue.weights(&needs.model).is_some()
            && needs.adapters.iter().all(|adapter| self.adapters.contains_key(adapter))
    }

    fn needs(&self, request: &Request) -> Needs {
        let mode = match request.options.mode {
            None | Some(ExecutionMode::Auto) => self.identity.mode,
            Some(mode) => mode,
        };
        Needs {
            model: request.model.clone(),
            exclusive: mode == ExecutionMode::Locking,
            adapters: request.adapters(),
        }
    }
}
