//! Names, listing and atomic writes in the store's directory.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, BufWriter, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use adapter::PatchSet;
use broker_core::{BlobName, KeptPart, PartName, StoredBlob, StoredModelFile};
use protocol::{AdapterId, BlobDigest, UploadId, request::UploadFormat};
use serde::{Deserialize, Serialize};

use super::{
    error::{DiskError, IoContext as _, StoreError},
    part::Part,
    sums,
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
    /// Opens the directory for this process alone.
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
        Ok(layout)
    }

    /// Where an upload is written. The name of one that can be gone on with says of what it is.
    pub(super) fn part(&self, upload: &UploadId, part: Option<&PartName>) -> PathBuf {
        let name = match part {
            Some(PartName { format, digest, size }) => {
                format!("{}-{size}-{digest}-{upload}.part", format_name(*format))
            }
            None => format!("{upload}.part"),
        };
        self.root.join("uploads").join(name)
    }

    /// The parts on disk that can be gone on with, the one that was written to least recently
    /// first. Everything else that a crash left behind is cleared.
    pub(super) fn list_parts(&self) -> Result<Vec<(KeptPart, PathBuf)>, DiskError> {
        let mut found: BTreeMap<PartName, (KeptPart, PathBuf)> = BTreeMap::new();
        let entries = entries(&self.root.join("uploads"))?;
        for path in &entries {
            let Some(kept) = kept_part(path) else { continue };
            let is_longer = |(known, _): &(KeptPart, PathBuf)| known.bytes < kept.bytes;
            if found.get(&kept.part).is_none_or(is_longer) {
                found.insert(kept.part, (kept, path.clone()));
            }
        }
        let stays: BTreeSet<_> =
            found.values().flat_map(|(_, path)| [path.clone(), sums::beside(path)]).collect();
        for path in entries.iter().filter(|path| !stays.contains(*path)) {
            fs::remove_file(path).doing("remove", path)?;
        }
        let mut parts: Vec<_> = found.into_values().collect();
        parts.sort_by_key(|(kept, _)| (Reverse(kept.idle), kept.part));
        Ok(parts)
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
    /// Returns the adapter's bytes as well.
    pub(super) fn store_adapter(
        &self,
        adapter: AdapterId,
        set: &PatchSet,
        sidecar: Sidecar,
    ) -> Result<(u64, Sidecar), DiskError> {
        let mut bytes = 0;
        let sidecar = self.keep(BlobName::Adapter(adapter), sidecar, |path| {
            bytes = self.write(path, |file| {
                let mut buffered = BufWriter::with_capacity(1 << 20, file);
                set.write_to(&mut buffered)?;
                buffered.flush()
            })?;
            Ok(())
        })?;
        Ok((bytes, sidecar))
    }

    /// Keeps an uploaded file as it is; it is not copied.
    pub(super) fn keep_part(
        &self,
        blob: BlobName,
        part: &Part,
        sidecar: Sidecar,
    ) -> Result<Sidecar, DiskError> {
        self.keep(blob, sidecar, |path| part.keep_as(path))
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
        self.write(path, |file| file.write_all(bytes))?;
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
        self.write(&beside(&path), |file| file.write_all(&text))?;
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

    /// Writes a file so that it is there as a whole or not at all. Returns its bytes.
    fn write(
        &self,
        path: &Path,
        content: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<u64, DiskError> {
        let temporary = self.root.join("uploads").join("new");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary).doing("create", &temporary)?;
        let written = content(&mut file).and_then(|()| file.sync_all());
        let bytes = written.and_then(|()| Ok(file.metadata()?.len()));
        let renamed = bytes.and_then(|bytes| fs::rename(&temporary, path).map(|()| bytes));
        if renamed.is_err() {
            // A full disk gets back what was written in vain; the error is what matters.
            let _ = fs::remove_file(&temporary);
        }
        renamed.doing("write", path)
    }
}

/// The part at `path`, if it is one that can be gone on with.
fn kept_part(path: &Path) -> Option<KeptPart> {
    let name = path.file_name()?.to_str()?.strip_suffix(".part")?;
    let mut words = name.splitn(4, '-');
    let format = [UploadFormat::Lora, UploadFormat::Canonical, UploadFormat::Model];
    let word = words.next()?;
    let format = format.into_iter().find(|&format| format_name(format) == word)?;
    let size = words.next()?.parse().ok()?;
    let digest = words.next()?.parse().ok()?;
    words.next()?;
    let metadata = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?;
    let recorded = sums::read(path).ok()?.last()?.end;
    let bytes = recorded.min(metadata.len()).min(size);
    // A clock that was set back makes a part young, not old.
    let idle = metadata.modified().ok()?.elapsed().unwrap_or_default();
    let part = PartName { format, digest, size };
    (bytes > 0).then_some(KeptPart { part, bytes, idle })
}

fn format_name(format: UploadFormat) -> &'static str {
    match format {
        UploadFormat::Lora => "lora",
        UploadFormat::Canonical => "canonical",
        UploadFormat::Model => "model",
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
