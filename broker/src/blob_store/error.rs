//! What can go wrong in the blob store, and what a client is told.

use std::{
    io,
    path::{Path, PathBuf},
};

use adapter::{AdapterError, ErrorKind, FileError};
use broker_core::BlobName;
use protocol::{BlobDigest, ErrorCode, Failure, UploadId, limits};

/// When a client may try again after the disk was full.
const FULL_RETRY_MS: u32 = 10_000;

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process uses it.
    #[error(
        "`{}` is in use by another broker: stop it, or name another directory with `--store`",
        .0.display()
    )]
    InUse(PathBuf),
    /// A newer broker wrote into it.
    #[error(
        "`{}` has version {version}, which this broker does not know: start a newer broker, or name \
         another directory with `--store`",
        file.display()
    )]
    Newer {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The disk says no.
    #[error(transparent)]
    Io(#[from] DiskError),
}

/// The disk said no.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} `{}`: {io}", path.display())]
pub struct DiskError {
    doing: &'static str,
    path: PathBuf,
    /// What the system said; it is in the message, so it is not the error's source as well.
    io: io::Error,
}

/// Why one command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("upload `{0}` is not open: begin a new one")]
    NotOpen(UploadId),
    #[error("the file's digest is `{found}`: it was announced as `{expected}`")]
    Digest { expected: BlobDigest, found: BlobDigest },
    #[error("the canonical adapter has {bytes} bytes: at most {max} are accepted", max = super::commit::CANONICAL_BYTES_MAX)]
    CanonicalTooLarge { bytes: u64 },
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error("the file of a model has {bytes} bytes: at most {max} are accepted", max = limits::MODEL_BYTES_MAX)]
    ModelTooLarge { bytes: u64 },
    #[error("the blob store does not hold {0}")]
    NotStored(BlobName),
    #[error("{blob} rotted on the disk, its bytes hash to `{found}`: upload it again")]
    Rotten { blob: BlobName, found: BlobDigest },
}

/// Says what was being done when the disk said no.
pub(crate) trait IoContext<T> {
    /// `doing` is a verb, as in "cannot read".
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, DiskError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, DiskError> {
        self.map_err(|io| DiskError { doing, path: path.to_owned(), io })
    }
}

impl DiskError {
    /// What a client is told.
    fn code(&self) -> ErrorCode {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let kind = self.io.kind();
        if matches!(kind, StorageFull | QuotaExceeded) {
            ErrorCode::StoreFull
        } else if kind == FileTooLarge {
            ErrorCode::TooLarge
        } else {
            ErrorCode::Internal
        }
    }

    /// What to do about it.
    fn advice(&self) -> &'static str {
        let code = self.code();
        if code == ErrorCode::StoreFull {
            ": make room on the broker's disk, or lower the budgets of its store"
        } else if code == ErrorCode::TooLarge {
            ": the broker's disk takes no file of this size"
        } else {
            ""
        }
    }
}

impl OpError {
    /// Whether the store itself is in trouble, rather than what it was asked for.
    pub(crate) fn trouble(&self) -> Option<String> {
        match self {
            Self::Disk(error) => Some(error.to_string()),
            Self::NotOpen(_)
            | Self::Digest { .. }
            | Self::CanonicalTooLarge { .. }
            | Self::ModelTooLarge { .. }
            | Self::Adapter(_)
            | Self::NotStored(_)
            | Self::Rotten { .. } => None,
        }
    }

    fn code(&self) -> ErrorCode {
        match self {
            Self::Disk(disk) => disk.code(),
            Self::NotOpen(_) => ErrorCode::InvalidRequest,
            Self::Digest { .. } => ErrorCode::LoraRejected,
            Self::CanonicalTooLarge { .. } | Self::ModelTooLarge { .. } => ErrorCode::TooLarge,
            Self::Adapter(AdapterError::File(FileError::Io(_))) => ErrorCode::Internal,
            Self::Adapter(error) => match error.kind() {
                ErrorKind::Unsupported => ErrorCode::Unsupported,
                ErrorKind::TooLarge => ErrorCode::TooLarge,
                ErrorKind::LoraRejected => ErrorCode::LoraRejected,
            },
            Self::NotStored(_) | Self::Rotten { .. } => ErrorCode::UnknownLora,
        }
    }
}

impl From<OpError> for Failure {
    fn from(error: OpError) -> Self {
        let advice = if let OpError::Disk(disk) = &error { disk.advice() } else { "" };
        let code = error.code();
        let retry_after_ms = (code == ErrorCode::StoreFull).then_some(FULL_RETRY_MS);
        Self { code, message: format!("{error}{advice}"), retry_after_ms }
    }
}
