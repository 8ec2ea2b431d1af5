//! Adapters and files of models on disk, named by the digest of their content.
//!
//! ```text
//! STORE/lock                 held by the one process that uses the store
//! STORE/uploads/….part       files that are being uploaded, or whose uploads broke off
//! STORE/uploads/….sums       what the parts hash to, to go on with them; see `sums`
//! STORE/blobs/ab/ab12…       canonical bytes of adapters; the name is their digest
//! STORE/blobs/ab/ab12….json  what people call it, and the digests of the files it came from
//! STORE/models/ab/ab12…      files of models as they were uploaded, with `.json` beside them
//! STORE/registrations.json   the models that were registered
//! ```
//!
//! **Invariants.** A blob is complete and verified before its name exists, because it is written
//! elsewhere, synced and renamed. What is served was verified by this process, and so is the part
//! of an upload that goes on. What the store holds in excess is for the core to say; nothing here
//! decides what to keep.
//!
//! What takes long is not done here but given back as a [`Task`], to be done aside.

mod aside;
mod commit;
mod error;
mod layout;
mod part;
mod registered;
mod source;
mod sums;
mod thread;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use broker_core::{
    BlobEvent, BlobName, BlobOp, BlobOutcome, KeptPart, PartName, Registration, StoredBlob,
    StoredModelFile,
};
use bytes::Bytes;
use protocol::{BlobDigest, UploadId, limits};

pub use error::{DiskError, StoreError};
pub(crate) use thread::StoreThread;

use aside::{Finished, Task};
use commit::Announced;
use error::{IoContext as _, OpError};
use layout::Layout;
use part::Part;

/// The directory, and what is open in it.
#[derive(Debug)]
pub(crate) struct BlobStore {
    layout: Arc<Layout>,
    parts: BTreeMap<UploadId, Part>,
    /// Uploads whose kept parts are being verified.
    resuming: BTreeSet<UploadId>,
    kept: BTreeMap<PartName, Kept>,
    /// Blobs whose content this process has verified.
    verified: BTreeSet<BlobName>,
    /// Blobs whose content is being verified.
    verifying: BTreeSet<BlobName>,
    /// The blob that was read last; fetches come in runs of chunks.
    open: Option<(BlobName, File)>,
}

/// A part whose upload broke off.
#[derive(Debug)]
enum Kept {
    /// This process wrote it, or verified it.
    Known(Box<Part>),
    /// It was there on start.
    Found(PathBuf),
}

/// What a store held when it was opened, least recently used first.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) adapters: Vec<StoredBlob>,
    pub(crate) model_files: Vec<StoredModelFile>,
    pub(crate) registrations: Vec<Registration>,
    pub(crate) parts: Vec<KeptPart>,
}

/// What became of a command for now.
#[derive(Debug)]
enum Step {
    /// It is done, or has failed.
    Done(Result<BlobOutcome, OpError>),
    /// This is to be done aside; [`BlobStore::finish`] ends it.
    Aside(Task),
    /// It can be tried again once this blob is verified, which the task does unless one is under
    /// way.
    Behind(BlobName, Option<Task>),
}

