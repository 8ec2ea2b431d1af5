//! Adapters on this worker's disk, named by the digest of their content.
//!
//! ```text
//! CACHE/lock          held by the one process that uses the cache
//! CACHE/blobs/ab12…   canonical bytes; the name is their digest
//! CACHE/blobs/….part  a blob that is being written; cleared on start
//! ```
//!
//! A cache may lose anything at any time, so nothing is synced; instead the digest is verified
//! whenever a blob is read, and what is rotten is deleted. What is kept is for the core to say.

mod thread;

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use protocol::{BlobDigest, limits};

pub(crate) use thread::CacheThread;

/// The directory.
#[derive(Debug)]
pub(crate) struct BlobCache {
    blobs: PathBuf,
    /// Held as long as this process uses the cache.
    _lock: File,
}

/// A blob that an earlier run left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CachedBlob {
    pub(crate) digest: BlobDigest,
    pub(crate) bytes: u64,
}

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// Another process has it.
    #[error("another process uses the cache `{0}`: give every worker a directory of its own")]
    InUse(PathBuf),
    /// The disk refuses.
    #[error("cannot use `{path}` for the cache")]
    Io { path: PathBuf, source: io::Error },
}

/// Why a blob cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its bytes are not those it is named after. It is deleted.
    #[error("its content has digest {0}")]
    Rotten(BlobDigest),
}

impl BlobCache {
    /// Opens the cache in `directory`, which is made if it does not exist, for this process alone.
    /// Returns it with the blobs that it holds, least recently used first; those that do not fit
    /// into `budget_bytes` are deleted.
    pub(crate) fn open(
        directory: &Path,
        budget_bytes: u64,
    ) -> Result<(Self, Vec<CachedBlob>), CacheError> {
        let blobs = directory.join("blobs");
        fs::create_dir_all(&blobs).map_err(|source| io_error(&blobs, source))?;
        let path = directory.join("lock");
        let mut options = OpenOptions::new();
        let lock = options.write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(|source| io_error(&path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CacheError::InUse(directory.to_owned())),
            Err(TryLockError::Error(source)) => return Err(io_error(&path, source)),
        }
        let cache = Self { blobs, _lock: lock };
        let found = cache.scan(budget_bytes).map_err(|source| io_error(&cache.blobs, source))?;
        Ok((cache, found))
    }

    /// The bytes of a blob, verified.
    pub(crate) fn read(&self, digest: BlobDigest) -> Result<Vec<u8>, ReadError> {
        let path = self.path(digest);
        let file = File::open(&path)?;
        let mut bytes = Vec::new();
        (&file).take(limits::UPLOAD_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        let found = BlobDigest::of(&bytes);
        if found != digest {
            self.remove(digest)?;
            return Err(ReadError::Rotten(found));
        }
        // The order of use is worth keeping over a restart, and not worth an error.
        let _ = file.set_modified(SystemTime::now());
        Ok(bytes)
    }

    /// Stores a blob. Until it is complete its name does not exist.
    pub(crate) fn write(&self, digest: BlobDigest, bytes: &[u8]) -> io::Result<()> {
        let part = self.blobs.join(format!("{digest}.part"));
        let written = File::create(&part)
            .and_then(|mut file| file.write_all(bytes))
            .and_then(|()| fs::rename(&part, self.path(digest)));
        if written.is_err() {
            // Half a blob on a full disk helps nobody; if this fails too, the next start does it.
            let _ = fs::remove_file(&part);
        }
        written
    }

    /// Deletes a blob if it is there.
    pub(crate) fn remove(&self, digest: BlobDigest) -> io::Result<()> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, digest: BlobDigest) -> PathBuf {
        self.blobs.join(digest.to_string())
    }

