//! A file that is being uploaded, and how much of one that broke off can be believed.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use broker_core::PartName;
use protocol::BlobDigest;

use super::{
    error::{DiskError, IoContext as _},
    source::FileSource,
    sums::{self, Sum, Sums},
};

/// Bytes after which what was written so far is recorded; so it is when everything is there.
const RECORD_EVERY: u64 = 64 << 10;

/// Bytes that are read and hashed at once.
const BLOCK_BYTES: usize = 1 << 20;

/// The file and the digest of what was written so far. It stays on the disk until it is kept as
/// something else or discarded.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hasher: blake3::Hasher,
    /// What it goes by, and the records that it can be gone on with after a crash; nothing for a
    /// file whose digest was not announced.
    resumable: Option<(PartName, Sums)>,
}

impl Part {
    /// An empty file at `path`, for this user alone.
    pub(super) fn create(path: PathBuf, name: Option<PartName>) -> Result<Self, DiskError> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).doing("create", &path)?;
        let part = Self { path, file, len: 0, hasher: blake3::Hasher::new(), resumable: None };
        let Some(name) = name else { return Ok(part) };
        match Sums::create(&part.path) {
            Ok(sums) => Ok(Self { resumable: Some((name, sums)), ..part }),
            Err(error) => {
                part.discard();
                Err(error)
            }
        }
    }

    /// Goes on with the file at `path`: what hashes to what was recorded stays, the rest is cut
    /// off. On failure the file is gone. `stop` ends it early.
    pub(super) fn resume(
        path: &Path,
        name: PartName,
        stop: &AtomicBool,
    ) -> Result<Self, DiskError> {
        let resumed = Self::verify(path, name, stop);
        if resumed.is_err() && !stop.load(Ordering::Relaxed) {
            remove(path);
        }
        resumed
    }

    fn verify(path: &Path, name: PartName, stop: &AtomicBool) -> Result<Self, DiskError> {
        let recorded = sums::read(path)?;
        let file = OpenOptions::new().read(true).write(true).open(path).doing("open", path)?;
        let written = file.metadata().doing("read", path)?.len().min(name.size);
        let mut believed = (0, 0, blake3::Hasher::new());
        let mut hasher = blake3::Hasher::new();
        for (count, sum) in recorded.iter().enumerate() {
            let start = hasher.count();
            if sum.end > written {
                break;
            }
            hash(&file, (start, sum.end), &mut hasher, stop).doing("read", path)?;
            if hasher.finalize() != blake3::Hash::from_bytes(sum.digest) {
                break;
            }
            believed = (count + 1, sum.end, hasher.clone());
        }
        let (count, len, hasher) = believed;
        file.set_len(len).doing("write", path)?;
        let sums = Sums::reopen(path, count, len)?;
        Ok(Self { path: path.to_owned(), file, len, hasher, resumable: Some((name, sums)) })
    }

    /// Writes at the end. After a failure nothing but [`Part::discard`] makes sense.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.file.write_all_at(bytes, self.len).doing("write", &self.path)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        let is_due = self.resumable.as_ref().is_some_and(|(name, sums)| {
            self.len == name.size || self.len - sums.end() >= RECORD_EVERY
        });
        if is_due { self.record() } else { Ok(()) }
    }

    /// Records everything written, so that all of it can be gone on with.
    pub(super) fn record(&mut self) -> Result<(), DiskError> {
        let digest = self.hasher.finalize().into();
        match &mut self.resumable {
            Some((_, sums)) if sums.end() < self.len => sums.add(Sum { end: self.len, digest }),
            _ => Ok(()),
        }
    }

    /// Makes everything written survive a power cut, and gives the file another name.
    pub(super) fn keep_as(&self, path: &Path) -> Result<(), DiskError> {
        self.file.sync_all().doing("write", &self.path)?;
        fs::rename(&self.path, path).doing("write", path)?;
        sums::remove(&self.path);
        Ok(())
    }

    /// Removes the file.
    pub(super) fn discard(self) {
        remove(&self.path);
    }

    /// Where it is, for whoever removes it.
    pub(super) fn into_path(self) -> PathBuf {
        self.path
    }

    /// What it goes by, if it can be gone on with.
    pub(super) fn name(&self) -> Option<PartName> {
        self.resumable.as_ref().map(|(name, _)| *name)
    }

    /// The digest of everything written.
    pub(super) fn digest(&self) -> BlobDigest {
        BlobDigest::from_bytes(self.hasher.finalize().into())
    }

    /// Bytes written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Everything written, to be read where it is needed.
    pub(super) fn source(&self) -> FileSource<'_> {
        FileSource::new(&self.file, self.len)
    }

    /// Writes go to `file` from now on.
    #[cfg(test)]
    pub(super) fn write_to(&mut self, file: File) {
        self.file = file;
    }
}

/// Removes the part at `path` and what is beside it.
pub(super) fn remove(path: &Path) {
    // What stays behind is cleared on the next start.
    let _ = fs::remove_file(path);
    sums::remove(path);
}

/// The digest of a whole file. `stop` ends it early.
pub(super) fn digest(file: &File, stop: &AtomicBool) -> io::Result<BlobDigest> {
    let mut hasher = blake3::Hasher::new();
    hash(file, (0, file.metadata()?.len()), &mut hasher, stop)?;
    Ok(BlobDigest::from_bytes(hasher.finalize().into()))
}

fn hash(
    file: &File,
    (start, end): (u64, u64),
    hasher: &mut blake3::Hasher,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = start;
    while at < end {
        if stop.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the process ends"));
        }
        let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(block.len());
        file.read_exact_at(&mut block[..length], at)?;
        hasher.update(&block[..length]);
        at += length as u64;
    }
    Ok(())
}
