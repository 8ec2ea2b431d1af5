//! Where the files of uploaded models are: in the worker's cache, or for want of one in a directory
//! that goes when the worker goes. (One that is killed leaves it to whoever clears away temporary
//! files.)

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// The directory. It is made when its first file comes.
#[derive(Debug)]
pub(crate) struct ModelDirectory {
    path: PathBuf,
    is_temporary: bool,
}

impl ModelDirectory {
    /// A directory that stays.
    pub(crate) const fn kept(path: PathBuf) -> Self {
        Self { path, is_temporary: false }
    }

    /// A directory that is deleted when this is dropped. Nobody else can guess `random`, so nobody
    /// else has made it.
    pub(crate) fn temporary(random: u64) -> Self {
        let path = env::temp_dir().join(format!("luna-models-{random:016x}"));
        Self { path, is_temporary: true }
    }

    /// Where it is, or will be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ModelDirectory {
    fn drop(&mut self) {
        if !self.is_temporary {
            return;
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "temporary models stay behind");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_directory_goes_and_a_kept_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        drop(ModelDirectory::kept(folder.path().to_owned()));
        assert!(folder.path().exists());

        let name = folder.path().file_name().unwrap().to_str().unwrap();
        let random = u64::from_be_bytes(*name.as_bytes().last_chunk().unwrap());
        drop(ModelDirectory::temporary(random)); // it was never made
        let directory = ModelDirectory::temporary(random);
        let path = directory.path().to_owned();
        fs::create_dir_all(path.join("models")).unwrap();
        fs::write(path.join("models/x"), b"x").unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}