    /// Lists the blobs, least recently used first, and deletes what is unfinished or too much.
    fn scan(&self, budget_bytes: u64) -> io::Result<Vec<CachedBlob>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.blobs)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == "part") {
                fs::remove_file(&path)?;
                continue;
            }
            let Ok(digest) = name.parse::<BlobDigest>() else { continue };
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_file() {
                let blob = CachedBlob { digest, bytes: metadata.len() };
                found.push((metadata.modified()?, blob));
            }
        }
        found.sort_by_key(|(used, blob)| (*used, blob.digest));
        let mut room = budget_bytes;
        let mut kept = Vec::new();
        for (_, blob) in found.into_iter().rev() {
            // An empty file is what is left of a crash; no blob is empty.
            if blob.bytes == 0 || blob.bytes > room {
                self.remove(blob.digest)?;
                continue;
            }
            room -= blob.bytes;
            kept.push(blob);
        }
        kept.reverse();
        Ok(kept)
    }
}

fn io_error(path: &Path, source: io::Error) -> CacheError {
    CacheError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BUDGET: u64 = 1 << 20;

    #[test]
    fn a_blob_survives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, found) = BlobCache::open(directory.path(), BUDGET).unwrap();
        assert_eq!(found, []);
        let digest = BlobDigest::of(b"anime");
        cache.write(digest, b"anime").unwrap();
        drop(cache);

        let (cache, found) = BlobCache::open(directory.path(), BUDGET).unwrap();
        assert_eq!(found, [CachedBlob { digest, bytes: 5 }]);
        assert_eq!(cache.read(digest).unwrap(), b"anime");
        cache.remove(digest).unwrap();
        cache.remove(digest).unwrap();
        assert!(matches!(cache.read(digest), Err(ReadError::Io(_))));
    }

    #[test]
    fn a_rotten_blob_is_never_returned_and_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, _) = BlobCache::open(directory.path(), BUDGET).unwrap();
        let digest = BlobDigest::of(b"anime");
        cache.write(digest, b"anime").unwrap();
        fs::write(cache.path(digest), b"anine").unwrap();
        assert!(matches!(cache.read(digest), Err(ReadError::Rotten(_))));
        assert!(!cache.path(digest).exists());
    }

    #[test]
    fn what_does_not_fit_any_more_goes_with_what_is_unfinished() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, _) = BlobCache::open(directory.path(), BUDGET).unwrap();
        let long_ago = SystemTime::now() - Duration::from_hours(1);
        for (content, minutes) in [("aaaa", 3), ("bbbb", 1), ("cccc", 2)] {
            let digest = BlobDigest::of(content.as_bytes());
            cache.write(digest, content.as_bytes()).unwrap();
            let file = File::options().write(true).open(cache.path(digest)).unwrap();
            file.set_modified(long_ago + Duration::from_mins(minutes)).unwrap();
        }
        fs::write(cache.blobs.join("x.part"), b"half").unwrap();
        fs::write(cache.path(BlobDigest::of(b"empty")), b"").unwrap();
        fs::write(cache.blobs.join("README"), b"not ours").unwrap();
        let blobs = cache.blobs.clone();
        drop(cache);

        let (_cache, found) = BlobCache::open(directory.path(), 8).unwrap();
        let expected = ["cccc", "aaaa"].map(|content| BlobDigest::of(content.as_bytes()));
        assert_eq!(found.iter().map(|blob| blob.digest).collect::<Vec<_>>(), expected);
        assert_eq!(fs::read_dir(blobs).unwrap().count(), 3, "two blobs and a stranger's file");
    }

    #[test]
    fn a_directory_serves_one_process() {
        let directory = tempfile::tempdir().unwrap();
        let _first = BlobCache::open(directory.path(), BUDGET).unwrap();
        let error = BlobCache::open(directory.path(), BUDGET).unwrap_err();
        assert!(error.to_string().starts_with("another process uses the cache"), "{error}");
    }

    #[test]
    fn a_write_that_fails_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, _) = BlobCache::open(directory.path(), BUDGET).unwrap();
        let digest = BlobDigest::of(b"anime");
        fs::create_dir(cache.path(digest)).unwrap();
        assert!(cache.write(digest, b"anime").is_err(), "a directory is in the way");
        assert_eq!(fs::read_dir(&cache.blobs).unwrap().count(), 1);
    }
}
