//! A safetensors file, mapped into memory and read tensor by tensor.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};

use super::error::LoadError;

/// Bytes of a header; those of SDXL checkpoints are below 1 MiB.
const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;

/// A mapped file with its parsed and validated header.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
}

/// What the header says about one tensor.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes of the map; the header was checked, so they are inside it and fit dtype and shape.
    range: Range<usize>,
}

impl TensorFile {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let map = map(path).map_err(|source| LoadError::Open { file: path.to_owned(), source })?;
        if let Some(length) = map.first_chunk::<LENGTH_BYTES>() {
            let found = u64::from_le_bytes(*length);
            if found > HEADER_BYTES_MAX {
                let (file, most) = (path.to_owned(), HEADER_BYTES_MAX);
                return Err(LoadError::HeaderSize { file, found, most });
            }
        }
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|source| LoadError::Header { file: path.to_owned(), source })?;
        let start = LENGTH_BYTES + header;
        let entry = |info: &safetensors::tensor::TensorInfo| Entry {
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + info.data_offsets.0..start + info.data_offsets.1,
        };
        let entries = metadata.tensors().into_iter().map(|(name, info)| (name, entry(info)));
        Ok(Self { path: path.to_owned(), entries: entries.collect(), map })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn entry(&self, tensor: &str) -> Result<&Entry, LoadError> {
        self.entries.get(tensor).ok_or_else(|| LoadError::MissingTensor {
            file: self.path.clone(),
            tensor: tensor.to_owned(),
        })
    }

    pub(super) fn contains(&self, tensor: &str) -> bool {
        self.entries.contains_key(tensor)
    }

    /// The elements' bytes.
    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.range.clone()]
    }

    /// Gives the pages of a tensor back to the system. They are read again from the file if
    /// somebody asks; failing only costs memory, so nothing is reported.
    #[expect(unsafe_code, reason = "memory mapping is a promise about other processes")]
    pub(super) fn release(&self, entry: &Entry) {
        // SAFETY: the map is shared and read-only, so its pages are never dirty, and dropping
        // clean pages of a file changes nothing that can be read through them.
        let _ = unsafe {
            self.map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                entry.range.start,
                entry.range.len(),
            )
        };
    }
}

#[expect(unsafe_code, reason = "memory mapping is a promise about other processes")]
fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the map is only read as bytes, for which every bit pattern is valid. Whoever
    // changes a model file while it is loaded changes what is loaded, as with any reader, and the
    // digest says what that was; whoever truncates it then kills the worker with SIGBUS, which
    // the operator's manual says and the supervisor repairs.
    let map = unsafe { Mmap::map(&file)? };
    // Only a hint: a system without it reads more slowly.
    let _ = map.advise(Advice::Sequential);
    Ok(map)
}
