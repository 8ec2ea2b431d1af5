//! What is uploaded, in memory or on disk, cut into chunks.
//!
//! A file is read by a thread of its own, a few chunks ahead, so that a file of gigabytes takes
//! megabytes of memory and no runtime waits for the disk.

use std::{path::PathBuf, sync::Arc};

use adapter::ByteSource as _;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    error::{Error, ErrorKind},
    file_source::FileSource,
};

/// Chunks that are read ahead.
const READ_AHEAD: usize = 4;

/// Bytes to send.
#[derive(Debug)]
pub(crate) enum Content {
    Memory(Bytes),
    File(Arc<OpenFile>),
}

/// A file and its path.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) path: PathBuf,
    pub(crate) source: FileSource,
}

/// The chunks from some offset on, each with its own.
#[derive(Debug)]
pub(crate) enum Chunks {
    Memory { bytes: Bytes, offset: usize, chunk_bytes: usize },
    File(mpsc::Receiver<Result<(u64, Bytes), Error>>),
}

impl Content {
    /// Bytes of all of it.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(file) => file.source.byte_len(),
        }
    }

    /// The chunks from `offset` on, which is at most the length.
    pub(crate) fn chunks(&self, offset: u64, chunk_bytes: usize) -> Result<Chunks, Error> {
        match self {
            Self::Memory(bytes) => Ok(Chunks::Memory {
                bytes: bytes.clone(),
                offset: usize::try_from(offset).expect("at most the length of the bytes"),
                chunk_bytes,
            }),
            Self::File(file) => {
                let (sender, chunks) = mpsc::channel(READ_AHEAD);
                let file = Arc::clone(file);
                std::thread::Builder::new()
                    .name("luna-reader".to_owned())
                    .spawn(move || file.read_chunks(offset, chunk_bytes, &sender))
                    .map_err(|error| {
                        Error::new(ErrorKind::Io, format!("cannot start a thread: {error}"))
                    })?;
                Ok(Chunks::File(chunks))
            }
        }
    }
}

impl OpenFile {
    /// Reads until the end of the file, or until nobody wants any more of it.
    fn read_chunks(
        &self,
        mut offset: u64,
        chunk_bytes: usize,
        chunks: &mpsc::Sender<Result<(u64, Bytes), Error>>,
    ) {
        let end = self.source.byte_len();
        while offset < end {
            let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(chunk_bytes);
            let read = self.source.read(offset, length);
            let chunk = read.map(|bytes| (offset, Bytes::from(bytes))).map_err(|error| {
                let path = self.path.display();
                Error::new(ErrorKind::Io, format!("cannot read `{path}`: {error}"))
            });
            let is_failed = chunk.is_err();
            if chunks.blocking_send(chunk).is_err() || is_failed {
                return;
            }
            offset += length as u64;
        }
    }
}

impl Chunks {
    /// The next chunk and where it belongs.
    pub(crate) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, Error> {
        match self {
            Self::Memory { bytes, offset, chunk_bytes } => {
                let start = *offset;
                let end = bytes.len().min(start + *chunk_bytes);
                *offset = end;
                Ok((start < end).then(|| (start as u64, bytes.slice(start..end))))
            }
            Self::File(chunks) => chunks.recv().await.transpose(),
        }
    }
}
