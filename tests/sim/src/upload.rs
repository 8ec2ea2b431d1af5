//! One upload of a client: begin, chunks, commit, and over again when a step fails.

use client_core::{Ask, Start};
use protocol::{
    AdapterId, BlobDigest, RequestId, UploadId, header, limits,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadLora, UploadOp},
};

use crate::{catalog::Catalog, time::Span};

/// An upload under way.
#[derive(Debug)]
pub(crate) struct Upload {
    /// Its place in the catalog.
    pub(crate) adapter: usize,
    /// The step that is to be answered.
    step: RequestId,
    opened: Option<UploadId>,
    is_committing: bool,
}

/// What follows an answer.
#[derive(Debug)]
pub(crate) enum Step {
    /// Ask for the next step.
    Ask(UploadOp),
    /// Begin again after a while.
    Again,
    /// The farm holds this adapter.
    Done(AdapterId),
}

impl Upload {
    /// Begins to upload an adapter.
    pub(crate) fn begin(adapter: usize, id: RequestId) -> (Self, Start) {
        let content = &Catalog::get().adapters[adapter];
        let mut upload = Self { adapter, step: id.clone(), opened: None, is_committing: false };
        let op = UploadOp::Begin {
            size: content.bytes.len() as u64,
            format: UploadFormat::Canonical,
            digest: Some(BlobDigest::from_bytes(*content.id.as_bytes())),
            label: None,
        };
        let start = upload.ask(op, id);
        (upload, start)
    }

    /// Whether this step is under way.
    pub(crate) fn awaits(&self, id: &RequestId) -> bool {
        self.step == *id
    }

    /// The request of one step.
    pub(crate) fn ask(&mut self, op: UploadOp, id: RequestId) -> Start {
        self.step = id.clone();
        self.is_committing = matches!(op, UploadOp::Commit { .. });
        let content = &Catalog::get().adapters[self.adapter].bytes;
        let attachments = match &op {
            UploadOp::Chunk { offset, .. } => {
                let first = usize::try_from(*offset).expect("a length in memory");
                let last = content.len().min(first + limits::UPLOAD_CHUNK_BYTES_MAX);
                vec![content.slice(first..last)]
            }
            UploadOp::Begin { .. } | UploadOp::Commit { .. } | UploadOp::Abort { .. } => Vec::new(),
        };
        let header = header::write(&UploadLora { id: id.clone(), op });
        let ask = Ask::Plain(header.into(), attachments);
        Start { id, ask, timeout: Span::from_secs(5).duration() }
    }

    /// Takes in the answer to a step; none if it failed.
    pub(crate) fn next(&mut self, reply: Option<UploadLoraReply>) -> Step {
        let Some(reply) = reply else { return Step::Again };
        if let Some(adapter) = reply.adapter {
            return Step::Done(adapter);
        }
        if reply.upload.is_some() {
            self.opened = reply.upload;
        }
        let Some(upload) = self.opened.clone() else { return Step::Again };
        if self.is_committing {
            return Step::Again;
        }
        let size = Catalog::get().adapters[self.adapter].bytes.len() as u64;
        if reply.received < size {
            Step::Ask(UploadOp::Chunk { upload, offset: reply.received })
        } else {
            Step::Ask(UploadOp::Commit { upload })
        }
    }
}
