//! The steps of an upload: what a client announces, sends, commits and leaves behind.

use std::time::Instant;

use bytes::Bytes;
use protocol::{
    AdapterId, BlobDigest, Envelope, ErrorCode, Failure, UploadId, limits,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadLora, UploadOp},
};

use super::{clients::read, millis, store::upload_reply};
use crate::{
    Broker,
    blob::{BlobName, BlobOp, KeptPart, PartName},
    jobs::Purpose,
    peer::ClientPeer,
    requests::ReplyTo,
    uploads::{Left, StepError, Upload, UploadRoom, UploadState},
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
                    client: Some(from.client),
                    size,
                    format,
                    digest,
                    label,
                    received: 0,
                    granted: 0,
                    state: UploadState::Opening,
                    touched: now,
                };
                self.upload_begin(from, upload, now)
            }
            UploadOp::Chunk { upload, offset } => {
                let bytes = one_chunk(&envelope.attachments)?;
                self.upload_chunk(from, &upload, (offset, bytes), now)
            }
            UploadOp::Commit { upload } => self.upload_commit(from, upload, now),
            UploadOp::Abort { upload, keep } => self.upload_abort(from, upload, keep, now),
        }
    }

    /// A client left: what came of its uploads is kept for whoever announces the same files.
    pub(super) fn leave_uploads(&mut self, client: ClientPeer, now: Instant) {
        for (upload, left) in self.uploads.remove_client(client) {
            self.leave_upload(upload, left, None, now);
        }
    }

    /// Drops idle uploads and parts, and answers clients that have waited too long for the store.
    pub(super) fn expire_uploads(&mut self, now: Instant) {
        for (upload, left) in self.uploads.remove_idle(self.limits().upload_idle, now) {
            self.leave_upload(upload, left, None, now);
        }
        let expired = self.uploads.kept.remove_expired(now);
        self.drop_parts(expired, now);
        for (to, upload) in self.jobs.given_up(now) {
            let timeout_ms = self.limits().store_timeout.as_millis();
            let message = format!("the blob store did not answer within {timeout_ms} ms");
            self.fail(&to, Failure::new(ErrorCode::DeadlineExceeded, message));
            if let Some(upload) = upload.filter(|upload| self.uploads.remove(upload).is_some()) {
                self.drop_upload(upload, now);
            }
        }
    }

    /// Has the store forget an upload and what came of it.
    pub(super) fn drop_upload(&mut self, upload: UploadId, now: Instant) {
        self.give_job(BlobOp::Abort { upload }, Purpose::Abort { received: 0 }, None, now);
    }

    /// The store found a part on start.
    pub(super) fn part_found(&mut self, found: &KeptPart, now: Instant) {
        let KeptPart { part, bytes, idle } = *found;
        let expires = now + self.limits().upload_kept.saturating_sub(idle);
        self.uploads.kept.insert(part, bytes, expires);
        self.trim_parts(now);
    }

    /// The store has opened the file of an upload.
    pub(super) fn begun(
        &mut self,
        upload: UploadId,
        received: u64,
        reply_to: Option<ReplyTo>,
        now: Instant,
    ) {
        if self.uploads.opened(&upload, received, now) {
            return self.proceeded(upload, received, reply_to);
        }
        // The client left in the meantime.
        let left = self.uploads.remove(&upload).map_or(Left::Nothing, |upload| upload.left());
        self.leave_upload(upload, left, None, now);
    }

    /// The store has this much of an upload, whose client may send more.
    pub(super) fn proceeded(&mut self, upload: UploadId, received: u64, reply_to: Option<ReplyTo>) {
        let pending = self.jobs.append_bytes() as u64;
        let pending_max = self.limits().upload_bytes_pending_max as u64;
        let credit = self.uploads.grant(&upload, received, (pending, pending_max));
        if let Some(to) = reply_to {
            let reply = upload_reply(&to, Some(upload), received);
            self.reply(&to, &UploadLoraReply { credit_bytes: Some(credit), ..reply });
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
        let part = upload.part();
        if let Some(received) = part.and_then(|part| self.sent_by_another(&part, now)) {
            let wait_ms = Some(millis(self.limits().upload_wait));
            self.reply(from, &UploadLoraReply { wait_ms, ..upload_reply(from, None, received) });
            return Ok(());
        }
        self.check_begin(&upload)?;
        // What was kept of it counts as announced from here on.
        let kept = part.and_then(|part| Some((part, self.uploads.kept.remove(&part)?)));
        if let Err(failure) = self.make_room(&upload, now) {
            if let Some((part, (bytes, expires))) = kept {
                self.uploads.kept.insert(part, bytes, expires);
            }
            return Err(failure);
        }
        let size = upload.size;
        let upload = self.uploads.begin(upload);
        let op = BlobOp::Begin { upload: upload.clone(), size, part };
        self.give_job(op, Purpose::Begin { upload }, Some(from.clone()), now);
        Ok(())
    }

    /// How much of this file came from a client that is sending it now. One that has been silent
    /// for long, on a connection that may be dead, gives way.
    fn sent_by_another(&mut self, part: &PartName, now: Instant) -> Option<u64> {
        let (id, upload) = self.uploads.of_part(part)?;
        let is_silent = upload.state == UploadState::Open
            && upload.touched + self.limits().upload_silence <= now;
        if !is_silent {
            return Some(upload.received);
        }
        let (id, left) = (id.clone(), upload.left());
        self.uploads.remove(&id);
        self.leave_upload(id, left, None, now);
        None
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
        if self.jobs.append_bytes() >= limits.upload_bytes_pending_max {
            return Err(self.overloaded("the disk is slower than the uploads"));
        }
        let (size_max, store_max, setting, open_max) = if upload.is_model_file() {
            let (size, store) = (limits.model_bytes_max, limits.model_store_bytes_max);
            (size, store, "broker.model_store_mb", u64::MAX)
        } else {
            let (size, store) = (limits.upload_bytes_max, limits.store_bytes_max);
            (size, store, "broker.store_mb_max", limits.upload_bytes_open_max)
        };
        too_large("the file", upload.size, size_max)?;
        if upload.size > store_max {
            let message = format!(
                "the file has {} bytes and the farm keeps at most {store_max} of all such files: \
                 raise `{setting}` of the broker",
                upload.size
            );
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
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

    /// Makes room for an upload: what is stored, kept and announced never exceeds the budget.
    fn make_room(&mut self, upload: &Upload, now: Instant) -> Result<(), Failure> {
        let is_model_file = upload.is_model_file();
        let announced = self.uploads.announced(is_model_file);
        if is_model_file {
            return self.make_model_room(upload.size, announced, now);
        }
        let bytes_max = self.limits().store_bytes_max;
        let Some(rest) = bytes_max.checked_sub(upload.size.saturating_add(announced)) else {
            let reason = format!("other uploads have announced {announced} bytes");
            return Err(self.overloaded(&reason));
        };
        let parts = self.uploads.kept.remove_excess(false, rest.saturating_sub(self.blobs.bytes()));
        self.drop_parts(parts, now);
        self.trim_adapters(rest - self.uploads.kept.bytes(false).min(rest), None, now);
        let stored = self.blobs.bytes().saturating_add(self.uploads.kept.bytes(false));
        if stored > rest {
            let reason = format!("{stored} of {bytes_max} bytes in the store are in use now");
            return Err(self.overloaded(&reason));
        }
        Ok(())
    }

    /// What a registered model is made of stays; of the rest, the least recently used goes first.
    fn make_model_room(&mut self, size: u64, announced: u64, now: Instant) -> Result<(), Failure> {
        let bytes_max = self.limits().model_store_bytes_max;
        let needed = self.model_files.pinned_bytes(|blob| self.registrations.need(blob));
        if needed.saturating_add(size) > bytes_max {
            let message = format!(
                "the file has {size} bytes, and registered models need {needed} of the {bytes_max} \
                 bytes that the farm keeps of models (`--model-store-mb`)"
            );
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        let taken = needed.saturating_add(size).saturating_add(announced);
        if taken > bytes_max {
            let reason = format!("other uploads of models have announced {announced} bytes");
            return Err(self.overloaded(&reason));
        }
        let rest = bytes_max - size - announced;
        let stored = self.model_files.bytes();
        let parts = self.uploads.kept.remove_excess(true, rest.saturating_sub(stored));
        self.drop_parts(parts, now);
        self.trim_model_files(rest - self.uploads.kept.bytes(true).min(rest), now);
        if self.model_files.bytes() > rest {
            return Err(self.overloaded("workers are fetching the files that would have to go"));
        }
        Ok(())
    }

    fn upload_chunk(
        &mut self,
        from: &ReplyTo,
        id: &UploadId,
        (offset, bytes): (u64, Bytes),
        now: Instant,
    ) -> Result<(), Failure> {
        let taken = self.uploads.get_open(id, from.client).and_then(|upload| {
            upload.take(offset, bytes.len() as u64, now)?;
            Ok(upload.received)
        });
        let received = taken.map_err(|error| self.step_refused(&error))?;
        let purpose = Purpose::Append { upload: id.clone(), bytes: bytes.len(), received };
        let op = BlobOp::Append { upload: id.clone(), bytes };
        self.give_job(op, purpose, Some(from.clone()), now);
        Ok(())
    }

    fn upload_commit(&mut self, from: &ReplyTo, id: UploadId, now: Instant) -> Result<(), Failure> {
        let ready = self.uploads.get_open(&id, from.client).and_then(|upload| {
            upload.commit()?;
            Ok((upload.format, upload.digest, upload.label.clone()))
        });
        let (format, digest, label) = ready.map_err(|error| self.step_refused(&error))?;
        let op = BlobOp::Commit { upload: id.clone(), format, digest, label };
        let purpose = Purpose::Commit { upload: id };
        self.give_job(op, purpose, Some(from.clone()), now);
        Ok(())
    }

    fn upload_abort(
        &mut self,
        from: &ReplyTo,
        id: UploadId,
        keep: bool,
        now: Instant,
    ) -> Result<(), Failure> {
        let open = self.uploads.get_open(&id, from.client);
        let (received, left) = match open.map(|upload| (upload.received, upload.left())) {
            Ok(open) => open,
            Err(error) => return Err(self.step_refused(&error)),
        };
        self.uploads.remove(&id);
        if keep && left != Left::Nothing {
            self.leave_upload(id, left, Some(from.clone()), now);
            return Ok(());
        }
        let op = BlobOp::Abort { upload: id };
        self.give_job(op, Purpose::Abort { received }, Some(from.clone()), now);
        Ok(())
    }

    /// Has the store keep what came of an upload that is no longer open, or forget it.
    fn leave_upload(
        &mut self,
        upload: UploadId,
        left: Left,
        reply_to: Option<ReplyTo>,
        now: Instant,
    ) {
        let Left::Part(part, bytes) = left else { return self.drop_upload(upload, now) };
        let expires = now + self.limits().upload_kept;
        self.uploads.kept.insert(part, bytes, expires);
        let purpose = Purpose::Keep { part, received: bytes };
        self.give_job(BlobOp::Keep { upload }, purpose, reply_to, now);
        self.trim_parts(now);
    }

    /// Lets go of the parts over the limits that would be gone first anyway.
    fn trim_parts(&mut self, now: Instant) {
        let limits = self.limits();
        let (parts_max, adapters_max, models_max) =
            (limits.parts_max, limits.store_bytes_max, limits.model_store_bytes_max);
        let mut dropped = self.uploads.kept.remove_beyond(parts_max);
        for (is_model, bytes_max, stored) in [
            (false, adapters_max, self.blobs.bytes()),
            (true, models_max, self.model_files.bytes()),
        ] {
            let taken = stored.saturating_add(self.uploads.announced(is_model));
            let rest = bytes_max.saturating_sub(taken);
            dropped.extend(self.uploads.kept.remove_excess(is_model, rest));
        }
        self.drop_parts(dropped, now);
    }

    fn drop_parts(&mut self, parts: Vec<PartName>, now: Instant) {
        if !parts.is_empty() {
            self.give_job(BlobOp::DropParts { parts }, Purpose::DropParts, None, now);
        }
    }

    /// Only a client that is ahead of its credit may try the same step again.
    fn step_refused(&self, error: &StepError) -> Failure {
        match error {
            StepError::BeyondCredit { .. } => self.overloaded(&error.to_string()),
            StepError::NotOpen(_)
            | StepError::Committing(_)
            | StepError::Offset { .. }
            | StepError::BeyondEnd { .. }
            | StepError::Truncated { .. } => {
                Failure::new(ErrorCode::InvalidRequest, error.to_string())
            }
        }
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
