//! Names, listing and atomic writes in the store's directory.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use broker_core::{BlobName, StoredBlob, StoredModelFile};
use protocol::{AdapterId, BlobDigest, UploadId};
use serde::{Deserialize, Serialize};

use super::{
    error::{DiskError, IoContext as _, StoreError},
    part::Part,
};

/// Bytes of a sidecar file that is read; a larger one is not ours.
const SIDECAR_BYTES_MAX: u64 = 1 << 20;

/// Digests of raw files that a sidecar keeps, the newest ones.
const RAW_MAX: usize = 64;

/// The store's directory.
#[derive(Debug)]
pub(super) struct Layout {
    root: PathBuf,
    /// Held as long as this process uses the store.
    _lock: File,
}

/// What is kept beside a blob.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Sidecar {
    /// What people call the adapter.
    pub(super) label: Option<String>,
    /// Digests of the files that it was made from.
    pub(super) raw: Vec<BlobDigest>,
    /// The version of the reader that made it of them. Another version may make another adapter of
    /// the same file, so what an older one found is not believed.
    pub(super) reader: u32,
}

impl Layout {
    /// Opens the directory for this process alone, and clears what a crash left behind.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        let layout = |lock| Self { root: root.to_owned(), _lock: lock };
        make_directory(root)?;
        let path = root.join("lock");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(&path).doing("open", &path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(root.to_owned())),
            Err(TryLockError::Error(error)) => Err(error).doing("lock", &path)?,
        }
        let layout = layout(lock);
        let uploads = layout.root.join("uploads");
        make_directory(&uploads)?;
        make_directory(&layout.root.join("blobs"))?;
        make_directory(&layout.root.join("models"))?;
        for entry in entries(&uploads)? {
            fs::remove_file(&entry).doing("remove", &entry)?;
        }
        Ok(layout)
    }

    /// Where an upload is written.
    pub(super) fn part(&self, upload: &UploadId) -> PathBuf {
        self.root.join("uploads").join(format!("{upload}.part"))
    }

    /// Where a blob is.
    pub(super) fn blob(&self, blob: BlobName) -> PathBuf {
        let name = blob.digest().to_string();
        self.directory(blob).join(&name[..2]).join(name)
    }

    /// The adapters on disk, least recently used first. Files that are not ours are left alone.
    pub(super) fn list(&self) -> Result<Vec<StoredBlob>, DiskError> {
        let found = self.files("blobs", |digest| BlobName::Adapter(digest.into()))?;
        let stored = found.into_iter().map(|(bytes, blob)| {
            let Sidecar { label, raw, .. } = self.sidecar(blob);
            StoredBlob { adapter: AdapterId::from(blob.digest()), bytes, label, raw }
        });
        Ok(stored.collect())
    }

    /// The files of models on disk, least recently used first.
    pub(super) fn list_model_files(&self) -> Result<Vec<StoredModelFile>, DiskError> {
        let found = self.files("models", BlobName::ModelFile)?;
        let stored = found.into_iter().map(|(bytes, name)| {
            let label = self.sidecar(name).label;
            StoredModelFile { blob: name.digest(), bytes, label }
        });
        Ok(stored.collect())
    }

    /// Writes an adapter and what is kept beside it. What is kept of an earlier one is added to.
    pub(super) fn store(
        &self,
        adapter: AdapterId,
        bytes: &[u8],
        sidecar: Sidecar,
    ) -> Result<Sidecar, DiskError> {
        let blob = BlobName::Adapter(adapter);
        self.keep(blob, sidecar, |path| self.write(path, bytes))
    }

    /// Keeps an uploaded file of a model as it is; it is not copied.
    pub(super) fn store_model_file(
        &self,
        blob: BlobDigest,
        part: &Part,
        label: Option<String>,
    ) -> Result<Sidecar, DiskError> {
        let sidecar = Sidecar { label, ..Sidecar::default() };
        self.keep(BlobName::ModelFile(blob), sidecar, |path| part.keep_as(path))
    }

    /// Removes a blob and what is kept beside it, whether or not they are there.
    pub(super) fn remove(&self, blob: BlobName) -> Result<(), DiskError> {
        let path = self.blob(blob);
        for path in [&path, &beside(&path)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).doing("remove", path);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the models are listed that were registered.
    pub(super) fn registrations(&self) -> PathBuf {
        self.root.join("registrations.json")
    }

    /// Writes a file of the root directory as a whole.
    pub(super) fn write_in_root(&self, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
        self.write(path, bytes)?;
        sync(&self.root)
    }

    /// Puts a blob in its place with `put`, and what is kept beside it before that.
    fn keep(
        &self,
        blob: BlobName,
        sidecar: Sidecar,
        put: impl FnOnce(&Path) -> Result<(), DiskError>,
    ) -> Result<Sidecar, DiskError> {
        let path = self.blob(blob);
        let directory = path.parent().expect("a blob is in a directory");
        make_directory(directory)?;
        let sidecar = merge(sidecar, self.sidecar(blob));
        let text = serde_json::to_vec_pretty(&sidecar).expect("a sidecar is plain JSON");
        // The blob comes last: where there is a blob, everything about it is there.
        self.write(&beside(&path), &text)?;
        put(&path)?;
        sync(directory)?;
        // The directory itself may be new.
        sync(&self.directory(blob))?;
        Ok(sidecar)
    }

    /// Adapters and files of models are in directories of their own.
    fn directory(&self, blob: BlobName) -> PathBuf {
        self.root.join(match blob {
            BlobName::Adapter(_) => "blobs",
            BlobName::ModelFile(_) => "models",
        })
    }

    /// The blobs below `directory` with their sizes, least recently used first.
    fn files(
        &self,
        directory: &str,
        name: impl Fn(BlobDigest) -> BlobName,
    ) -> Result<Vec<(u64, BlobName)>, DiskError> {
        let mut found: Vec<(SystemTime, u64, BlobName)> = Vec::new();
        for directory in entries(&self.root.join(directory))? {
            if !directory.is_dir() {
                continue;
            }
            for path in entries(&directory)? {
                found.extend(self.found(&path, &name)?);
            }
        }
        found.sort_by_key(|(used, _, blob)| (*used, *blob));
        Ok(found.into_iter().map(|(_, bytes, blob)| (bytes, blob)).collect())
    }

    /// The blob at `path`, if it is one.
    fn found(
        &self,
        path: &Path,
        name: impl Fn(BlobDigest) -> BlobName,
    ) -> Result<Option<(SystemTime, u64, BlobName)>, DiskError> {
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Ok(digest) = file.parse::<BlobDigest>() else { return Ok(None) };
        let blob = name(digest);
        if *path != *self.blob(blob) {
            return Ok(None);
        }
        let metadata = fs::symlink_metadata(path).doing("read", path)?;
        // An empty file is what is left of a crash on a disk that reorders; no blob is empty.
        if !metadata.is_file() || metadata.len() == 0 {
            return Ok(None);
        }
        let used = metadata.modified().doing("read", path)?;
        Ok(Some((used, metadata.len(), blob)))
    }

    /// What is kept beside a blob; nothing where it cannot be read, because it is only convenience.
    /// Files that an older reader read are left out.
    fn sidecar(&self, blob: BlobName) -> Sidecar {
        let path = beside(&self.blob(blob));
        let is_small =
            fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= SIDECAR_BYTES_MAX);
        if !is_small {
            return Sidecar::default();
        }
        let read = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let sidecar: Sidecar = read.unwrap_or_default();
        if sidecar.reader == adapter::READER_VERSION {
            sidecar
        } else {
            Sidecar { raw: Vec::new(), ..sidecar }
        }
    }

    /// Writes a file so that it is there as a whole or not at all.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
        let temporary = self.root.join("uploads").join("new");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary).doing("create", &temporary)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let renamed = written.and_then(|()| fs::rename(&temporary, path));
        if renamed.is_err() {
            // A full disk gets back what was written in vain; the error is what matters.
            let _ = fs::remove_file(&temporary);
        }
        renamed.doing("write", path)
    }
}

/// Adds what was known before to what is new.
fn merge(new: Sidecar, known: Sidecar) -> Sidecar {
    let mut seen = BTreeSet::new();
    let mut raw: Vec<_> = new.raw.into_iter().chain(known.raw).collect();
    raw.retain(|digest| seen.insert(*digest));
    raw.truncate(RAW_MAX);
    Sidecar { label: new.label.or(known.label), raw, reader: adapter::READER_VERSION }
}

/// Where the sidecar of a blob is.
fn beside(blob: &Path) -> PathBuf {
    blob.with_extension("json")
}

fn make_directory(path: &Path) -> Result<(), DiskError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).doing("create", path)
}

/// Makes renames in a directory survive a power cut.
fn sync(directory: &Path) -> Result<(), DiskError> {
    File::open(directory).and_then(|file| file.sync_all()).doing("sync", directory)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, DiskError> {
    let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.doing("list", directory)?;
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}
