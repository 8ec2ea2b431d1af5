//! Adapters and files of models on disk, named by the digest of their content.
//!
//! ```text
//! STORE/lock                 held by the one process that uses the store
//! STORE/uploads/UPLOAD.part  files that are being uploaded; cleared on start
//! STORE/blobs/ab/ab12…       canonical bytes of adapters; the name is their digest
//! STORE/blobs/ab/ab12….json  what people call it, and the digests of the files it came from
//! STORE/models/ab/ab12…      files of models as they were uploaded, with `.json` beside them
//! STORE/registrations.json   the models that were registered
//! ```
//!
//! **Invariants.** A blob is complete and verified before its name exists, because it is written
//! elsewhere, synced and renamed. What is served was verified by this process. What the store
//! holds in excess is for the core to say; nothing here decides what to keep.

mod error;
mod layout;
mod part;
mod registered;
mod source;
mod thread;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    time::SystemTime,
};

use adapter::PatchSet;
use broker_core::{
    BlobEvent, BlobName, BlobOp, BlobOutcome, Registration, StoredBlob, StoredModelFile,
};
use bytes::Bytes;
use protocol::{AdapterId, BlobDigest, UploadId, limits, reply::KeyReport, request::UploadFormat};

pub use error::{DiskError, StoreError};
pub(crate) use thread::StoreThread;

use error::{IoContext as _, OpError};
use layout::{Layout, Sidecar};
use part::Part;
use source::FileSource;

/// Bytes of a canonical adapter that a client may upload; it is read into memory to be checked.
const CANONICAL_BYTES_MAX: u64 = 1 << 30;

/// Bytes that the names of unmatched keys take in a reply; the rest of them is counted.
const UNMATCHED_BYTES_MAX: usize = 256 << 10;

/// The directory, and what is open in it.
#[derive(Debug)]
pub(crate) struct BlobStore {
    layout: Layout,
    parts: BTreeMap<UploadId, Part>,
    /// Blobs whose content this process has verified.
    verified: BTreeSet<BlobName>,
    /// The blob that was read last; fetches come in runs of chunks.
    open: Option<(BlobName, File)>,
}

/// What a store held when it was opened, least recently used first.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) adapters: Vec<StoredBlob>,
    pub(crate) model_files: Vec<StoredModelFile>,
    pub(crate) registrations: Vec<Registration>,
}

