//! The blob store as the core sees it: commands out, one event back for each.

use std::{fmt, time::Duration};

use bytes::Bytes;
use protocol::{AdapterId, BlobDigest, Failure, UploadId, reply::KeyReport, request::UploadFormat};

use crate::registrations::Registration;

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

/// Names one thing that the store holds. Adapters and files of models have budgets of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BlobName {
    /// An adapter's canonical bytes.
    Adapter(AdapterId),
    /// A file of a model, as it was uploaded.
    ModelFile(BlobDigest),
}

impl BlobName {
    /// The digest of the bytes.
    pub fn digest(self) -> BlobDigest {
        match self {
            Self::Adapter(adapter) => adapter.into(),
            Self::ModelFile(blob) => blob,
        }
    }
}

impl fmt::Display for BlobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adapter(adapter) => write!(f, "adapter `{adapter}`"),
            Self::ModelFile(blob) => write!(f, "model file `{blob}`"),
        }
    }
}

/// Names what came of a file whose upload is not finished: a client that announces the same file
/// goes on with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PartName {
    /// What the file is.
    pub format: UploadFormat,
    /// Its digest, as it was announced.
    pub digest: BlobDigest,
    /// Bytes of the whole file.
    pub size: u64,
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part of the file `{}`", self.digest)
    }
}

/// What the blob store can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobOp {
    /// Open a temporary file for an upload, or the one in which the part of that name was kept.
    Begin {
        /// The upload.
        upload: UploadId,
        /// Bytes that the whole file has.
        size: u64,
        /// What may have been kept of the file; nothing when its digest was not announced.
        part: Option<PartName>,
    },
    /// Write at the end of an upload's file.
    Append {
        /// The upload.
        upload: UploadId,
        /// What to write.
        bytes: Bytes,
    },
    /// Verify an upload and keep it: as an adapter in canonical form, or as a model's file as it
    /// is. The upload is gone afterwards.
    Commit {
        /// The upload.
        upload: UploadId,
        /// What the bytes are.
        format: UploadFormat,
        /// What they must hash to.
        digest: Option<BlobDigest>,
        /// What people call it.
        label: Option<String>,
    },
    /// Drop an upload.
    Abort {
        /// The upload.
        upload: UploadId,
    },
    /// Close an upload and keep what came, also over the end of this process.
    Keep {
        /// The upload.
        upload: UploadId,
    },
    /// Drop parts that were kept.
    DropParts {
        /// What to drop.
        parts: Vec<PartName>,
    },
    /// Read a part of what the store holds.
    Read {
        /// What to read.
        blob: BlobName,
        /// The first byte.
        offset: u64,
        /// At most so many bytes.
        length: u32,
    },
    /// Forget adapters and files of models.
    Delete {
        /// What to forget.
        blobs: Vec<BlobName>,
    },
    /// Keep what is registered for the next start, in place of what was kept before.
    Remember {
        /// Every registration.
        registrations: Vec<Registration>,
    },
}

/// What happened in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobEvent {
    /// An adapter was found on start; they come least recently used first.
    Found(StoredBlob),
    /// A model's file was found on start; they come least recently used first, after the
    /// registrations.
    FoundModelFile(StoredModelFile),
    /// A registration was found on start.
    FoundRegistration(Registration),
    /// A part of a file was found on start; they come after everything else, the one that was
    /// written to least recently first.
    FoundPart(KeptPart),
    /// A command is done or has failed.
    Done {
        /// The command's ticket.
        ticket: Ticket,
        /// What came of it.
        result: Result<BlobOutcome, Failure>,
    },
    /// Something is no longer there, for example because its bytes rotted.
    Removed {
        /// What is gone.
        blob: BlobName,
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
    /// `Append`, `Abort`, `Keep`, `DropParts`, `Delete` or `Remember` was done.
    Done,
    /// `Begin` opened a file.
    Begun {
        /// Bytes of the file that are there already, and verified.
        received: u64,
    },
    /// `Commit` made an adapter.
    Committed {
        /// The adapter as it is stored now.
        blob: StoredBlob,
        /// What was found in the file.
        report: KeyReport,
    },
    /// `Commit` kept a file of a model.
    CommittedModelFile(StoredModelFile),
    /// `Read` got bytes.
    Read {
        /// Bytes of the whole blob.
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

/// A file of a model in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModelFile {
    /// Its digest.
    pub blob: BlobDigest,
    /// Its bytes.
    pub bytes: u64,
    /// What people call it.
    pub label: Option<String>,
}

/// What the blob store kept of a file whose upload is not finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptPart {
    /// Of which file.
    pub part: PartName,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// How long nobody has written to it.
    pub idle: Duration,
}
