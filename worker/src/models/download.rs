//! A model's file that clients uploaded, on its way from the broker to this worker's disk.
//!
//! It is kept as `DIR/models/<digest>.safetensors`, and it has that name only once it is complete
//! and its BLAKE3 digest was checked. A download that is interrupted begins anew.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use protocol::{BlobDigest, ErrorCode, limits};

use super::{
    failure::WireError,
    part::{PartFile, remove_abandoned},
};

/// When a client may try again after the disk was full.
const FULL_RETRY_MS: u32 = 10_000;

/// A file that is being downloaded. Dropping it removes what has arrived.
#[derive(Debug)]
pub struct ModelDownload {
    blob: BlobDigest,
    target: PathBuf,
    part: PartFile,
    bytes: u64,
    hasher: blake3::Hasher,
}

/// Why a downloaded file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    /// The disk is full, or what this user may have of it is.
    #[error("no space left for `{}`: free some on the worker's disk", path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The disk says no.
    #[error("cannot {doing} `{}`", path.display())]
    Disk {
        /// What was tried.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// More bytes arrived than a model's file may have.
    #[error("model file {blob} has {bytes} bytes or more: at most {most} are accepted", most = limits::MODEL_BYTES_MAX)]
    TooLarge {
        /// The file.
        blob: BlobDigest,
        /// Bytes that arrived.
        bytes: u64,
    },
    /// What arrived is not what was asked for.
    #[error(
        "the broker sent {bytes} bytes with digest {found} when asked for model file {expected}"
    )]
    Digest {
        /// What was asked for.
        expected: BlobDigest,
        /// What arrived.
        found: BlobDigest,
        /// Bytes that arrived.
        bytes: u64,
    },
}

impl ModelDownload {
    /// The file of an earlier download, if it is in `directory` and still has its digest; a spoilt
    /// one is removed. Reads the whole file, so not for the event loop.
    ///
    /// # Errors
    /// When the file can be neither read nor removed.
    pub fn find(directory: &Path, blob: BlobDigest) -> Result<Option<PathBuf>, DownloadError> {
        let path = path_of(directory, blob);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(disk("open", &path)(error)),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut file).map_err(disk("read", &path))?;
        if digest_of(&hasher) == blob {
            return Ok(Some(path));
        }
        tracing::warn!(path = %path.display(), "model file does not have its digest, removing it");
        fs::remove_file(&path).map_err(disk("remove", &path))?;
        Ok(None)
    }

    /// Begins to download `blob` into `directory`, which is made if need be.
    ///
    /// # Errors
    /// When the disk says no.
    pub fn begin(directory: &Path, blob: BlobDigest) -> Result<Self, DownloadError> {
        let target = path_of(directory, blob);
        let folder = target.parent().expect("a model's file is in a directory");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(disk("make", folder))?;
        remove_abandoned(folder).map_err(disk("clear", folder))?;
        let part = PartFile::create(&target).map_err(disk("begin", &target))?;
        Ok(Self { blob, target, part, bytes: 0, hasher: blake3::Hasher::new() })
    }

    /// What is being downloaded.
    pub const fn blob(&self) -> BlobDigest {
        self.blob
    }

    /// Bytes that have arrived; the next chunk begins there.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the next chunk.
    ///
    /// # Errors
    /// When the disk says no or the file becomes too large. The download cannot go on then.
    pub fn append(&mut self, chunk: &[u8]) -> Result<(), DownloadError> {
        let bytes = self.bytes.saturating_add(chunk.len() as u64);
        if bytes > limits::MODEL_BYTES_MAX {
            return Err(DownloadError::TooLarge { blob: self.blob, bytes });
        }
        self.part.file.write_all(chunk).map_err(disk("write", self.part.path()))?;
        self.hasher.update(chunk);
        self.bytes = bytes;
        Ok(())
    }

    /// Checks the digest of everything that arrived, and gives the file its name: its path.
    ///
    /// # Errors
    /// When the digest is another one, or the disk says no. What arrived is removed then.
    pub fn finish(self) -> Result<PathBuf, DownloadError> {
        let Self { blob: expected, target, part, bytes, hasher } = self;
        let found = digest_of(&hasher);
        if found != expected {
            return Err(DownloadError::Digest { expected, found, bytes });
        }
        part.keep(&target).map_err(disk("keep", &target))?;
        Ok(target)
    }
}

impl WireError for DownloadError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Full { .. } => ErrorCode::Overloaded,
            Self::Disk { .. } | Self::Digest { .. } => ErrorCode::Internal,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
        }
    }

    fn retry_after_ms(&self) -> Option<u32> {
        matches!(self, Self::Full { .. }).then_some(FULL_RETRY_MS)
    }
}

fn path_of(directory: &Path, blob: BlobDigest) -> PathBuf {
    directory.join("models").join(format!("{blob}.safetensors"))
}

