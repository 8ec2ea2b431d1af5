//! The safetensors container: a header that is checked whole, then tensors read one by one.
//!
//! The `safetensors` crate lends its names of element types. Its reader is not used on files from
//! strangers: it wants the whole file in memory, lets the last of two equal names win, and takes
//! headers of 100 MB.

use std::{collections::BTreeMap, fmt};

use safetensors::tensor::TensorInfo;
use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor},
};

use crate::{
    error::{FileError, clip},
    limits::Limits,
    source::ByteSource,
};

/// The entry of a header that is not a tensor.
pub(crate) const METADATA: &str = "__metadata__";

/// The text in the metadata that marks a canonical adapter.
pub(crate) const FORMAT_KEY: &str = "format";

/// The text in the metadata that lists keys which no rule took.
pub(crate) const UNMATCHED_KEY: &str = "unmatched";

/// Bytes of the header's length, which stands first: little-endian.
pub(crate) const LENGTH_BYTES: usize = 8;

/// An open file: its header, checked, and the source to read tensors from.
pub(crate) struct Container<'s, S: ?Sized> {
    source: &'s S,
    header: Header,
    data_start: u64,
}

/// What the header says, in name order.
#[derive(Debug, Default)]
pub(crate) struct Header {
    /// Those of the file's free texts that mean something here.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Type, shape and place of every tensor.
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

impl<'s, S: ByteSource + ?Sized> Container<'s, S> {
    /// Reads and checks the header of `source`.
    ///
    /// Afterwards every tensor's size is that of its type and shape, the tensors follow each other
    /// without holes or overlaps, and they end where the file ends.
    pub(crate) fn open(source: &'s S, limits: &Limits) -> Result<Self, FileError> {
        let file_bytes = source.byte_len();
        let header_bytes = header_length(source, limits)?;
        if file_bytes > limits.file_bytes_max {
            return Err(FileError::TooLarge { bytes: file_bytes, limit: limits.file_bytes_max });
        }
        let data_start = header_bytes.saturating_add(LENGTH_BYTES as u64);
        if data_start > file_bytes {
            return Err(FileError::Truncated { expected: data_start, actual: file_bytes });
        }
        let header = read_exactly(source, LENGTH_BYTES as u64, to_usize(header_bytes)?)?;
        let header = Header::parse(&header, limits.tensors_max)?;
        let expected = data_start.saturating_add(header.data_bytes()? as u64);
        if expected > file_bytes {
            return Err(FileError::Truncated { expected, actual: file_bytes });
        }
        if expected < file_bytes {
            return Err(FileError::TrailingBytes { expected, actual: file_bytes });
        }
        Ok(Self { source, header, data_start })
    }

    /// The tensors of `header` in a source that holds nothing else, one after the other.
    ///
    /// What holds after [`Container::open`] holds here too.
    pub(crate) fn of(source: &'s S, header: Header, limits: &Limits) -> Result<Self, FileError> {
        if header.tensors.len() > limits.tensors_max {
            return Err(FileError::TooManyTensors { limit: limits.tensors_max });
        }
        let (bytes, limit) = (source.byte_len(), limits.file_bytes_max);
        if bytes > limit {
            return Err(FileError::TooLarge { bytes, limit });
        }
        let expected = header.data_bytes()? as u64;
        if expected != bytes {
            return Err(FileError::Truncated { expected, actual: bytes });
        }
        Ok(Self { source, header, data_start: 0 })
    }

    /// The file's header.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// The bytes of `tensor`, which is one of the header's.
    pub(crate) fn read(&self, tensor: &TensorInfo) -> Result<Vec<u8>, FileError> {
        let (start, end) = tensor.data_offsets;
        read_exactly(self.source, self.data_start.saturating_add(start as u64), end - start)
    }
}

impl Header {
    fn parse(json: &[u8], tensors_max: usize) -> Result<Self, FileError> {
        let mut fault = None;
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let header = HeaderVisitor { tensors_max, fault: &mut fault }
            .deserialize(&mut deserializer)
            .and_then(|header| deserializer.end().map(|()| header));
        header.map_err(|error| fault.unwrap_or_else(|| FileError::Header(clip(&error.to_string()))))
    }

