//! The cache on a thread of its own, so that the disk never delays the loop.
//!
//! Tasks are done in the order in which they were given, so a blob that is written is there when it
//! is read.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use protocol::AdapterId;
use tokio::sync::mpsc::UnboundedSender;
use worker_core::Origin;

use super::BlobCache;
use crate::arrival::{Arrival, read_adapter};

/// Blobs that may wait in memory to be written; more are not cached.
const WRITES_MAX: usize = 8;

/// The thread's handle; it ends, its tasks done, when the handle is dropped.
#[derive(Debug)]
pub(crate) struct CacheThread {
    tasks: Sender<Task>,
    writes: Arc<AtomicUsize>,
}

/// A blob is too much for the disk at the moment.
#[derive(Debug)]
pub(crate) struct Busy;

enum Task {
    Read(AdapterId),
    Write(AdapterId, Vec<u8>),
    Remove(AdapterId),
}

impl CacheThread {
    /// Starts the thread. What comes of its tasks goes to `arrivals`.
    pub(crate) fn spawn(cache: BlobCache, arrivals: UnboundedSender<Arrival>) -> io::Result<Self> {
        let (tasks, accepted) = channel();
        let writes = Arc::new(AtomicUsize::new(0));
        let worker = Worker { cache, arrivals, writes: Arc::clone(&writes), in_trouble: false };
        thread::Builder::new()
            .name("blob-cache".to_owned())
            .spawn(move || worker.work(&accepted))?;
        Ok(Self { tasks, writes })
    }

    /// Reads an adapter; it arrives, or its copy on disk is reported lost.
    pub(crate) fn read(&self, adapter: AdapterId) {
        self.give(Task::Read(adapter));
    }

    /// Writes a verified blob; only a failure is reported.
    pub(crate) fn write(&self, adapter: AdapterId, blob: Vec<u8>) -> Result<(), Busy> {
        if self.writes.fetch_add(1, Ordering::Relaxed) >= WRITES_MAX {
            self.writes.fetch_sub(1, Ordering::Relaxed);
            return Err(Busy);
        }
        self.give(Task::Write(adapter, blob));
        Ok(())
    }

    /// Deletes an adapter's copy on disk.
    pub(crate) fn remove(&self, adapter: AdapterId) {
        self.give(Task::Remove(adapter));
    }

    fn give(&self, task: Task) {
        self.tasks.send(task).expect("the thread lives as long as its handle");
    }
}

struct Worker {
    cache: BlobCache,
    arrivals: UnboundedSender<Arrival>,
    writes: Arc<AtomicUsize>,
    /// Whether the last write failed, so that a full disk is told once.
    in_trouble: bool,
}

impl Worker {
    fn work(mut self, tasks: &Receiver<Task>) {
        for task in tasks {
            let arrival = match task {
                Task::Read(adapter) => Some(self.read(adapter)),
                Task::Write(adapter, blob) => self.write(adapter, &blob),
                Task::Remove(adapter) => {
                    if let Err(error) = self.cache.remove(adapter.into()) {
                        tracing::warn!(adapter = adapter.short(), %error, "cannot delete from the cache");
                    }
                    None
                }
            };
            if arrival.is_some_and(|arrival| self.arrivals.send(arrival).is_err()) {
                return; // the loop has ended, and nobody wants to know any more
            }
        }
    }

    fn read(&self, adapter: AdapterId) -> Arrival {
        match self.cache.read(adapter.into()) {
            Ok(blob) => read_adapter(adapter, blob, Origin::Disk),
            Err(error) => {
                tracing::warn!(adapter = adapter.short(), %error, "cannot read from the cache");
                Arrival::DiskLost(adapter)
            }
        }
    }

    fn write(&mut self, adapter: AdapterId, blob: &[u8]) -> Option<Arrival> {
        let written = self.cache.write(adapter.into(), blob);
        self.writes.fetch_sub(1, Ordering::Relaxed);
        match written {
            Ok(()) => {
                self.in_trouble = false;
                None
            }
            Err(error) => {
                if !self.in_trouble {
                    tracing::warn!(%error, "cannot write to the cache: going on without it");
                }
                self.in_trouble = true;
                Some(Arrival::DiskLost(adapter))
            }
        }
    }
}