impl BlobStore {
    /// Opens the store in `directory`, which is made if it does not exist. Returns it with what it
    /// holds.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Found), StoreError> {
        let layout = Layout::open(directory)?;
        let found = Found {
            adapters: layout.list()?,
            model_files: layout.list_model_files()?,
            registrations: registered::load(&layout.registrations())?,
        };
        let store = Self { layout, parts: BTreeMap::new(), verified: BTreeSet::new(), open: None };
        Ok((store, found))
    }

    /// Does one thing. Events beside its outcome are appended to `events`.
    pub(crate) fn execute(
        &mut self,
        op: BlobOp,
        events: &mut Vec<BlobEvent>,
    ) -> Result<BlobOutcome, OpError> {
        match op {
            BlobOp::Begin { upload, .. } => self.begin(upload).map(|()| BlobOutcome::Done),
            BlobOp::Append { upload, bytes } => {
                self.part(&upload)?.append(&bytes)?;
                Ok(BlobOutcome::Done)
            }
            BlobOp::Commit { upload, format, digest, label } => {
                let part = self.parts.remove(&upload).ok_or(OpError::NotOpen(upload))?;
                self.commit(&part, format, digest, label)
            }
            BlobOp::Abort { upload } => {
                self.parts.remove(&upload);
                Ok(BlobOutcome::Done)
            }
            BlobOp::Read { blob, offset, length } => self.read(blob, (offset, length), events),
            BlobOp::Delete { blobs } => self.delete(&blobs).map(|()| BlobOutcome::Done),
            BlobOp::Remember { registrations } => {
                let text = registered::text(registrations);
                self.layout.write_in_root(&self.layout.registrations(), &text)?;
                Ok(BlobOutcome::Done)
            }
        }
    }

    fn begin(&mut self, upload: UploadId) -> Result<(), OpError> {
        let part = Part::create(self.layout.part(&upload))?;
        self.parts.insert(upload, part);
        Ok(())
    }

    fn part(&mut self, upload: &UploadId) -> Result<&mut Part, OpError> {
        self.parts.get_mut(upload).ok_or_else(|| OpError::NotOpen(upload.clone()))
    }

    /// Verifies an upload and keeps what it is.
    fn commit(
        &mut self,
        part: &Part,
        format: UploadFormat,
        expected: Option<BlobDigest>,
        label: Option<String>,
    ) -> Result<BlobOutcome, OpError> {
        let raw = part.digest();
        if let Some(expected) = expected.filter(|&expected| expected != raw) {
            return Err(OpError::Digest { expected, found: raw });
        }
        match format {
            UploadFormat::Model => self.keep_model_file(part, raw, label),
            UploadFormat::Lora => self.keep_adapter(read_lora(part)?, raw, label),
            UploadFormat::Canonical => self.keep_adapter(read_canonical(part)?, raw, label),
        }
    }

    fn keep_adapter(
        &mut self,
        (set, report): (PatchSet, KeyReport),
        raw: BlobDigest,
        label: Option<String>,
    ) -> Result<BlobOutcome, OpError> {
        let bytes = set.to_bytes();
        let adapter = AdapterId::of(&bytes);
        let size = bytes.len() as u64;
        let name = BlobName::Adapter(adapter);
        self.forget(name);
        let sidecar = Sidecar { label, raw: vec![raw], reader: adapter::READER_VERSION };
        let sidecar = self.layout.store(adapter, &bytes, sidecar)?;
        self.verified.insert(name);
        let blob = StoredBlob { adapter, bytes: size, label: sidecar.label, raw: sidecar.raw };
        Ok(BlobOutcome::Committed { blob, report })
    }

    /// Keeps the file as it is; what is in it is for workers to judge.
    fn keep_model_file(
        &mut self,
        part: &Part,
        blob: BlobDigest,
        label: Option<String>,
    ) -> Result<BlobOutcome, OpError> {
        let bytes = part.len();
        if bytes > limits::MODEL_BYTES_MAX {
            return Err(OpError::ModelTooLarge { bytes });
        }
        let name = BlobName::ModelFile(blob);
        self.forget(name);
        let label = self.layout.store_model_file(blob, part, label)?.label;
        self.verified.insert(name);
        Ok(BlobOutcome::CommittedModelFile(StoredModelFile { blob, bytes, label }))
    }

    fn read(
        &mut self,
        blob: BlobName,
        (offset, length): (u64, u32),
        events: &mut Vec<BlobEvent>,
    ) -> Result<BlobOutcome, OpError> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != blob) {
            self.open_verified(blob, events)?;
        }
        let Some((_, file)) = &self.open else { return Err(OpError::NotStored(blob)) };
        let path = self.layout.blob(blob);
        if offset == 0 {
            // The order of use survives a restart as the files' times; without it nothing is lost.
            let _ = file.set_modified(SystemTime::now());
        }
        let size = file.metadata().doing("read", &path)?.len();
        let rest = size.saturating_sub(offset);
        let length = usize::try_from(rest.min(u64::from(length))).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length.min(limits::UPLOAD_CHUNK_BYTES_MAX)];
        file.read_exact_at(&mut bytes, offset).doing("read", &path)?;
        Ok(BlobOutcome::Read { size, bytes: Bytes::from(bytes) })
    }

    /// Opens a blob, once its content is known to be what its name says.
    fn open_verified(
        &mut self,
        blob: BlobName,
        events: &mut Vec<BlobEvent>,
    ) -> Result<(), OpError> {
        let path = self.layout.blob(blob);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let reason = "its file is gone".to_owned();
                events.push(BlobEvent::Removed { blob, reason });
                return Err(OpError::NotStored(blob));
            }
            Err(error) => return Err(error).doing("open", &path).map_err(Into::into),
        };
        if !self.verified.contains(&blob) {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(&file).doing("verify", &path)?;
            let found = BlobDigest::from_bytes(hasher.finalize().into());
            if found != blob.digest() {
                self.layout.remove(blob)?;
                let reason = format!("its bytes hash to `{found}`: the disk changed them");
                events.push(BlobEvent::Removed { blob, reason });
                return Err(OpError::Rotten { blob, found });
            }
            self.verified.insert(blob);
        }
        self.open = Some((blob, file));
        Ok(())
    }

    fn delete(&mut self, blobs: &[BlobName]) -> Result<(), OpError> {
        for &blob in blobs {
            self.forget(blob);
            self.layout.remove(blob)?;
        }
        Ok(())
    }

    /// Forgets what this process knows of a blob's file.
    fn forget(&mut self, blob: BlobName) {
        self.verified.remove(&blob);
        self.open.take_if(|(open, _)| *open == blob);
    }
}

/// Makes an adapter of a LoRA file as it is found in the wild.
fn read_lora(part: &Part) -> Result<(PatchSet, KeyReport), OpError> {
    let (set, report) = adapter::read_lora(&FileSource::new(part.file(), part.len()))?;
    let report = KeyReport {
        targets: count(report.targets.len()),
        unmatched: listed(&report.unmatched),
        ignored: count(report.ignored_keys),
    };
    Ok((set, report))
}

/// Reads an adapter that is canonical already.
fn read_canonical(part: &Part) -> Result<(PatchSet, KeyReport), OpError> {
    if part.len() > CANONICAL_BYTES_MAX {
        return Err(OpError::CanonicalTooLarge { bytes: part.len() });
    }
    let set = PatchSet::from_bytes(&part.read_all()?)?;
    let report = KeyReport {
        targets: count(set.patches().len()),
        unmatched: listed(set.unmatched()),
        ignored: 0,
    };
    Ok((set, report))
}

/// As many of `keys` as fit in a reply, and a last entry that counts the others.
fn listed(keys: &[String]) -> Vec<String> {
    let mut room = UNMATCHED_BYTES_MAX;
    let fits = |key: &&String| {
        let left = room.checked_sub(key.len());
        room = left.unwrap_or(0);
        left.is_some()
    };
    let mut listed: Vec<String> = keys.iter().take_while(fits).cloned().collect();
    if listed.len() < keys.len() {
        listed.push(format!("… and {} more", keys.len() - listed.len()));
    }
    listed
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
