//! What workers fetch from the blob store: bytes of adapters and of models' files.

use std::time::Instant;

use protocol::{
    AdapterId, Failure, frames, limits,
    worker::{Blob, Fetch, NoBlob},
};

use crate::{
    Broker,
    blob::{BlobName, BlobOp, BlobOutcome},
    command::Command,
    jobs::Purpose,
    peer::WorkerPeer,
};

impl Broker {
    /// A worker asks for bytes of a blob.
    pub(super) fn worker_fetch(&mut self, worker: WorkerPeer, fetch: &Fetch, now: Instant) {
        let Fetch { blob: digest, offset, length } = *fetch;
        let adapter = AdapterId::from(digest);
        let blob = if self.blobs.contains(&adapter) {
            self.blobs.touch(&adapter);
            BlobName::Adapter(adapter)
        } else if self.model_files.contains(&digest) {
            self.model_files.touch(&digest);
            BlobName::ModelFile(digest)
        } else {
            let neither = BlobName::ModelFile(digest);
            return self.no_blob(worker, neither, "the blob store does not hold it");
        };
        if self.jobs.fetches(worker) >= self.limits().fetches_per_worker_max {
            // A refusal would end the request for good; the worker asks again when none comes.
            return;
        }
        let max = u32::try_from(limits::UPLOAD_CHUNK_BYTES_MAX).unwrap_or(u32::MAX);
        let op = BlobOp::Read { blob, offset, length: length.min(max) };
        self.give_job(op, Purpose::Fetch { worker, blob, offset }, None, now);
    }

    /// The store answered a fetch.
    pub(super) fn fetched(
        &mut self,
        worker: WorkerPeer,
        (blob, offset): (BlobName, u64),
        result: Result<BlobOutcome, Failure>,
    ) {
        match result {
            Ok(BlobOutcome::Read { size, bytes }) => {
                let header = Blob { blob: blob.digest(), offset, size };
                let frames = frames::frames(&header, vec![bytes]);
                self.commands.push_back(Command::SendWorker { to: worker, frames });
            }
            Ok(_) => self.no_blob(worker, blob, "the blob store answered something else"),
            Err(failure) => self.no_blob(worker, blob, &failure.message),
        }
    }

    fn no_blob(&mut self, worker: WorkerPeer, blob: BlobName, reason: &str) {
        self.tell(worker, &NoBlob { blob: blob.digest(), reason: reason.to_owned() });
    }
}