fn digest_of(hasher: &blake3::Hasher) -> BlobDigest {
    BlobDigest::from_bytes(hasher.finalize().into())
}

/// The error of `doing` something with `path`.
fn disk(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DownloadError {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let path = path.to_owned();
    move |source| {
        if matches!(source.kind(), StorageFull | QuotaExceeded) {
            DownloadError::Full { path, source }
        } else {
            DownloadError::Disk { doing, path, source }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn chunks_become_a_file_named_by_its_digest() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("cache");
        let content = content();
        let blob = BlobDigest::of(&content);
        assert_eq!(ModelDownload::find(&directory, blob).unwrap(), None);

        let mut download = ModelDownload::begin(&directory, blob).unwrap();
        for chunk in content.chunks(1000) {
            assert_eq!(ModelDownload::find(&directory, blob).unwrap(), None);
            download.append(chunk).unwrap();
        }
        assert_eq!((download.blob(), download.bytes()), (blob, content.len() as u64));
        let path = download.finish().unwrap();

        assert_eq!(path, directory.join(format!("models/{blob}.safetensors")));
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(ModelDownload::find(&directory, blob).unwrap(), Some(path));
        assert_eq!(files(&directory), 1);
    }

    #[test]
    fn other_bytes_than_those_asked_for_are_never_kept() {
        let folder = tempfile::tempdir().unwrap();
        let blob = BlobDigest::of(&content());
        let mut spoilt = content();
        spoilt[4000] ^= 1;
        let short = content()[1..].to_vec();
        for sent in [spoilt, short, Vec::new()] {
            let mut download = ModelDownload::begin(folder.path(), blob).unwrap();
            download.append(&sent).unwrap();
            let error = download.finish().unwrap_err();
            assert_eq!(error.code(), ErrorCode::Internal);
            assert!(error.to_string().contains(&blob.to_string()), "{error}");
            assert_eq!(files(folder.path()), 0);
        }
    }

    #[test]
    fn a_download_that_is_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let blob = BlobDigest::of(&content());
        let mut download = ModelDownload::begin(folder.path(), blob).unwrap();
        download.append(&content()[..100]).unwrap();
        assert_eq!(files(folder.path()), 1);
        drop(download);
        assert_eq!(files(folder.path()), 0);
    }

    #[test]
    fn a_file_that_spoilt_on_disk_is_removed_and_downloaded_again() {
        let folder = tempfile::tempdir().unwrap();
        let blob = BlobDigest::of(&content());
        let get = || {
            let mut download = ModelDownload::begin(folder.path(), blob).unwrap();
            download.append(&content()).unwrap();
            download.finish().unwrap()
        };
        let path = get();
        let mut spoilt = content();
        spoilt[7] ^= 1;
        fs::write(&path, spoilt).unwrap();
        assert_eq!(ModelDownload::find(folder.path(), blob).unwrap(), None);
        assert_eq!(files(folder.path()), 0);
        assert_eq!(ModelDownload::find(folder.path(), blob).unwrap(), None);
        get();
        get();
        assert_eq!(ModelDownload::find(folder.path(), blob).unwrap(), Some(path));
    }

    #[test]
    fn a_full_disk_is_worth_another_try_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut download = ModelDownload::begin(folder.path(), BlobDigest::of(b"x")).unwrap();
        download.part.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = download.append(&content()).unwrap_err();
        assert!(matches!(error, DownloadError::Full { .. }), "{error}");
        let failure = error.to_failure();
        assert_eq!(failure.code, ErrorCode::Overloaded);
        assert_eq!(failure.retry_after_ms, Some(FULL_RETRY_MS));
        assert!(failure.message.contains(".part`: free some"), "{failure}");
        assert_eq!(download.bytes(), 0);
    }

    #[test]
    fn a_model_file_has_a_largest_size() {
        let folder = tempfile::tempdir().unwrap();
        let mut download = ModelDownload::begin(folder.path(), BlobDigest::of(b"x")).unwrap();
        download.bytes = limits::MODEL_BYTES_MAX - 1;
        download.append(b"1").unwrap();
        let error = download.append(b"2").unwrap_err();
        assert_eq!(error.code(), ErrorCode::TooLarge);
        assert_eq!(download.bytes(), limits::MODEL_BYTES_MAX);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = folder.path().join("file");
        fs::write(&blocked, b"").unwrap();
        let error = ModelDownload::begin(&blocked, BlobDigest::of(b"x")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Internal);
        assert!(error.to_failure().message.contains(blocked.to_str().unwrap()), "{error}");
    }

    fn content() -> Vec<u8> {
        (0..5000_u32).flat_map(u32::to_le_bytes).collect()
    }

    fn files(directory: &Path) -> usize {
        fs::read_dir(directory.join("models")).unwrap().count()
    }
}
