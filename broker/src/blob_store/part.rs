//! A file that is being uploaded.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use adapter::ByteSource as _;
use protocol::BlobDigest;

use super::{
    error::{DiskError, IoContext as _},
    source::FileSource,
};

/// Bytes after which what was written goes to the disk, so that the end of a large file does not
/// keep everybody else waiting for all of it.
const SYNC_BYTES: u64 = 64 << 20;

/// The file and the digest of what was written so far. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    synced: u64,
    hasher: blake3::Hasher,
}

impl Part {
    /// An empty file at `path`, for this user alone.
    pub(super) fn create(path: PathBuf) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).doing("create", &path)?;
        Ok(Self { path, file, len: 0, synced: 0, hasher: blake3::Hasher::new() })
    }

    /// Writes at the end.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all(bytes).doing("write", &self.path)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        if self.len - self.synced >= SYNC_BYTES {
            self.file.sync_data().doing("write", &self.path)?;
            self.synced = self.len;
        }
        Ok(())
    }

    /// Makes everything written survive a power cut, and gives the file another name.
    pub(super) fn keep_as(&self, path: &Path) -> Result<(), DiskError> {
        self.file.sync_all().doing("write", &self.path)?;
        fs::rename(&self.path, path).doing("write", path)
    }

    /// The digest of everything written.
    pub(super) fn digest(&self) -> BlobDigest {
        BlobDigest::from_bytes(self.hasher.finalize().into())
    }

    /// Bytes written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Everything written, in memory.
    pub(super) fn read_all(&self) -> Result<Vec<u8>, DiskError> {
        let length = usize::try_from(self.len).unwrap_or(usize::MAX);
        FileSource::new(&self.file, self.len).read(0, length).doing("read", &self.path)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // What was kept has another name; what stays behind is cleared on the next start.
        let _ = fs::remove_file(&self.path);
    }
}
