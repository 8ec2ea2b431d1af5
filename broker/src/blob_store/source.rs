//! A file as the adapter reader wants it: bytes at any place, read when asked for.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use adapter::ByteSource;

/// A file that nobody else writes to, read with positioned reads.
#[derive(Debug)]
pub(super) struct FileSource<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> FileSource<'a> {
    /// The first `len` bytes of `file`.
    pub(super) fn new(file: &'a File, len: u64) -> Self {
        Self { file, len }
    }
}

impl ByteSource for FileSource<'_> {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
