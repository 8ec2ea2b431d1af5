//! The blob store's side: the steps of an upload, and what came of every command.

use std::time::Instant;

use bytes::Bytes;
use protocol::{
    AdapterId, BlobDigest, Envelope, ErrorCode, Failure, UploadId, limits,
    reply::{KeyReport, UploadLoraReply},
    request::{UploadFormat, UploadLora, UploadOp},
};

use super::clients::read;
use crate::{
    Broker,
    blob::{BlobEvent, BlobName, BlobOp, BlobOutcome, StoredBlob, StoredModelFile},
    command::Notice,
    jobs::{Job, Purpose},
    requests::ReplyTo,
    uploads::{Upload, UploadRoom},
};

impl Broker {
    /// One step of an upload.
    pub(super) fn upload(
        &mut self,
        from: &ReplyTo,
        envelope: &Envelope,
        now: Instant,
    ) -> Result<(), Failure> {
        let UploadLora { op, .. } = read(envelope)?;
        self.check_store_room()?;
        match op {
            UploadOp::Begin { size, format, digest, label } => {
                let upload = Upload {
                    client: from.client,
                    size,
                    format,
                    digest,
                    label,
                    received: 0,
                    committing: false,
                    touched: now,
                };
                self.upload_begin(from, upload, now)
            }
            UploadOp::Chunk { upload, offset } => {
                let bytes = one_chunk(&envelope.attachments)?;
                self.upload_chunk(from, &upload, (offset, bytes), now)
            }
            UploadOp::Commit { upload } => self.upload_commit(from, upload, now),
            UploadOp::Abort { upload } => self.upload_abort(from, upload, now),
        }
    }

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

    /// Has the store forget an upload that nobody goes on with.
    pub(super) fn drop_upload(&mut self, upload: UploadId, now: Instant) {
        self.give_job(BlobOp::Abort { upload }, Purpose::Abort { received: 0 }, None, now);
    }

    /// Drops idle uploads, and answers clients that have waited too long for the store.
    pub(super) fn expire_uploads(&mut self, now: Instant) {
        for upload in self.uploads.remove_idle(self.limits().upload_idle, now) {
            self.drop_upload(upload, now);
        }
        for (to, upload) in self.jobs.given_up(now) {
            let timeout_ms = self.limits().store_timeout.as_millis();
            let message = format!("the blob store did not answer within {timeout_ms} ms");
            self.fail(&to, Failure::new(ErrorCode::DeadlineExceeded, message));
            if let Some(upload) = upload.filter(|upload| self.uploads.remove(upload).is_some()) {
                self.drop_upload(upload, now);
            }
        }
    }

    fn upload_begin(
        &mut self,
        from: &ReplyTo,
        upload: Upload,
        now: Instant,
    ) -> Result<(), Failure> {
        if let Some(held) = upload.digest.and_then(|digest| self.stored(upload.format, &digest)) {
            self.reply(from, &held.into_reply(from, upload.size));
            return Ok(());
        }
        self.check_begin(&upload)?;
        if upload.is_model_file() {
            self.make_model_room(upload.size, now)?;
        }
        let size = upload.size;
        let upload = self.uploads.begin(upload);
        let op = BlobOp::Begin { upload: upload.clone(), size };
        self.give_job(op, Purpose::Begin { upload }, Some(from.clone()), now);
        Ok(())
    }

    /// What is stored already and a file with this digest would become.
    fn stored(&mut self, format: UploadFormat, digest: &BlobDigest) -> Option<BlobName> {
        let made = self.blobs.made_from(digest);
        let itself = AdapterId::from(*digest);
        let adapter = match format {
            UploadFormat::Lora => made?,
            UploadFormat::Canonical => {
                Some(itself).filter(|id| self.blobs.contains(id)).or(made)?
            }
            UploadFormat::Model => {
                self.model_files.touch(digest);
                let held = self.model_files.contains(digest);
                return held.then_some(BlobName::ModelFile(*digest));
            }
        };
        self.blobs.touch(&adapter);
        Some(BlobName::Adapter(adapter))
    }

    fn check_begin(&self, upload: &Upload) -> Result<(), Failure> {
        if let Some(reason) = &self.draining {
            return Err(self.overloaded(&format!("the broker is draining: {reason}")));
        }
        if upload.size == 0 {
            return Err(Failure::new(ErrorCode::InvalidRequest, "`size` is 0: the file is empty"));
        }
        let limits = self.limits();
        let is_model_file = upload.is_model_file();
        let (size_max, open_max) = if is_model_file {
            (limits.model_bytes_max.min(limits.model_store_bytes_max), u64::MAX)
        } else {
            (limits.upload_bytes_max.min(limits.store_bytes_max), limits.upload_bytes_open_max)
        };
        too_large("the file", upload.size, size_max)?;
        let label = upload.label.as_ref().map_or(0, String::len);
        too_large("`label`", label as u64, limits::LABEL_BYTES_MAX as u64)?;
        let room = UploadRoom {
            per_client: limits.uploads_per_client_max,
            total: limits.uploads_max,
            bytes: open_max,
        };
        let admitted = self.uploads.admit(upload, room);
        admitted.map_err(|no_room| self.overloaded(&no_room.to_string()))
    }

