//! The one form in which an adapter is stored, sent and named: canonical v1, a safetensors file.
//!
//! Layout and reasons are in `docs/adapter-format.md`. The writer is our own because the digest
//! depends on every byte: order, spaces and offsets may not change with a library's version.

use std::{borrow::Cow, collections::BTreeMap, io};

use protocol::{AdapterId, Dtype};
use serde::Serialize;

use crate::{
    array::Array,
    container::{Container, FORMAT_KEY, Header, LENGTH_BYTES, UNMATCHED_KEY},
    error::{AdapterError, CanonicalError, FileError, clip},
    limits::{Limits, UNMATCHED_KEYS_MAX},
    matrix::Matrix,
    parts::{ALPHA, DORA_SCALE, DOWN, MARK, MID, MissingPart, Parts, UP, VALUE, W1, W2, parts_of},
    patch::{Factor, Patch, PatchKind},
    patch_set::PatchSet,
    source::ByteSource,
    target::Target,
    tensor::{Tensor, file_dtype},
};

/// The mark of this format and its version, the metadata entry `format`.
pub const FORMAT: &str = "luna-adapter/1";

/// The header's length is a multiple of this; spaces fill it up.
const HEADER_ALIGNMENT: usize = 8;

/// Bytes that are compared at once.
const COMPARED_BYTES: usize = 1 << 20;

/// Between a target and what the tensor is to it.
const ROLE_SEPARATOR: char = '/';

/// Between a kind and one of its parts.
const PART_SEPARATOR: char = '.';

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

    /// Writes the canonical bytes piece by piece, without making them.
    ///
    /// # Errors
    ///
    /// Whatever `out` reports; then some of the bytes may be written.
    pub fn write_to(&self, out: &mut impl io::Write) -> io::Result<()> {
        let mut outcome = Ok(());
        write(self, &mut |piece| {
            if outcome.is_ok() {
                outcome = out.write_all(piece);
            }
        });
        outcome
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
        Self::from_source_with(bytes, limits)
    }

    /// As [`PatchSet::from_bytes`], from bytes that are never in memory beside what is made of them.
    ///
    /// # Errors
    ///
    /// As [`PatchSet::from_bytes`], and whatever the medium reports.
    pub fn from_source<S: ByteSource + ?Sized>(source: &S) -> Result<Self, AdapterError> {
        Self::from_source_with(source, &Limits::default())
    }

    fn from_source_with<S: ByteSource + ?Sized>(
        source: &S,
        limits: &Limits,
    ) -> Result<Self, AdapterError> {
        let file = Container::open(source, limits)?;
        check_format(file.header())?;
        let set = Self::new(read_patches(&file, limits)?, unmatched(file.header())?)?;
        match first_difference(&set, source).map_err(FileError::Io)? {
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

type Found<'f> = (PatchKind, BTreeMap<&'static str, Tensor<'f>>);

/// Feeds the canonical bytes of `set` to `sink`, piece by piece.
fn write(set: &PatchSet, sink: &mut dyn FnMut(&[u8])) {
    let mut parts = BTreeMap::new();
    for (target, patch) in set.patches() {
        for (name, part) in written_parts(patch) {
            parts.insert(tensor_name(target, patch.kind(), name), part);
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

/// The name of the tensor that is `part` of a patch.
pub(crate) fn tensor_name(target: &Target, kind: PatchKind, part: &str) -> String {
    format!("{target}{ROLE_SEPARATOR}{}{PART_SEPARATOR}{part}", kind.name())
}

/// The tensors of `patch` by part.
fn written_parts(patch: &Patch) -> Vec<(&'static str, Part<'_>)> {
    let mut parts = match patch {
        Patch::LowRank(lora) => {
            let mut parts = vec![(UP, matrix(lora.up())), (DOWN, matrix(lora.down()))];
            parts.extend(lora.mid().map(|mid| (MID, matrix(mid))));
            parts
        }
        Patch::Hadamard(loha) => {
            let mut parts = vec![
                ("w1_a", matrix(loha.w1_a())),
                ("w1_b", matrix(loha.w1_b())),
                ("w2_a", matrix(loha.w2_a())),
                ("w2_b", matrix(loha.w2_b())),
            ];
            parts.extend(loha.t1().map(|core| ("t1", array(core))));
            parts.extend(loha.t2().map(|core| ("t2", array(core))));
            parts
        }
        Patch::Kronecker(lokr) => {
            let mut parts = factor(W1, lokr.w1());
            parts.extend(factor(W2, lokr.w2()));
            parts.extend(lokr.t2().map(|core| ("t2", array(core))));
            parts
        }
        Patch::Glora(glora) => vec![
            ("a1", matrix(glora.a1())),
            ("a2", matrix(glora.a2())),
            ("b1", matrix(glora.b1())),
            ("b2", matrix(glora.b2())),
        ],
        Patch::Oft(oft) => rotation(oft.blocks(), oft.rescale()),
        Patch::Boft(boft) => rotation(boft.blocks(), boft.rescale()),
        Patch::Diff(diff) => vec![(VALUE, array(diff.value()))],
        Patch::Set(set) => vec![(VALUE, array(set.value()))],
        Patch::ModelAsLora(other) => vec![(VALUE, array(other.value()))],
        Patch::Unchanged => vec![(MARK, numbers(Dtype::Float32, &[0], &[]))],
    };
    parts.extend(patch.alpha().map(|alpha| (ALPHA, scalar(alpha))));
    parts.extend(patch.dora_scale().map(|scale| (DORA_SCALE, matrix(scale))));
    parts
}

fn factor<'p>(
    [full, a_name, b_name]: [&'static str; 3],
    factor: &'p Factor,
) -> Vec<(&'static str, Part<'p>)> {
    match factor {
        Factor::Full(whole) => vec![(full, matrix(whole))],
        Factor::LowRank { a, b } => vec![(a_name, matrix(a)), (b_name, matrix(b))],
    }
}

fn rotation<'p>(blocks: &'p Array, rescale: Option<&'p Array>) -> Vec<(&'static str, Part<'p>)> {
    let rescale = rescale.map(|rescale| ("rescale", array(rescale)));
    [("blocks", array(blocks))].into_iter().chain(rescale).collect()
}

fn matrix(matrix: &Matrix) -> Part<'_> {
    numbers(matrix.dtype(), &matrix.shape(), matrix.bytes())
}

fn array(array: &Array) -> Part<'_> {
    numbers(array.dtype(), array.shape(), array.bytes())
}

fn numbers<'p>(dtype: Dtype, shape: &[usize], bytes: &'p [u8]) -> Part<'p> {
    Part { dtype: file_dtype(dtype), shape: shape.to_vec(), bytes: Cow::Borrowed(bytes) }
}

