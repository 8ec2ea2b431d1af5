//! A file on disk as a source of bytes: only the ranges that are asked for are read.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use adapter::ByteSource;

/// An open file.
#[derive(Debug)]
pub(crate) struct FileSource {
    file: File,
    bytes: u64,
}

impl FileSource {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(Self { file, bytes: metadata.len() })
    }
}

impl ByteSource for FileSource {
    fn byte_len(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let wanted = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
        if wanted.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