    /// Makes room for a model's file: what is stored and announced never exceeds the budget. What
    /// a registered model is made of stays; of the rest, the least recently used goes first.
    fn make_model_room(&mut self, size: u64, now: Instant) -> Result<(), Failure> {
        let bytes_max = self.limits().model_store_bytes_max;
        let needed = self.model_files.pinned_bytes(|blob| self.registrations.need(blob));
        if needed.saturating_add(size) > bytes_max {
            let message = format!(
                "the file has {size} bytes, and registered models need {needed} of the {bytes_max} \
                 bytes that the farm keeps of models (`--model-store-mb`)"
            );
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        let announced = self.uploads.announced(true);
        let taken = needed.saturating_add(size).saturating_add(announced);
        if taken > bytes_max {
            let reason = format!("other uploads of models have announced {announced} bytes");
            return Err(self.overloaded(&reason));
        }
        self.trim_model_files(bytes_max - size - announced, now);
        Ok(())
    }

    /// Lets go of files of models that nothing needs, until at most `bytes_max` are left.
    fn trim_model_files(&mut self, bytes_max: u64, now: Instant) {
        let excess = self.model_files.excess(bytes_max, |blob| self.registrations.need(blob));
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

    fn upload_chunk(
        &mut self,
        from: &ReplyTo,
        id: &UploadId,
        (offset, bytes): (u64, Bytes),
        now: Instant,
    ) -> Result<(), Failure> {
        let pending_max = self.limits().upload_bytes_pending_max;
        if self.jobs.append_bytes() + bytes.len() > pending_max {
            return Err(self.overloaded("the disk is slower than the uploads"));
        }
        let upload = self.uploads.get_open(id, from.client)?;
        upload.take(offset, bytes.len() as u64, now)?;
        let purpose =
            Purpose::Append { upload: id.clone(), bytes: bytes.len(), received: upload.received };
        let op = BlobOp::Append { upload: id.clone(), bytes };
        self.give_job(op, purpose, Some(from.clone()), now);
        Ok(())
    }

    fn upload_commit(&mut self, from: &ReplyTo, id: UploadId, now: Instant) -> Result<(), Failure> {
        let upload = self.uploads.get_open(&id, from.client)?;
        upload.commit()?;
        let op = BlobOp::Commit {
            upload: id.clone(),
            format: upload.format,
            digest: upload.digest,
            label: upload.label.clone(),
        };
        let purpose = Purpose::Commit { upload: id };
        self.give_job(op, purpose, Some(from.clone()), now);
        Ok(())
    }

    fn upload_abort(&mut self, from: &ReplyTo, id: UploadId, now: Instant) -> Result<(), Failure> {
        let received = self.uploads.get_open(&id, from.client)?.received;
        self.uploads.remove(&id);
        let op = BlobOp::Abort { upload: id };
        self.give_job(op, Purpose::Abort { received }, Some(from.clone()), now);
        Ok(())
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
            (Purpose::Remember, Ok(_)) => {}
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
            (Purpose::Begin { upload }, Ok(_)) => self.stepped(reply_to, Some(upload), 0),
            (Purpose::Append { upload, received, .. }, Ok(_)) => {
                self.stepped(reply_to, Some(upload), received);
            }
            (Purpose::Abort { received }, Ok(_)) => self.stepped(reply_to, None, received),
            (Purpose::Commit { upload }, Ok(_)) => {
                self.uploads.remove(&upload);
                let message = "the blob store answered a commit with something else";
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

    /// Makes room in the store. What a pending request needs stays, and so does what came last.
    fn trim_store(&mut self, now: Instant) {
        let bytes_max = self.limits().store_bytes_max;
        let excess = self.blobs.excess(bytes_max, |adapter| self.tasks.need(adapter));
        if excess.is_empty() {
            return;
        }
        let taken = excess.iter().filter_map(|adapter| self.blobs.remove(adapter)).collect();
        let blobs: Vec<_> = excess.into_iter().map(BlobName::Adapter).collect();
        for &blob in &blobs {
            let reason = format!("the store may hold {bytes_max} bytes and others were used later");
            self.notice(Notice::BlobDropped { blob, reason });
        }
        let purpose = Purpose::Delete { reply: None, taken };
        self.give_job(BlobOp::Delete { blobs }, purpose, None, now);
    }

    fn stepped(&mut self, reply_to: Option<ReplyTo>, upload: Option<UploadId>, received: u64) {
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
    fn into_reply(self, to: &ReplyTo, received: u64) -> UploadLoraReply {
        let reply = upload_reply(to, None, received);
        match self {
            Self::Adapter(adapter) => UploadLoraReply { adapter: Some(adapter), ..reply },
            Self::ModelFile(blob) => UploadLoraReply { blob: Some(blob), ..reply },
        }
    }
}

fn upload_reply(to: &ReplyTo, upload: Option<UploadId>, received: u64) -> UploadLoraReply {
    UploadLoraReply {
        id: to.id.clone(),
        upload,
        received,
        chunk_bytes_max: u32::try_from(limits::UPLOAD_CHUNK_BYTES_MAX).unwrap_or(u32::MAX),
        adapter: None,
        blob: None,
        report: None,
    }
}

fn one_chunk(attachments: &[Bytes]) -> Result<Bytes, Failure> {
    let [bytes] = attachments else {
        let message =
            format!("the chunk has {} attachments: expected exactly one", attachments.len());
        return Err(Failure::new(ErrorCode::InvalidRequest, message));
    };
    if bytes.is_empty() {
        return Err(Failure::new(ErrorCode::InvalidRequest, "the chunk is empty"));
    }
    too_large("the chunk", bytes.len() as u64, limits::UPLOAD_CHUNK_BYTES_MAX as u64)?;
    Ok(bytes.clone())
}

fn too_large(what: &str, bytes: u64, max: u64) -> Result<(), Failure> {
    if bytes > max {
        let message = format!("{what} has {bytes} bytes: at most {max} are accepted");
        return Err(Failure::new(ErrorCode::TooLarge, message));
    }
    Ok(())
}
