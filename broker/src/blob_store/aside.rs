//! Work that takes long for a large file, on threads beside the store's own, so that a chunk that a
//! worker waits for is read at once in the meantime.
//!
//! There are two lanes. One verifies what is on the disk. The other changes what the store holds,
//! in the order in which it is told, so that a commit and a deletion of one adapter end as given.

use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use broker_core::{BlobName, BlobOutcome, PartName, Registration, Ticket};
use protocol::{BlobDigest, UploadId};

use super::{
    commit::{Announced, commit},
    error::{DiskError, IoContext as _, OpError},
    layout::Layout,
    part::{self, Part},
    registered,
};

/// What is done aside.
#[derive(Debug)]
pub(super) enum Task {
    /// Find out how much of a kept part can be believed.
    Resume { upload: UploadId, name: PartName, path: PathBuf },
    /// Find out what a blob's file hashes to.
    Verify { blob: BlobName, file: File, path: PathBuf },
    /// Keep an upload as what it is.
    Commit { part: Box<Part>, announced: Announced },
    /// Remove blobs.
    Delete { blobs: Vec<BlobName> },
    /// Remove parts that nobody goes on with.
    Discard { paths: Vec<PathBuf> },
    /// Write down what is registered.
    Remember { registrations: Vec<Registration> },
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Finished {
    Resumed { upload: UploadId, name: PartName, part: Result<Box<Part>, DiskError> },
    Verified { blob: BlobName, found: Result<BlobDigest, DiskError> },
    Deleted { blobs: Vec<BlobName>, result: Result<(), DiskError> },
    Other(Result<BlobOutcome, OpError>),
}

impl Task {
    /// Does it. `stop` ends what only reads.
    pub(super) fn run(self, layout: &Layout, stop: &AtomicBool) -> Finished {
        match self {
            Self::Resume { upload, name, path } => {
                let part = Part::resume(&path, name, stop).map(Box::new);
                Finished::Resumed { upload, name, part }
            }
            Self::Verify { blob, file, path } => {
                Finished::Verified { blob, found: part::digest(&file, stop).doing("verify", &path) }
            }
            Self::Commit { part, announced } => Finished::Other(commit(layout, *part, announced)),
            Self::Delete { blobs } => {
                let result = blobs.iter().try_for_each(|&blob| layout.remove(blob));
                Finished::Deleted { blobs, result }
            }
            Self::Discard { paths } => {
                for path in &paths {
                    part::remove(path);
                }
                Finished::Other(Ok(BlobOutcome::Done))
            }
            Self::Remember { registrations } => {
                let text = registered::text(registrations);
                let written = layout.write_in_root(&layout.registrations(), &text);
                Finished::Other(written.map(|()| BlobOutcome::Done).map_err(OpError::from))
            }
        }
    }

    fn only_reads(&self) -> bool {
        matches!(self, Self::Resume { .. } | Self::Verify { .. })
    }
}

/// The threads.
#[derive(Debug)]
pub(super) struct Lanes {
    checks: Lane,
    changes: Lane,
    stop: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Lane {
    tasks: mpsc::Sender<(Ticket, Task)>,
    thread: JoinHandle<()>,
}

/// A lane has ended before its time.
#[derive(Debug)]
pub(super) struct LaneEnded;

impl Lanes {
    /// Starts the threads, which hand what came of each task to a copy of `done`; when one of them
    /// panics, it hands over nothing.
    pub(super) fn spawn<F>(layout: &Arc<Layout>, done: F) -> io::Result<Self>
    where
        F: Fn(Option<(Ticket, Finished)>) + Clone + Send + 'static,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let lane = |name: &str| {
            let (tasks, given) = mpsc::channel::<(Ticket, Task)>();
            let (layout, stop, done) = (Arc::clone(layout), Arc::clone(&stop), done.clone());
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                let obituary = Obituary(&done);
                for (ticket, task) in given {
                    (obituary.0)(Some((ticket, task.run(&layout, &stop))));
                }
            })?;
            io::Result::Ok(Lane { tasks, thread })
        };
        let (checks, changes) = (lane("luna-store-check")?, lane("luna-store-keep")?);
        Ok(Self { checks, changes, stop })
    }

    /// Hands a task to the lane that it belongs to.
    pub(super) fn give(&self, ticket: Ticket, task: Task) -> Result<(), LaneEnded> {
        let lane = if task.only_reads() { &self.checks } else { &self.changes };
        lane.tasks.send((ticket, task)).map_err(|_| LaneEnded)
    }

    /// Ends the threads: what changes the store is finished, what only reads is not.
    pub(super) fn close(self) {
        self.stop.store(true, Ordering::Relaxed);
        for Lane { tasks, thread } in [self.checks, self.changes] {
            drop(tasks);
            if thread.join().is_err() {
                tracing::error!("a thread of the blob store has panicked");
            }
        }
    }
}

/// Tells of a thread's untimely end.
struct Obituary<'f, F: Fn(Option<(Ticket, Finished)>)>(&'f F);

impl<F: Fn(Option<(Ticket, Finished)>)> Drop for Obituary<'_, F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)(None);
        }
    }
}
