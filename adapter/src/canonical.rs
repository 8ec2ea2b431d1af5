//! The one form in which an adapter is stored, sent and named: canonical v1, a safetensors file.
//!
//! Layout and reasons are in `docs/adapter-format.md`. The writer is our own because the digest
//! depends on every byte: order, spaces and offsets may not change with a library's version.

use std::{borrow::Cow, collections::BTreeMap};

use protocol::{AdapterId, Dtype};
use serde::Serialize;

use crate::{
    container::{Container, Header, LENGTH_BYTES},
    error::{AdapterError, CanonicalError, clip},
    limits::Limits,
    matrix::Matrix,
    patch::{LowRank, Patch, check_low_rank},
    patch_set::PatchSet,
    target::Target,
    tensor::Tensor,
};

/// The mark of this format and its version, the metadata entry `format`.
pub const FORMAT: &str = "luna-adapter/1";

const FORMAT_KEY: &str = "format";
const UNMATCHED_KEY: &str = "unmatched";

/// The header's length is a multiple of this; spaces fill it up.
const HEADER_ALIGNMENT: usize = 8;

/// Between a target and what the tensor is to it.
const ROLE_SEPARATOR: char = '/';

const LORA_UP: &str = "lora.up";
const LORA_DOWN: &str = "lora.down";
const LORA_MID: &str = "lora.mid";
const LORA_ALPHA: &str = "lora.alpha";
const LORA_ROLES: [&str; 4] = [LORA_UP, LORA_DOWN, LORA_MID, LORA_ALPHA];

impl PatchSet {
    /// The canonical bytes: equal for equal content, different for different content.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Counted first: a vector that grows would hold up to twice the adapter.
        let mut length = 0;
        write(self, &mut |piece| length += piece.len());
        let mut bytes = Vec::with_capacity(length);
        write(self, &mut |piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// The adapter's identity: the BLAKE3 digest of [`PatchSet::to_bytes`], without making them.
    pub fn id(&self) -> AdapterId {
        let mut hasher = blake3::Hasher::new();
        write(self, &mut |piece| {
            hasher.update(piece);
        });
        AdapterId::from_bytes(hasher.finalize().into())
    }

    /// Reads canonical bytes, with the default limits.
    ///
    /// # Errors
    ///
    /// Anything that [`PatchSet::to_bytes`] would not have written.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AdapterError> {
        Self::from_bytes_with(bytes, &Limits::default())
    }

    /// As [`PatchSet::from_bytes`], with limits of the caller's.
    ///
    /// # Errors
    ///
    /// As [`PatchSet::from_bytes`].
    pub fn from_bytes_with(bytes: &[u8], limits: &Limits) -> Result<Self, AdapterError> {
        let file = Container::open(bytes, limits)?;
        check_format(file.header())?;
        let mut patches = BTreeMap::new();
        for (target, roles) in by_target(file.header())? {
            let patch = read_patch(&file, &target, &roles, limits)?;
            patches.insert(target, patch);
        }
        let set = Self::new(patches, unmatched(file.header()))?;
        match first_difference(&set, bytes) {
            Some(offset) => Err(CanonicalError::NotCanonical { offset }.into()),
            None => Ok(set),
        }
    }
}

/// One tensor of a patch.
struct Part<'p> {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Cow<'p, [u8]>,
}

/// Fields are in the order of their names, as everything in a canonical header is.
#[derive(Serialize)]
struct WrittenHeader<'p> {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<&'static str, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'p str, WrittenTensor<'p>>,
}

#[derive(Serialize)]
struct WrittenTensor<'p> {
    data_offsets: [usize; 2],
    dtype: safetensors::Dtype,
    shape: &'p [usize],
}

type Roles<'f> = BTreeMap<&'f str, Tensor<'f>>;

/// Feeds the canonical bytes of `set` to `sink`, piece by piece.
fn write(set: &PatchSet, sink: &mut dyn FnMut(&[u8])) {
    let mut parts = BTreeMap::new();
    for (target, patch) in set.patches() {
        for (role, part) in parts_of(patch) {
            parts.insert(format!("{target}{ROLE_SEPARATOR}{role}"), part);
        }
    }
    let header = header_of(&parts, set.unmatched());
    sink(&(header.len() as u64).to_le_bytes());
    sink(&header);
    for part in parts.values() {
        sink(&part.bytes);
    }
}