/// Scalars are always f64, so that their source's type leaves no trace.
fn scalar(value: f64) -> Part<'static> {
    let bytes = value.to_le_bytes().to_vec();
    Part { dtype: safetensors::Dtype::F64, shape: Vec::new(), bytes: Cow::Owned(bytes) }
}

fn check_format(header: &Header) -> Result<(), CanonicalError> {
    let found = header.metadata.get(FORMAT_KEY).map_or("", String::as_str);
    if found == FORMAT { Ok(()) } else { Err(CanonicalError::Format { found: clip(found) }) }
}

fn unmatched(header: &Header) -> Result<Vec<String>, AdapterError> {
    let joined = header.metadata.get(UNMATCHED_KEY).map_or("", String::as_str);
    if joined.is_empty() {
        return Ok(Vec::new());
    }
    // A header of megabytes can name millions of keys of one letter.
    if joined.split('\n').count() > UNMATCHED_KEYS_MAX {
        return Err(AdapterError::TooManyUnmatched);
    }
    Ok(joined.split('\n').map(str::to_owned).collect())
}

/// The patches of a container whose tensors have canonical names.
pub(crate) fn read_patches<S: ByteSource + ?Sized>(
    file: &Container<'_, S>,
    limits: &Limits,
) -> Result<BTreeMap<Target, Patch>, AdapterError> {
    let mut checked = BTreeMap::new();
    for (target, (kind, tensors)) in by_target(file.header())? {
        let parts = complete(&target, kind, tensors)?;
        parts.check(limits)?;
        checked.insert(target, parts);
    }
    // Read last, so that nothing is allocated for what is refused by its header.
    checked.into_iter().map(|(target, parts)| Ok((target, parts.read(file)?))).collect()
}

fn by_target(header: &Header) -> Result<BTreeMap<Target, Found<'_>>, CanonicalError> {
    let mut targets: BTreeMap<Target, Found<'_>> = BTreeMap::new();
    for (name, info) in &header.tensors {
        let (target, role) = name
            .split_once(ROLE_SEPARATOR)
            .ok_or_else(|| CanonicalError::Name { name: clip(name) })?;
        let target = target.parse()?;
        let (kind, part) =
            known(role).ok_or_else(|| CanonicalError::UnknownPart { name: clip(name) })?;
        let (first_kind, tensors) = targets.entry(target).or_insert((kind, BTreeMap::new()));
        if *first_kind != kind {
            return Err(CanonicalError::SecondKind { name: clip(name) });
        }
        tensors.insert(part, Tensor { key: name, info });
    }
    Ok(targets)
}

/// The kind and part that `role` names, if this version knows them.
fn known(role: &str) -> Option<(PatchKind, &'static str)> {
    let (kind, part) = role.split_once(PART_SEPARATOR)?;
    let kind = PatchKind::ALL.into_iter().find(|known| known.name() == kind)?;
    let part = parts_of(kind).iter().find(|known| **known == part)?;
    Some((kind, part))
}

fn complete<'f>(
    target: &Target,
    kind: PatchKind,
    tensors: BTreeMap<&'static str, Tensor<'f>>,
) -> Result<Parts<'f>, CanonicalError> {
    Parts::new(kind, target.to_string(), tensors).map_err(|MissingPart(part)| {
        CanonicalError::MissingPart { name: tensor_name(target, kind, part) }
    })
}

/// Where the bytes of `source` leave the canonical form of `set`, if they do.
fn first_difference<S: ByteSource + ?Sized>(
    set: &PatchSet,
    source: &S,
) -> io::Result<Option<usize>> {
    let length = usize::try_from(source.byte_len()).unwrap_or(usize::MAX);
    let mut at = 0;
    let mut outcome = Ok(None);
    write(set, &mut |piece| {
        for block in piece.chunks(COMPARED_BYTES) {
            if !matches!(outcome, Ok(None)) {
                return;
            }
            match source.read(at as u64, block.len().min(length - at)) {
                Ok(theirs) => {
                    let equal = equal_bytes(&theirs, block);
                    at += equal;
                    outcome = Ok((equal < block.len()).then_some(at));
                }
                Err(error) => outcome = Err(error),
            }
        }
    });
    outcome.map(|difference| difference.or_else(|| (at < length).then_some(at)))
}

/// How many bytes are the same before the first difference.
fn equal_bytes(theirs: &[u8], ours: &[u8]) -> usize {
    if theirs == ours {
        return ours.len();
    }
    theirs.iter().zip(ours).take_while(|(theirs, ours)| theirs == ours).count()
}

// The header starts at a multiple of its alignment, so the data does too.
const _: () = assert!(LENGTH_BYTES.is_multiple_of(HEADER_ALIGNMENT));
