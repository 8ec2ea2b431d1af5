//! Headers: MessagePack maps with named fields, tagged by `kind`.
//!
//! A header is read in two steps: first its kind and request id, then the fields of that kind.
//! So an unknown kind can be answered by name, and fields that this version does not know are
//! skipped. Reading is bounded in depth and must use up the whole frame.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{id::RequestId, limits};

/// The fields of one kind of message.
pub trait Header: Serialize + DeserializeOwned {
    /// The value of `kind` on the wire.
    const KIND: &'static str;
}

/// What every header can be asked before its kind is known.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Peek {
    /// The kind of message.
    pub kind: String,
    /// The request it belongs to.
    #[serde(default)]
    pub id: Option<RequestId>,
}

/// A header that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidHeader {
    /// Longer than the limit.
    #[error("the header has {bytes} bytes: at most {max} are accepted", max = limits::HEADER_BYTES_MAX)]
    TooLarge {
        /// Bytes of the frame.
        bytes: usize,
    },
    /// Not MessagePack, or not the fields that the kind asks for.
    #[error("the header cannot be read as MessagePack map: {0}")]
    Malformed(String),
    /// Bytes after the map.
    #[error("the header has {0} bytes after its MessagePack map")]
    Trailing(usize),
}

/// The header's bytes, `kind` first.
pub fn write<H: Header>(header: &H) -> Vec<u8> {
    let tagged = Tagged { kind: H::KIND, fields: header };
    rmp_serde::to_vec_named(&tagged).expect("headers hold nothing that MessagePack cannot write")
}

/// Kind and request id of a header.
///
/// # Errors
/// When the frame is no MessagePack map with a `kind`, or over a limit.
pub fn peek(frame: &[u8]) -> Result<Peek, InvalidHeader> {
    read_map(frame)
}

/// The fields of a header whose kind has been peeked.
///
/// # Errors
/// When a field is missing or of the wrong type, or a limit is exceeded.
pub fn read<H: Header>(frame: &[u8]) -> Result<H, InvalidHeader> {
    read_map(frame)
}

#[derive(Serialize)]
struct Tagged<'a, H> {
    kind: &'static str,
    #[serde(flatten)]
    fields: &'a H,
}

pub(crate) fn read_map<T: DeserializeOwned>(frame: &[u8]) -> Result<T, InvalidHeader> {
    if frame.len() > limits::HEADER_BYTES_MAX {
        return Err(InvalidHeader::TooLarge { bytes: frame.len() });
    }
    // rmp-serde reads an array as a struct too; the wire is maps with named fields only.
    if !frame.first().is_some_and(|&marker| is_map(marker)) {
        return Err(InvalidHeader::Malformed("it is not a map".to_owned()));
    }
    let mut deserializer = rmp_serde::Deserializer::new(frame);
    deserializer.set_max_depth(limits::HEADER_DEPTH_MAX);
    let value = T::deserialize(&mut deserializer)
        .map_err(|error| InvalidHeader::Malformed(error.to_string()))?;
    let rest = deserializer.get_ref().len();
    if rest > 0 {
        return Err(InvalidHeader::Trailing(rest));
    }
    Ok(value)
}

/// `fixmap`, `map 16` and `map 32` of the MessagePack specification.
fn is_map(marker: u8) -> bool {
    matches!(marker, 0x80..=0x8f | 0xde | 0xdf)
}