fn header_of(parts: &BTreeMap<String, Part<'_>>, unmatched: &[String]) -> Vec<u8> {
    let mut start = 0;
    let mut tensors = BTreeMap::new();
    for (name, part) in parts {
        let end = start + part.bytes.len();
        let tensor =
            WrittenTensor { data_offsets: [start, end], dtype: part.dtype, shape: &part.shape };
        tensors.insert(name.as_str(), tensor);
        start = end;
    }
    let metadata =
        BTreeMap::from([(FORMAT_KEY, FORMAT.to_owned()), (UNMATCHED_KEY, unmatched.join("\n"))]);
    let mut json = serde_json::to_vec(&WrittenHeader { metadata, tensors })
        .expect("text keys and integers are always JSON");
    json.resize(json.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    json
}

/// The tensors of `patch` by role. A new kind of patch is a new arm here and in [`read_patch`].
fn parts_of(patch: &Patch) -> Vec<(&'static str, Part<'_>)> {
    match patch {
        Patch::LowRank(lora) => {
            let mut parts =
                vec![(LORA_UP, matrix_part(lora.up())), (LORA_DOWN, matrix_part(lora.down()))];
            parts.extend(lora.mid().map(|mid| (LORA_MID, matrix_part(mid))));
            parts.extend(lora.alpha().map(|alpha| (LORA_ALPHA, scalar_part(alpha))));
            parts
        }
    }
}

fn matrix_part(matrix: &Matrix) -> Part<'_> {
    let dtype = match matrix.dtype() {
        Dtype::Float32 => safetensors::Dtype::F32,
        Dtype::Float16 => safetensors::Dtype::F16,
        Dtype::Bfloat16 => safetensors::Dtype::BF16,
    };
    Part { dtype, shape: matrix.shape().to_vec(), bytes: Cow::Borrowed(matrix.bytes()) }
}

/// Scalars are always f64, so that their source's type leaves no trace.
fn scalar_part(value: f64) -> Part<'static> {
    let bytes = value.to_le_bytes().to_vec();
    Part { dtype: safetensors::Dtype::F64, shape: Vec::new(), bytes: Cow::Owned(bytes) }
}

fn check_format(header: &Header) -> Result<(), CanonicalError> {
    let found = header.metadata.get(FORMAT_KEY).map_or("", String::as_str);
    if found == FORMAT { Ok(()) } else { Err(CanonicalError::Format { found: clip(found) }) }
}

fn unmatched(header: &Header) -> Vec<String> {
    let joined = header.metadata.get(UNMATCHED_KEY).map_or("", String::as_str);
    if joined.is_empty() { Vec::new() } else { joined.split('\n').map(str::to_owned).collect() }
}

fn by_target(header: &Header) -> Result<BTreeMap<Target, Roles<'_>>, CanonicalError> {
    let mut targets: BTreeMap<Target, Roles<'_>> = BTreeMap::new();
    for (name, info) in &header.tensors {
        let (target, role) = name
            .split_once(ROLE_SEPARATOR)
            .ok_or_else(|| CanonicalError::Name { name: clip(name) })?;
        targets.entry(target.parse()?).or_default().insert(role, Tensor { key: name, info });
    }
    Ok(targets)
}

fn read_patch(
    file: &Container<'_, [u8]>,
    target: &Target,
    roles: &Roles<'_>,
    limits: &Limits,
) -> Result<Patch, AdapterError> {
    if let Some((_, tensor)) = roles.iter().find(|(role, _)| !LORA_ROLES.contains(role)) {
        return Err(CanonicalError::UnknownPart { name: clip(tensor.key) }.into());
    }
    let needed = |role: &str| {
        let missing =
            || CanonicalError::MissingPart { name: format!("{target}{ROLE_SEPARATOR}{role}") };
        roles.get(role).copied().ok_or_else(missing)
    };
    let (up, down, mid) = (needed(LORA_UP)?, needed(LORA_DOWN)?, roles.get(LORA_MID));
    let (up_shape, down_shape) = (up.flattened()?, down.flattened()?);
    let mid_shape = mid.map(|mid| mid.flattened()).transpose()?;
    let name = target.to_string();
    check_low_rank(&name, [up_shape, down_shape], mid_shape, limits)?;

    let up = up.read_matrix(file, up_shape)?;
    let down = down.read_matrix(file, down_shape)?;
    let mid = mid.zip(mid_shape).map(|(mid, shape)| mid.read_matrix(file, shape)).transpose()?;
    let alpha = roles.get(LORA_ALPHA).map(|alpha| alpha.read_alpha(file)).transpose()?;
    let patch = LowRank::new(up, down, mid, alpha)
        .map_err(|source| AdapterError::LowRank { key: name, source })?;
    Ok(Patch::LowRank(patch))
}

/// Where `bytes` leave the canonical form of `set`, if they do.
fn first_difference(set: &PatchSet, bytes: &[u8]) -> Option<usize> {
    let mut rest = bytes;
    let mut difference = None;
    write(set, &mut |piece| {
        if difference.is_some() {
            return;
        }
        if let Some(after) = rest.strip_prefix(piece) {
            rest = after;
        } else {
            let equal = rest.iter().zip(piece).take_while(|(ours, theirs)| ours == theirs).count();
            difference = Some(bytes.len() - rest.len() + equal);
        }
    });
    difference.or_else(|| (!rest.is_empty()).then(|| bytes.len() - rest.len()))
}

// The header starts at a multiple of its alignment, so the data does too.
const _: () = assert!(LENGTH_BYTES.is_multiple_of(HEADER_ALIGNMENT));
