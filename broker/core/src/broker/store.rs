//! The blob store's side: what came of every command, and what has to go when it is full.

use std::time::Instant;

use protocol::{
    AdapterId, ErrorCode, Failure, UploadId, limits,
    reply::{KeyReport, UploadLoraReply},
};

use crate::{
    Broker,
    blob::{BlobEvent, BlobName, BlobOp, BlobOutcome, StoredBlob, StoredModelFile},
    command::Notice,
    jobs::{Job, Purpose},
    requests::ReplyTo,
};

impl Broker {
    /// Refuses what the blob store would have to be asked for, when too much waits for it.
    pub(super) fn check_store_room(&self) -> Result<(), Failure> {
        let waiting = self.jobs.of_clients();
        if waiting >= self.limits().store_waiting_max {
            let reason = format!("{waiting} commands wait for the blob store, which is the limit");
            return Err(self.overloaded(&reason));
        }
        Ok(())
    }

    pub(super) fn blob_event(&mut self, event: BlobEvent, now: Instant) {
        match event {
            BlobEvent::Found(blob) => {
                self.blobs.insert(blob);
                self.trim_store(now);
            }
            BlobEvent::FoundModelFile(file) => {
                self.model_files.insert(file);
                self.trim_model_files(self.limits().model_store_bytes_max, now);
            }
            BlobEvent::FoundPart(found) => self.part_found(&found, now),
            BlobEvent::FoundRegistration(registration) => self.registration_found(registration),
            BlobEvent::Done { ticket, result } => {
                if let Some(job) = self.jobs.finish(ticket) {
                    self.job_done(job, result, now);
                }
            }
            BlobEvent::Removed { blob, reason } => {
                match blob {
                    BlobName::Adapter(adapter) => drop(self.blobs.remove(&adapter)),
                    BlobName::ModelFile(digest) => drop(self.model_files.remove(&digest)),
                }
                self.notice(Notice::BlobDropped { blob, reason });
            }
            BlobEvent::Health { trouble } => {
                self.blob_trouble.clone_from(&trouble);
                self.notice(Notice::BlobStore { trouble });
            }
        }
        self.dispatch(now);
    }

    pub(super) fn give_job(
        &mut self,
        op: BlobOp,
        purpose: Purpose,
        reply_to: Option<ReplyTo>,
        now: Instant,
    ) {
        let give_up = now + self.limits().store_timeout;
        self.jobs.add(op, Job { purpose, reply_to, give_up });
    }

    /// Lets go of files of models that nothing needs, until at most `bytes_max` are left.
    pub(super) fn trim_model_files(&mut self, bytes_max: u64, now: Instant) {
        let fetched = self.jobs.fetched();
        let excess = self.model_files.excess(bytes_max, |blob| {
            self.registrations.need(blob) || fetched.contains(&BlobName::ModelFile(*blob))
        });
        let taken: Vec<_> =
            excess.iter().filter_map(|blob| self.model_files.remove(blob)).collect();
        if taken.is_empty() {
            return;
        }
        let blobs: Vec<_> = taken.iter().map(|file| BlobName::ModelFile(file.blob)).collect();
        for &blob in &blobs {
            let reason = "no registered model needs it and others need the room".to_owned();
            self.notice(Notice::BlobDropped { blob, reason });
        }
        self.give_job(BlobOp::Delete { blobs }, Purpose::DeleteModelFiles { taken }, None, now);
    }

    fn job_done(&mut self, job: Job, result: Result<BlobOutcome, Failure>, now: Instant) {
        let Job { purpose, reply_to, .. } = job;
        if let Some(upload) = purpose.upload()
            && result.is_err()
        {
            self.forget_failed(upload.clone(), &purpose, now);
        }
        match (purpose, result) {
            (Purpose::Fetch { worker, blob, offset }, result) => {
                self.fetched(worker, (blob, offset), result);
            }
            (Purpose::DeleteModelFiles { taken }, Err(_)) => {
                for file in taken {
                    self.model_files.insert(file);
                }
            }
            (Purpose::Remember, Err(failure)) => {
                self.notice(Notice::RegistrationsNotSaved { reason: failure.message });
            }
            (Purpose::DeleteModelFiles { taken }, Ok(_)) => {
                // As with adapters below.
                for file in &taken {
                    self.model_files.remove(&file.blob);
                }
            }
            (Purpose::Remember | Purpose::DropParts, Ok(_)) => {}
            (Purpose::Keep { part, .. }, Err(failure)) => {
                self.uploads.kept.remove(&part);
                self.fail_waiting(reply_to, failure);
            }
            (Purpose::Delete { taken, .. }, Err(failure)) => {
                for blob in taken {
                    self.blobs.insert(blob);
                }
                self.fail_waiting(reply_to, failure);
            }
            (_, Err(failure)) => self.fail_waiting(reply_to, failure),
            (Purpose::Commit { upload }, Ok(BlobOutcome::Committed { blob, report })) => {
                let adapter = blob.adapter;
                self.committed(&upload, blob, report, reply_to);
                self.trim_store(now);
                self.fan_out(adapter, now);
            }
            (Purpose::Commit { upload }, Ok(BlobOutcome::CommittedModelFile(file))) => {
                self.committed_model_file(&upload, file, reply_to);
            }
            (Purpose::Delete { reply, taken }, Ok(_)) => {
                // A commit that the store did before may have brought one of them back here.
                for blob in taken {
                    self.blobs.remove(&blob.adapter);
                }
                if let (Some(to), Some(reply)) = (reply_to, reply) {
                    self.reply(&to, &reply);
                }
            }
            (Purpose::Begin { upload }, Ok(BlobOutcome::Begun { received })) => {
                self.begun(upload, received, reply_to, now);
            }
            (Purpose::Append { upload, received, .. }, Ok(_)) => {
                self.proceeded(upload, received, reply_to);
            }
            (Purpose::Abort { received } | Purpose::Keep { received, .. }, Ok(_)) => {
                self.stepped(reply_to, None, received);
            }
            (Purpose::Begin { upload } | Purpose::Commit { upload }, Ok(_)) => {
                self.uploads.remove(&upload);
                let message = "the blob store answered with something else";
                self.fail_waiting(reply_to, Failure::new(ErrorCode::Internal, message));
            }
        }
    }

