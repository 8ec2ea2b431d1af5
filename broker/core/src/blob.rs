//! The blob store as the core sees it: commands out, one event back for each.

use bytes::Bytes;
use protocol::{AdapterId, BlobDigest, Failure, UploadId, reply::KeyReport, request::UploadFormat};

/// Names one command to the blob store in the event that answers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

/// One thing for the blob store to do. Commands are done in the order in which they are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobCommand {
    /// Comes back in [`BlobEvent::Done`].
    pub ticket: Ticket,
    /// What to do.
    pub op: BlobOp,
}

/// What the blob store can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobOp {
    /// Open a temporary file for an upload.
    Begin {
        /// The upload.
        upload: UploadId,
        /// Bytes that will come.
        size: u64,
    },
    /// Write at the end of an upload's file.
    Append {
        /// The upload.
        upload: UploadId,
        /// What to write.
        bytes: Bytes,
    },
    /// Verify an upload, make it canonical and keep it. The upload is gone afterwards.
    Commit {
        /// The upload.
        upload: UploadId,
        /// What the bytes are.
        format: UploadFormat,
        /// What they must hash to.
        digest: Option<BlobDigest>,
        /// What people call the adapter.
        label: Option<String>,
    },
    /// Drop an upload.
    Abort {
        /// The upload.
        upload: UploadId,
    },
    /// Read a part of an adapter's canonical bytes.
    Read {
        /// The adapter.
        adapter: AdapterId,
        /// The first byte.
        offset: u64,
        /// At most so many bytes.
        length: u32,
    },
    /// Forget adapters.
    Delete {
        /// The adapters.
        adapters: Vec<AdapterId>,
    },
}

/// What happened in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobEvent {
    /// An adapter was found on start; they come least recently used first.
    Found(StoredBlob),
    /// A command is done or has failed.
    Done {
        /// The command's ticket.
        ticket: Ticket,
        /// What came of it.
        result: Result<BlobOutcome, Failure>,
    },
    /// An adapter is no longer there, for example because its bytes rotted.
    Removed {
        /// The adapter.
        adapter: AdapterId,
        /// Why.
        reason: String,
    },
    /// The store cannot work, or works again.
    Health {
        /// What is wrong, when something is.
        trouble: Option<String>,
    },
}

/// What came of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobOutcome {
    /// `Begin`, `Append`, `Abort` or `Delete` was done.
    Done,
    /// `Commit` made an adapter.
    Committed {
        /// The adapter as it is stored now.
        blob: StoredBlob,
        /// What was found in the file.
        report: KeyReport,
    },
    /// `Read` got bytes.
    Read {
        /// Bytes of the whole adapter.
        size: u64,
        /// The bytes asked for; fewer at the end.
        bytes: Bytes,
    },
}

/// An adapter in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlob {
    /// The adapter.
    pub adapter: AdapterId,
    /// Bytes of its canonical form.
    pub bytes: u64,
    /// What people call it.
    pub label: Option<String>,
    /// Digests of the files that it was made from.
    pub raw: Vec<BlobDigest>,
}
