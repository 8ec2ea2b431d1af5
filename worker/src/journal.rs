//! The death journal: what this worker is busy with, written where it outlives the process.
//!
//! ```text
//! luna journal 1                                       head, fixed while the process lives
//! ended 00f3…27 1790000000                             an earlier process: epoch, Unix time
//! busy ab12…ef alone                                   what it was busy with
//! process 5c0e…91
//! busy 77d0…3a -----                                   a slot; blank when it is free
//! ```
//!
//! A slot is written in one go when the worker begins with a request, and blanked when it is done;
//! nothing grows and nothing is synced, as the journal has to survive the process, not the machine.
//! What is in the slots at the next start is what the process died with. A journal that cannot be
//! read or written is told in the log and never stops the worker.

mod text;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use protocol::{
    WorkerName,
    limits::{DEATHS_BUSY_MAX, DEATHS_MAX},
    worker::{Busy, Death},
};
use worker_core::DispatchId;

use self::text::{Ended, Slot};

/// Requests that are noted at once; more are not noted.
const SLOTS_MAX: usize = 64;

/// Bytes of a journal that are read.
const BYTES_MAX: u64 = 1 << 20;

/// How long an ended process is remembered.
const MEMORY: Duration = Duration::from_hours(24);

/// The journal of one worker, for one process.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    /// Where the slots begin.
    head_bytes: u64,
    slots: BTreeMap<DispatchId, usize>,
    free: BTreeSet<usize>,
    ended: Vec<Ended>,
    /// Whether writing failed once, which is told once.
    is_broken: bool,
    /// Held as long as this process uses the journal.
    _lock: File,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// Another process has it.
    #[error("another process uses the journal `{0}`: give every worker a name of its own")]
    InUse(PathBuf),
    /// The disk refuses.
    #[error("cannot use `{path}` for the journal: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl Journal {
    /// Opens the journal of `worker` in `directory`, which is made if it does not exist, for the
    /// process of this `epoch`. What the last process was busy with becomes its end.
    pub(crate) fn open(
        directory: &Path,
        worker: &WorkerName,
        epoch: u64,
    ) -> Result<Self, JournalError> {
        let path = directory.join(file_name(worker));
        let failed = |source| JournalError::Io { path: path.clone(), source };
        fs::create_dir_all(directory).map_err(failed)?;
        let lock = path.with_added_extension("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(lock);
        let lock = lock.map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse(path)),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let ended = read(&path, SystemTime::now());
        let head = text::head(&ended, epoch);
        // Until the new journal is complete the old one is there.
        let part = path.with_added_extension("part");
        fs::write(&part, &head).and_then(|()| fs::rename(&part, &path)).map_err(failed)?;
        let file = OpenOptions::new().write(true).open(&path).map_err(failed)?;
        Ok(Self {
            file,
            head_bytes: head.len() as u64,
            slots: BTreeMap::new(),
            free: (0..SLOTS_MAX).collect(),
            ended,
            is_broken: false,
            _lock: lock,
        })
    }

    /// The worker begins to read, load for or compute a dispatch.
    pub(crate) fn begin(&mut self, dispatch: DispatchId, busy: Busy) {
        if self.slots.contains_key(&dispatch) {
            return;
        }
        if let Some(slot) = self.free.pop_first() {
            self.slots.insert(dispatch, slot);
            self.write(slot, Slot::Busy(busy));
        }
    }

    /// The worker is done with a dispatch, or it merely waits.
    pub(crate) fn end(&mut self, dispatch: DispatchId) {
        if let Some(slot) = self.slots.remove(&dispatch) {
            self.free.insert(slot);
            self.write(slot, Slot::Free);
        }
    }

    /// The process ends in peace, whatever it leaves behind.
    pub(crate) fn close(&mut self) {
        for (_, slot) in std::mem::take(&mut self.slots) {
            self.write(slot, Slot::Free);
        }
    }

    /// How earlier processes ended, oldest first.
    pub(crate) fn deaths(&self) -> Vec<Death> {
        let now = SystemTime::now();
        let remembered = self.ended.iter().filter(|ended| ended.age(now) < MEMORY);
        remembered.map(|ended| ended.death(now)).collect()
    }

    fn write(&mut self, slot: usize, content: Slot) {
        let at = self.head_bytes + (slot * text::SLOT_BYTES) as u64;
        if let Err(error) = self.file.write_all_at(&content.to_bytes(), at)
            && !std::mem::replace(&mut self.is_broken, true)
        {
            tracing::warn!(%error, "the journal cannot be written: deaths may be blamed on others");
        }
    }
}

/// What an earlier process left; nothing when that is no journal, which is told in the log.
fn read(path: &Path, now: SystemTime) -> Vec<Ended> {
    let found = File::open(path).and_then(|file| {
        let mut bytes = Vec::new();
        let modified = file.metadata()?.modified()?;
        file.take(BYTES_MAX).read_to_end(&mut bytes)?;
        Ok((bytes, modified))
    });
    let (bytes, modified) = match found {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the journal cannot be read: it starts anew");
            return Vec::new();
        }
    };
    let at = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let Some(mut ended) = text::read(&bytes, at) else {
        tracing::warn!(path = %path.display(), "this is no journal: it starts anew");
        return Vec::new();
    };
    ended.retain(|ended| ended.age(now) < MEMORY);
    ended.drain(..ended.len().saturating_sub(DEATHS_MAX));
    let mut left = DEATHS_BUSY_MAX;
    for ended in ended.iter_mut().rev() {
        ended.busy_with.truncate(left);
        left -= ended.busy_with.len();
    }
    ended
}

/// A name may have slashes, and never a `%`.
fn file_name(worker: &WorkerName) -> String {
    format!("{}.journal", worker.as_str().replace('/', "%2F"))
}

#[cfg(test)]
mod tests;