    /// An upload of which a step failed cannot go on; a failed commit has ended it in the store.
    fn forget_failed(&mut self, upload: UploadId, purpose: &Purpose, now: Instant) {
        let known = self.uploads.remove(&upload).is_some();
        if known && !matches!(purpose, Purpose::Commit { .. }) {
            self.drop_upload(upload, now);
        }
    }

    fn committed(
        &mut self,
        upload: &UploadId,
        blob: StoredBlob,
        report: KeyReport,
        reply_to: Option<ReplyTo>,
    ) {
        let received = self.uploads.remove(upload).map_or(0, |upload| upload.received);
        let adapter = Some(blob.adapter);
        self.blobs.insert(blob);
        if let Some(to) = reply_to {
            let reply = UploadLoraReply {
                adapter,
                report: Some(report),
                ..upload_reply(&to, None, received)
            };
            self.reply(&to, &reply);
        }
    }

    fn committed_model_file(
        &mut self,
        upload: &UploadId,
        file: StoredModelFile,
        reply_to: Option<ReplyTo>,
    ) {
        let received = self.uploads.remove(upload).map_or(0, |upload| upload.received);
        let held = BlobName::ModelFile(file.blob);
        self.model_files.insert(file);
        if let Some(to) = reply_to {
            self.reply(&to, &held.into_reply(&to, received));
        }
    }

    /// Lets go of adapters after one came. What came last stays, whatever its size.
    fn trim_store(&mut self, now: Instant) {
        let taken = self.uploads.announced(false).saturating_add(self.uploads.kept.bytes(false));
        let bytes_max = self.limits().store_bytes_max.saturating_sub(taken);
        self.trim_adapters(bytes_max, self.blobs.latest(), now);
    }

    /// Lets go of adapters, the least recently used first, until at most `bytes_max` are left. What
    /// a pending request needs stays, and so does what a worker fetches, and `kept`.
    pub(super) fn trim_adapters(&mut self, bytes_max: u64, kept: Option<AdapterId>, now: Instant) {
        if self.blobs.bytes() <= bytes_max {
            return;
        }
        let fetched = self.jobs.fetched();
        let excess = self.blobs.excess(bytes_max, |adapter| {
            kept == Some(*adapter)
                || fetched.contains(&BlobName::Adapter(*adapter))
                || self.tasks.need(adapter)
        });
        if excess.is_empty() {
            return;
        }
        let taken = excess.iter().filter_map(|adapter| self.blobs.remove(adapter)).collect();
        let blobs: Vec<_> = excess.into_iter().map(BlobName::Adapter).collect();
        let bytes_max = self.limits().store_bytes_max;
        for &blob in &blobs {
            let reason = format!("the store may hold {bytes_max} bytes and others were used later");
            self.notice(Notice::BlobDropped { blob, reason });
        }
        let purpose = Purpose::Delete { reply: None, taken };
        self.give_job(BlobOp::Delete { blobs }, purpose, None, now);
    }

    pub(super) fn stepped(
        &mut self,
        reply_to: Option<ReplyTo>,
        upload: Option<UploadId>,
        received: u64,
    ) {
        if let Some(to) = reply_to {
            let reply = upload_reply(&to, upload, received);
            self.reply(&to, &reply);
        }
    }

    fn fail_waiting(&mut self, reply_to: Option<ReplyTo>, failure: Failure) {
        if let Some(to) = reply_to {
            self.fail(&to, failure);
        }
    }
}

impl BlobName {
    /// The reply to a step of an upload after which the farm holds this.
    pub(super) fn into_reply(self, to: &ReplyTo, received: u64) -> UploadLoraReply {
        let reply = upload_reply(to, None, received);
        match self {
            Self::Adapter(adapter) => UploadLoraReply { adapter: Some(adapter), ..reply },
            Self::ModelFile(blob) => UploadLoraReply { blob: Some(blob), ..reply },
        }
    }
}

pub(super) fn upload_reply(
    to: &ReplyTo,
    upload: Option<UploadId>,
    received: u64,
) -> UploadLoraReply {
    UploadLoraReply {
        id: to.id.clone(),
        upload,
        received,
        chunk_bytes_max: u32::try_from(limits::UPLOAD_CHUNK_BYTES_MAX).unwrap_or(u32::MAX),
        credit_bytes: None,
        wait_ms: None,
        adapter: None,
        blob: None,
        report: None,
    }
}