    /// Checks size and place of every tensor; returns where the last one ends.
    fn data_bytes(&self) -> Result<usize, FileError> {
        let mut by_place: Vec<_> = self.tensors.iter().collect();
        by_place.sort_by_key(|(_, tensor)| tensor.data_offsets);
        let mut expected = 0;
        for (name, tensor) in by_place {
            let (start, end) = tensor.data_offsets;
            if end.checked_sub(start).is_none_or(|bytes| tensor_bytes(tensor) != Some(bytes)) {
                return Err(FileError::TensorSize {
                    name: clip(name),
                    dtype: tensor.dtype.to_string(),
                    shape: clip(&format!("{:?}", tensor.shape)),
                    start,
                    end,
                });
            }
            if start != expected {
                return Err(FileError::TensorPlace { name: clip(name), start, expected });
            }
            expected = end;
        }
        Ok(expected)
    }
}

/// Collects a header; faults that have a name of their own are left in `fault`.
struct HeaderVisitor<'f> {
    tensors_max: usize,
    fault: &'f mut Option<FileError>,
}

impl<'de> DeserializeSeed<'de> for HeaderVisitor<'_> {
    type Value = Header;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from names to tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            let is_metadata = name == METADATA;
            let fault = if header.tensors.contains_key(&name) || (is_metadata && metadata.is_some())
            {
                FileError::DuplicateName { name: clip(&name) }
            } else if is_metadata {
                metadata = Some(map.next_value::<Metadata>()?);
                continue;
            } else if header.tensors.len() == self.tensors_max {
                FileError::TooManyTensors { limit: self.tensors_max }
            } else {
                header.tensors.insert(name, map.next_value()?);
                continue;
            };
            *self.fault = Some(fault);
            return Err(A::Error::custom("refused"));
        }
        header.metadata = metadata.unwrap_or_default().0;
        Ok(header)
    }
}

/// The metadata with known names. Trainers leave many more, which may not cost memory.
#[derive(Default)]
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MetadataVisitor)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from names to texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut metadata = Metadata::default();
        while let Some(name) = map.next_key::<String>()? {
            // One text at a time: all of them together are no larger than the header.
            let text = map.next_value::<String>()?;
            if [FORMAT_KEY, UNMATCHED_KEY].contains(&name.as_str()) {
                metadata.0.insert(name, text);
            }
        }
        Ok(metadata)
    }
}

/// Reads the header's length and makes sure that a header follows.
fn header_length<S: ByteSource + ?Sized>(source: &S, limits: &Limits) -> Result<u64, FileError> {
    /// The length and the header's first byte.
    const START_BYTES: usize = LENGTH_BYTES + 1;
    let available = to_usize(source.byte_len().min(START_BYTES as u64))?;
    let start = read_exactly(source, 0, available)?;
    let Some((length, [b'{'])) = start.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(not_safetensors(&start));
    };
    let bytes = u64::from_le_bytes(*length);
    if bytes > limits.header_bytes_max {
        return Err(FileError::HeaderTooLarge { bytes, limit: limits.header_bytes_max });
    }
    Ok(bytes)
}

/// Names what a file is that does not start as a safetensors file does.
fn not_safetensors(start: &[u8]) -> FileError {
    match start {
        [b'P', b'K', 3, 4, ..] => FileError::Pickle("zip archive with a pickle inside"),
        // PROTO opcode and a protocol number: what every pickle since protocol 2 starts with.
        [0x80, 2..=5, ..] => FileError::Pickle("pickle"),
        _ => FileError::NotSafetensors,
    }
}

fn read_exactly<S: ByteSource + ?Sized>(
    source: &S,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, FileError> {
    let bytes = source.read(offset, length)?;
    if bytes.len() == length {
        return Ok(bytes);
    }
    let reason = format!("{} bytes read at {offset}: expected {length}", bytes.len());
    Err(FileError::Io(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason)))
}

/// Size of a tensor, or nothing if it overflows or is not whole bytes.
///
/// Zeros are left out of the first product, so that a dimension of 2^64 - 1 is refused beside one
/// of 0 too.
fn tensor_bytes(tensor: &TensorInfo) -> Option<usize> {
    let bits = tensor
        .shape
        .iter()
        .filter(|dimension| **dimension != 0)
        .try_fold(tensor.dtype.bitsize(), |product, dimension| product.checked_mul(*dimension))?;
    if tensor.shape.contains(&0) {
        return Some(0);
    }
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn to_usize(bytes: u64) -> Result<usize, FileError> {
    usize::try_from(bytes).map_err(|_| FileError::TooLarge { bytes, limit: usize::MAX as u64 })
}