impl BlobStore {
    /// Opens the store in `directory`, which is made if it does not exist. Returns it with what it
    /// holds.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Found), StoreError> {
        let layout = Layout::open(directory)?;
        let (parts, paths): (Vec<_>, Vec<_>) = layout.list_parts()?.into_iter().unzip();
        let kept = parts.iter().map(|kept| kept.part).zip(paths.into_iter().map(Kept::Found));
        let kept = kept.collect();
        let found = Found {
            adapters: layout.list()?,
            model_files: layout.list_model_files()?,
            registrations: registered::load(&layout.registrations())?,
            parts,
        };
        let store = Self {
            layout: Arc::new(layout),
            parts: BTreeMap::new(),
            resuming: BTreeSet::new(),
            kept,
            verified: BTreeSet::new(),
            verifying: BTreeSet::new(),
            open: None,
        };
        Ok((store, found))
    }

    /// Does one thing, or begins it. Events beside its outcome are appended to `events`.
    fn start(&mut self, op: BlobOp, events: &mut Vec<BlobEvent>) -> Step {
        match op {
            BlobOp::Begin { upload, part, .. } => self.begin(upload, part),
            BlobOp::Append { upload, bytes } => Step::Done(self.append(&upload, &bytes)),
            BlobOp::Commit { upload, format, digest, label } => match self.parts.remove(&upload) {
                Some(part) => {
                    let announced = Announced { format, digest, label };
                    Step::Aside(Task::Commit { part: Box::new(part), announced })
                }
                None => Step::Done(Err(OpError::NotOpen(upload))),
            },
            BlobOp::Abort { upload } => {
                self.resuming.remove(&upload);
                let part = self.parts.remove(&upload);
                discard(part.into_iter().map(Part::into_path).collect())
            }
            BlobOp::Keep { upload } => Step::Done(self.keep(&upload)),
            BlobOp::DropParts { parts } => {
                let kept = parts.iter().filter_map(|part| self.kept.remove(part));
                discard(kept.map(Kept::into_path).collect())
            }
            BlobOp::Read { blob, offset, length } => self.read(blob, (offset, length), events),
            BlobOp::Delete { blobs } => {
                self.forget_all(&blobs);
                Step::Aside(Task::Delete { blobs })
            }
            BlobOp::Remember { registrations } => Step::Aside(Task::Remember { registrations }),
        }
    }

    /// Takes in what was done aside for a command that is ended by that.
    fn finish(&mut self, finished: Finished) -> Result<BlobOutcome, OpError> {
        match finished {
            Finished::Resumed { upload, name, part } => self.resumed(upload, name, part),
            Finished::Deleted { blobs, result } => {
                self.forget_all(&blobs);
                result.map(|()| BlobOutcome::Done).map_err(Into::into)
            }
            Finished::Other(outcome) => {
                let blob = match &outcome {
                    Ok(BlobOutcome::Committed { blob, .. }) => BlobName::Adapter(blob.adapter),
                    Ok(BlobOutcome::CommittedModelFile(file)) => BlobName::ModelFile(file.blob),
                    _ => return outcome,
                };
                self.forget(blob);
                self.verified.insert(blob);
                outcome
            }
            Finished::Verified { blob, found } => {
                let verified = self.verified(blob, found, &mut Vec::new());
                verified.map(|()| BlobOutcome::Done)
            }
        }
    }

    /// Takes in what a blob's file hashes to. What is not what its name says is removed.
    fn verified(
        &mut self,
        blob: BlobName,
        found: Result<BlobDigest, DiskError>,
        events: &mut Vec<BlobEvent>,
    ) -> Result<(), OpError> {
        if !self.verifying.remove(&blob) {
            return Ok(()); // It was removed or replaced in the meantime.
        }
        let found = found?;
        if found == blob.digest() {
            self.verified.insert(blob);
            return Ok(());
        }
        self.layout.remove(blob)?;
        let reason = format!("its bytes hash to `{found}`: the disk changed them");
        events.push(BlobEvent::Removed { blob, reason });
        Err(OpError::Rotten { blob, found })
    }

    /// Has everything that can be gone on with survive the end of this process.
    pub(crate) fn close(self) {
        for mut part in self.parts.into_values() {
            if let Err(error) = part.record() {
                tracing::warn!(%error, "the end of an upload is not kept");
            }
        }
    }

    fn begin(&mut self, upload: UploadId, name: Option<PartName>) -> Step {
        match name.and_then(|name| Some((name, self.kept.remove(&name)?))) {
            Some((_, Kept::Known(part))) => {
                let received = part.len();
                self.parts.insert(upload, *part);
                Step::Done(Ok(BlobOutcome::Begun { received }))
            }
            Some((name, Kept::Found(path))) => {
                self.resuming.insert(upload.clone());
                Step::Aside(Task::Resume { upload, name, path })
            }
            None => Step::Done(self.create(upload, name)),
        }
    }

    fn create(&mut self, upload: UploadId, name: Option<PartName>) -> Result<BlobOutcome, OpError> {
        let part = Part::create(self.layout.part(&upload, name.as_ref()), name)?;
        self.parts.insert(upload, part);
        Ok(BlobOutcome::Begun { received: 0 })
    }

    /// Goes on with what can be believed of a kept part, or from the start.
    fn resumed(
        &mut self,
        upload: UploadId,
        name: PartName,
        part: Result<Box<Part>, DiskError>,
    ) -> Result<BlobOutcome, OpError> {
        let is_wanted = self.resuming.remove(&upload);
        match part {
            Ok(part) if is_wanted => {
                let received = part.len();
                self.parts.insert(upload, *part);
                Ok(BlobOutcome::Begun { received })
            }
            Ok(part) => {
                part.discard();
                Err(OpError::NotOpen(upload))
            }
            Err(error) if is_wanted => {
                tracing::warn!(%error, "the {name} is sent again from the start");
                self.create(upload, Some(name))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes at the end of an upload. One that cannot be written is gone, and its room free.
    fn append(&mut self, upload: &UploadId, bytes: &[u8]) -> Result<BlobOutcome, OpError> {
        let part = self.parts.get_mut(upload).ok_or_else(|| OpError::NotOpen(upload.clone()))?;
        let written = part.append(bytes);
        if written.is_err()
            && let Some(part) = self.parts.remove(upload)
        {
            part.discard();
        }
        written.map(|()| BlobOutcome::Done).map_err(Into::into)
    }

    fn keep(&mut self, upload: &UploadId) -> Result<BlobOutcome, OpError> {
        let part = self.parts.remove(upload).ok_or_else(|| OpError::NotOpen(upload.clone()))?;
        let mut part = Box::new(part);
        let recorded = part.record();
        let name = part.name().filter(|_| recorded.is_ok());
        match name.map(|name| self.kept.insert(name, Kept::Known(part))) {
            Some(older) => older.into_iter().for_each(|older| part::remove(&older.into_path())),
            None => {
                return Err(recorded.err().map_or(OpError::NotOpen(upload.clone()), Into::into));
            }
        }
        Ok(BlobOutcome::Done)
    }

    fn read(&mut self, blob: BlobName, place: (u64, u32), events: &mut Vec<BlobEvent>) -> Step {
        if self.verifying.contains(&blob) {
            return Step::Behind(blob, None);
        }
        if self.open.as_ref().is_none_or(|(open, _)| *open != blob) {
            let file = match self.open_blob(blob, events) {
                Ok(file) => file,
                Err(error) => return Step::Done(Err(error)),
            };
            if !self.verified.contains(&blob) {
                self.verifying.insert(blob);
                let path = self.layout.blob(blob);
                return Step::Behind(blob, Some(Task::Verify { blob, file, path }));
            }
            self.open = Some((blob, file));
        }
        Step::Done(self.read_open(blob, place))
    }

    fn read_open(
        &self,
        blob: BlobName,
        (offset, length): (u64, u32),
    ) -> Result<BlobOutcome, OpError> {
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

    fn open_blob(&self, blob: BlobName, events: &mut Vec<BlobEvent>) -> Result<File, OpError> {
        let path = self.layout.blob(blob);
        match File::open(&path) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let reason = "its file is gone".to_owned();
                events.push(BlobEvent::Removed { blob, reason });
                Err(OpError::NotStored(blob))
            }
            Err(error) => Err(error).doing("open", &path).map_err(Into::into),
        }
    }

    fn forget_all(&mut self, blobs: &[BlobName]) {
        for &blob in blobs {
            self.forget(blob);
        }
    }

    /// Forgets what this process knows of a blob's file.
    fn forget(&mut self, blob: BlobName) {
        self.verified.remove(&blob);
        self.verifying.remove(&blob);
        self.open.take_if(|(open, _)| *open == blob);
    }
}

impl Kept {
    fn into_path(self) -> PathBuf {
        match self {
            Self::Known(part) => part.into_path(),
            Self::Found(path) => path,
        }
    }
}

/// Removes parts aside: the system takes a while to free a large file.
fn discard(paths: Vec<PathBuf>) -> Step {
    if paths.is_empty() {
        return Step::Done(Ok(BlobOutcome::Done));
    }
    Step::Aside(Task::Discard { paths })
}

#[cfg(test)]
mod tests;
