//! Adapters that arrive at a worker, from the broker and from its disk.

use std::time::Instant;

use bytes::Bytes;
use protocol::{AdapterId, ErrorCode, Failure, worker::Blob};
use worker_core::{Arrived, Origin, Progress};

use super::Running;
use crate::{env::Env, event::Inside, time::Span};

impl Running {
    pub(super) fn blob(&mut self, blob: &Blob, chunk: &[u8], env: &mut Env) {
        let now = self.clock.show(env.now);
        let adapter = AdapterId::from(blob.blob);
        match self.fetches.handle_chunk(blob, chunk.len(), now) {
            Ok(Arrived::Next) => {}
            Ok(Arrived::Ignored) => return,
            Err(bad) => {
                let failure = Failure::new(ErrorCode::Internal, bad.to_string());
                return self.load_failed(adapter, &failure, now);
            }
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
            let after = env.random.log_span(Span::from_micros(50), Span::from_millis(5));
            env.later(after, self.owner, Inside::Verified(bytes.into()));
        }
    }

    /// An adapter has arrived, and its digest says which one it is.
    pub(super) fn loaded(&mut self, bytes: Bytes, origin: Origin, env: &Env) {
        let now = self.clock.show(env.now);
        let (adapter, length) = (AdapterId::of(&bytes), bytes.len() as u64);
        self.stop_fetch(adapter, now);
        self.tensors.insert(adapter, adapter);
        self.unsaved = (origin == Origin::Broker).then_some((adapter, bytes));
        self.scheduler.handle_loaded(adapter, length, origin, now);
    }

    pub(super) fn stop_fetch(&mut self, adapter: AdapterId, now: Instant) {
        self.fetches.stop(&adapter.into(), now);
        self.partial.remove(&adapter);
    }

    pub(super) fn load_failed(&mut self, adapter: AdapterId, failure: &Failure, now: Instant) {
        self.stop_fetch(adapter, now);
        self.scheduler.handle_load_failed(adapter, failure, now);
    }
}
