//! Finding the files of models, and storing those that are uploaded, on a thread of its own.
//!
//! Looking up a path may wait for a network, and a file that is here already is read once for its
//! digest; neither is work for the loop. Tasks are done in the order in which they were given. The
//! loop gives a chunk only when the last ones are stored, so few of them wait here.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use bytes::Bytes;
use protocol::{BlobDigest, Failure, request::ModelFile};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    download::{DownloadError, ModelDownload},
    roots::ModelRoots,
};
use crate::{arrival::Arrival, failure::WireError as _};

/// What the thread does.
#[derive(Debug)]
pub(crate) enum FileTask {
    /// Looks for a file, and prepares to store it if it is an uploaded one that is not here.
    Find(ModelFile),
    /// Removes the uploaded files that are not among these.
    Keep(BTreeSet<BlobDigest>),
    /// Stores the next bytes of an uploaded file.
    Append(BlobDigest, Bytes),
    /// Checks an uploaded file that is complete.
    Finish(BlobDigest),
    /// Nobody wants the file any more.
    Abandon(BlobDigest),
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum FileEvent {
    /// The file is here, without links and with its digest.
    Found(ModelFile, PathBuf),
    /// An uploaded file is not here: its bytes can be given, from the first one on.
    Begun(BlobDigest),
    /// So many bytes of an uploaded file are stored.
    Stored(BlobDigest, u64),
    /// There is no such file, it may not be used, or it cannot be stored.
    Failed(ModelFile, Failure),
}

/// The thread's handle; it ends when the handle is dropped.
#[derive(Debug)]
pub(crate) struct ModelFiles(Sender<FileTask>);

impl ModelFiles {
    /// Starts the thread, which looks up paths in `roots`, stores files in `directory` and reports
    /// to `arrivals`.
    pub(crate) fn spawn(
        roots: ModelRoots,
        directory: PathBuf,
        arrivals: UnboundedSender<Arrival>,
    ) -> io::Result<Self> {
        let (tasks, accepted) = channel();
        let worker = Worker { roots, directory, downloads: BTreeMap::new() };
        thread::Builder::new()
            .name("model-files".to_owned())
            .spawn(move || worker.work(&accepted, &arrivals))?;
        Ok(Self(tasks))
    }

    /// Hands over a task.
    pub(crate) fn give(&self, task: FileTask) {
        self.0.send(task).expect("the thread lives as long as its handle");
    }
}

struct Worker {
    roots: ModelRoots,
    directory: PathBuf,
    downloads: BTreeMap<BlobDigest, ModelDownload>,
}

impl Worker {
    fn work(mut self, tasks: &Receiver<FileTask>, arrivals: &UnboundedSender<Arrival>) {
        for task in tasks {
            let Some(event) = self.perform(task) else { continue };
            if arrivals.send(Arrival::File(event)).is_err() {
                return; // the loop has ended, and nobody wants to know any more
            }
        }
    }

    fn perform(&mut self, task: FileTask) -> Option<FileEvent> {
        match task {
            FileTask::Find(ModelFile::Path(path)) => Some(self.find_path(path)),
            FileTask::Find(ModelFile::Blob(blob)) => {
                Some(self.find_blob(blob).unwrap_or_else(|error| failed(blob, &error)))
            }
            FileTask::Keep(wanted) => {
                if let Err(error) = ModelDownload::remove_others(&self.directory, &wanted) {
                    tracing::warn!(%error, "files of models that nothing needs stay on disk");
                }
                None
            }
            FileTask::Append(blob, bytes) => self.append(blob, &bytes),
            FileTask::Finish(blob) => {
                let path = self.downloads.remove(&blob)?.finish();
                Some(path.map_or_else(
                    |error| failed(blob, &error),
                    |path| FileEvent::Found(ModelFile::Blob(blob), path),
                ))
            }
            FileTask::Abandon(blob) => {
                self.downloads.remove(&blob);
                None
            }
        }
    }

    fn find_path(&self, path: String) -> FileEvent {
        match self.roots.resolve(&path) {
            Ok(found) => FileEvent::Found(ModelFile::Path(path), found),
            Err(error) => FileEvent::Failed(ModelFile::Path(path), error.to_failure()),
        }
    }

    fn find_blob(&mut self, blob: BlobDigest) -> Result<FileEvent, DownloadError> {
        if self.downloads.contains_key(&blob) {
            return Ok(FileEvent::Begun(blob));
        }
        if let Some(path) = ModelDownload::find(&self.directory, blob)? {
            return Ok(FileEvent::Found(ModelFile::Blob(blob), path));
        }
        let download = ModelDownload::begin(&self.directory, blob)?;
        self.downloads.insert(blob, download);
        Ok(FileEvent::Begun(blob))
    }

    /// What comes after a failure belongs to a file that is given up.
    fn append(&mut self, blob: BlobDigest, bytes: &[u8]) -> Option<FileEvent> {
        let download = self.downloads.get_mut(&blob)?;
        if let Err(error) = download.append(bytes) {
            self.downloads.remove(&blob);
            return Some(failed(blob, &error));
        }
        Some(FileEvent::Stored(blob, download.bytes()))
    }
}

fn failed(blob: BlobDigest, error: &DownloadError) -> FileEvent {
    FileEvent::Failed(ModelFile::Blob(blob), error.to_failure())
}
