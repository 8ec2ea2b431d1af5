//! A file on its way to its name: written beside it, and gone if it is given up.
//!
//! Several workers of a machine may share a directory. Each holds a lock on what it writes, so that
//! what a crash left behind is told from what another process is writing, and is removed.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// How the name of an unfinished file ends.
const EXTENSION: &str = "part";

/// Unfinished files for one name at the same time.
const PARTS_MAX: usize = 64;

/// An unfinished file. Dropping it removes it.
#[derive(Debug)]
pub(super) struct PartFile {
    path: PathBuf,
    pub(super) file: File,
    is_kept: bool,
}

impl PartFile {
    /// An empty file beside `target`, for this user alone.
    pub(super) fn create(target: &Path) -> io::Result<Self> {
        for index in 0..PARTS_MAX {
            let path = target.with_extension(format!("{index}.{EXTENSION}"));
            let mut options = OpenOptions::new();
            let file = match options.write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            // Another process may have seen the file before it was locked, and cleared it away.
            if try_lock(&file)? && is_at(&file, &path) {
                return Ok(Self { path, file, is_kept: false });
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Where the file is until it is kept.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name, so that it is there as a whole also after a power cut.
    pub(super) fn keep(mut self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target)?;
        self.is_kept = true;
        match target.parent() {
            Some(directory) => File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.is_kept {
            // What stays behind is cleared away before the next download.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the unfinished files in `directory` that no process is writing.
pub(super) fn remove_abandoned(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() != Some(OsStr::new(EXTENSION)) {
            continue;
        }
        let file = match File::open(&path) {
            Ok(file) => file,
            // Finished or given up meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // It may have got its name meanwhile, and another file its place.
        if try_lock(&file)? && is_at(&file, &path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Whether `file` was not locked, and is now.
fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(path)) => identity(file) == identity(path),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_part_that_is_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.safetensors");
        let mut part = PartFile::create(&target).unwrap();
        part.file.write_all(b"half").unwrap();
        assert_eq!(names(folder.path()), ["x.0.part"]);
        drop(part);
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[test]
    fn a_kept_part_has_its_name_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.safetensors");
        let [mut first, second] = [(); 2].map(|()| PartFile::create(&target).unwrap());
        first.file.write_all(b"whole").unwrap();
        first.keep(&target).unwrap();
        drop(second);
        assert_eq!(names(folder.path()), ["x.safetensors"]);
        assert_eq!(fs::read(&target).unwrap(), b"whole");
    }

    #[test]
    fn only_what_nobody_writes_is_cleared_away() {
        let folder = tempfile::tempdir().unwrap();
        let live = PartFile::create(&folder.path().join("live.safetensors")).unwrap();
        for abandoned in ["dead.0.part", "dead.7.part"] {
            fs::write(folder.path().join(abandoned), b"half").unwrap();
        }
        fs::write(folder.path().join("done.safetensors"), b"whole").unwrap();
        remove_abandoned(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["done.safetensors", "live.0.part"]);
        drop(live);
    }

    #[test]
    fn there_are_not_endlessly_many_parts_of_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.safetensors");
        let parts: Vec<_> = (0..PARTS_MAX).map(|_| PartFile::create(&target).unwrap()).collect();
        let error = PartFile::create(&target).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        drop(parts);
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }
}
