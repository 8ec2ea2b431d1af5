//! What a part of a file hashed to, up to several places: how much of it can be believed after a
//! crash.
//!
//! A record is written after the bytes that it is about. Neither is synced: after a power cut
//! either may be missing or torn, which the hash of the bytes that are there then shows.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::error::{DiskError, IoContext as _};

/// Bytes of one record: where it is, and the BLAKE3 digest of everything before.
const RECORD_BYTES: usize = 8 + 32;

/// Records that are read; those of the largest file in the smallest steps are fewer.
const RECORDS_MAX: usize = 1 << 18;

/// The file of records beside a part, open for more.
#[derive(Debug)]
pub(super) struct Sums {
    path: PathBuf,
    file: File,
    /// Where the last record is.
    end: u64,
}

/// The digest of the first `end` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) end: u64,
    pub(super) digest: [u8; 32],
}

impl Sums {
    /// An empty file of records beside the part at `part`.
    pub(super) fn create(part: &Path) -> Result<Self, DiskError> {
        let path = beside(part);
        let mut options = OpenOptions::new();
        let options = options.append(true).create_new(true).mode(0o600);
        let file = options.open(&path).doing("create", &path)?;
        Ok(Self { path, file, end: 0 })
    }

    /// The records beside the part at `part`, of which the first `count` stay.
    pub(super) fn reopen(part: &Path, count: usize, end: u64) -> Result<Self, DiskError> {
        let path = beside(part);
        let file = OpenOptions::new().append(true).open(&path).doing("open", &path)?;
        file.set_len((count * RECORD_BYTES) as u64).doing("write", &path)?;
        Ok(Self { path, file, end })
    }

    /// Where the last record is.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Adds a record.
    pub(super) fn add(&mut self, sum: Sum) -> Result<(), DiskError> {
        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&sum.end.to_le_bytes());
        record[8..].copy_from_slice(&sum.digest);
        self.file.write_all(&record).doing("write", &self.path)?;
        self.end = sum.end;
        Ok(())
    }
}

/// The records beside the part at `part`, in order; those from the first senseless one on are left
/// out.
pub(super) fn read(part: &Path) -> Result<Vec<Sum>, DiskError> {
    let path = beside(part);
    let file = File::open(&path).doing("open", &path)?;
    let mut bytes = Vec::new();
    file.take((RECORDS_MAX * RECORD_BYTES) as u64).read_to_end(&mut bytes).doing("read", &path)?;
    let mut sums: Vec<Sum> = Vec::with_capacity(bytes.len() / RECORD_BYTES);
    for record in bytes.chunks_exact(RECORD_BYTES) {
        let (end, digest) = record.split_at(8);
        let end = u64::from_le_bytes(end.try_into().expect("eight bytes were split off"));
        if end <= sums.last().map_or(0, |last| last.end) {
            break;
        }
        sums.push(Sum { end, digest: digest.try_into().expect("the rest is 32 bytes") });
    }
    Ok(sums)
}

/// Removes the records beside the part at `part`, if there are any.
pub(super) fn remove(part: &Path) {
    // What stays behind is cleared on the next start.
    let _ = fs::remove_file(beside(part));
}

/// Where the records of the part at `part` are.
pub(super) fn beside(part: &Path) -> PathBuf {
    part.with_extension("sums")
}
