//! From the patches that a ComfyUI process holds in memory to an adapter.
//!
//! ComfyUI's `add_patches` takes a dict from targets to objects with a kind and a tuple of tensors,
//! numbers and `None`. Each tensor gets its canonical name here and all of them make a container
//! that was never a file, so that the rules and limits for canonical bytes hold for objects too.
//! The orders of the tuples are those of ComfyUI 0.3.64.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    io,
};

use protocol::Dtype;
use safetensors::tensor::TensorInfo;

use crate::{
    canonical::{read_patches, tensor_name},
    container::{Container, Header},
    error::{AdapterError, CanonicalError, ErrorKind, clip, nothing_matches},
    limits::Limits,
    parts::{ALPHA, DORA_SCALE, DOWN, MARK, MID, UP, VALUE, drop_unused, missing},
    patch::PatchKind,
    patch_set::PatchSet,
    slice::{InvalidSlice, Slice},
    source::ByteSource,
    target::Target,
    tensor::{Tensor, file_dtype},
};

/// The slot of a `LoRA` that asks for a weight of another shape.
const RESHAPE: &str = "reshape_weight";
/// The slot of a full difference that may be larger than its weight.
const PAD: &str = "pad_weight";

/// Beginnings of targets in the text encoders that Luna has.
const COMPONENTS: [&str; 2] = ["clip_l.", "clip_g."];
/// The parameter of a CLIP model that has no part in encoding text.
const LOGIT_SCALE: &str = ".logit_scale";

/// One entry of a dict for `add_patches`, without strengths.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchObject<'a> {
    /// The parameter's name in ComfyUI's model: `clip_l.transformer.….weight`.
    pub target: &'a str,
    /// Dimension, start and length of the part that is patched, where it is not the whole.
    pub offset: Option<[i64; 3]>,
    /// The `name` of an adapter object (`lora`, `loha`, `lokr`, `glora`, `oft`, `boft`) or the first
    /// text of a tuple (`diff`, `set`, `model_as_lora`). `(t,)` and `(None,)` are of kind `diff`.
    pub kind: &'a str,
    /// What the adapter object's `weights` or the tuple holds, in order.
    pub weights: Vec<Element<'a>>,
}

/// One element of a tuple of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Element<'a> {
    /// `None`.
    Absent,
    /// A number.
    Scalar(f64),
    /// A tensor.
    Tensor(TensorView<'a>),
    /// The value of `pad_weight` in the dict that may follow a full difference.
    PadWeight(bool),
    /// Anything else, under a name for messages: a list of sizes, for example.
    Other(&'a str),
}

/// A tensor in somebody else's memory.
#[derive(Clone, Copy, PartialEq)]
pub struct TensorView<'a> {
    /// The element type as torch names it, without `torch.`: `float16`.
    pub dtype: &'a str,
    /// The size of every dimension.
    pub shape: &'a [usize],
    /// The elements: row-major, contiguous, little-endian.
    pub bytes: &'a [u8],
}

/// What became of the objects.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObjectReport {
    /// The parameters that are patched, in order.
    pub targets: Vec<Target>,
    /// Targets in a text encoder that no known model has, in order; they have no effect.
    pub unmatched: Vec<String>,
    /// How many objects belong to something else: the image model, another text encoder.
    pub foreign: usize,
}

/// Why an object is not a patch that Luna knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// A kind of a newer ComfyUI, or of a node pack.
    #[error("a patch of kind `{kind}` is not known: update Luna")]
    UnknownKind {
        /// The kind, cut to a length fit for a message.
        kind: String,
    },
    /// A tuple of another length.
    #[error("{kind} has {actual} weights: expected {expected}, as in ComfyUI 0.3.64")]
    Count {
        /// The kind.
        kind: PatchKind,
        /// Elements that are there.
        actual: usize,
        /// Elements of a tuple of this kind.
        expected: usize,
    },
    /// A number for a tensor, or the like.
    #[error("{part} is {actual}: expected {expected}")]
    Element {
        /// The part, named as in the canonical form.
        part: &'static str,
        /// What is there.
        actual: String,
        /// What should be there.
        expected: &'static str,
    },
    /// A difference that makes its weight larger.
    #[error("pad_weight is set: a text encoder's weights cannot change their shape")]
    PadWeight,
    /// An offset that no parameter can have.
    #[error(transparent)]
    Offset(#[from] InvalidSlice),
}

/// Whether an object of this `target` is looked at; the tensors of all others may be left out.
pub fn names_text_encoder(target: &str) -> bool {
    COMPONENTS.iter().any(|start| target.starts_with(start)) && !target.ends_with(LOGIT_SCALE)
}

/// Makes an adapter of patch objects, with the default limits.
///
/// Objects of the image model and of other text encoders are counted and skipped, as ComfyUI does.
/// Strengths, functions and merges are the caller's: the first belong to the stack entry, the
/// second cannot be content, and the third is a `diff` once the other weight is patched.
///
/// # Errors
///
/// An object is of an unknown kind, its tuple does not have the elements of its kind, it asks for
/// another shape of its weight, or its offset is none; tensors are misshapen, not finite or of
/// another type; something is over a limit, where all objects count as one file; targets overlap;
/// or there are objects for a text encoder and none patches a known parameter.
pub fn read_objects(objects: &[PatchObject<'_>]) -> Result<(PatchSet, ObjectReport), AdapterError> {
    read_objects_with(objects, &Limits::default())
}

/// As [`read_objects`], with limits of the caller's.
///
/// # Errors
///
/// As [`read_objects`].
pub fn read_objects_with(
    objects: &[PatchObject<'_>],
    limits: &Limits,
) -> Result<(PatchSet, ObjectReport), AdapterError> {
    let mut collected = Collected::default();
    for object in objects {
        collected.add(object)?;
    }
    let Collected { entries, unmatched, foreign, .. } = collected;
    let (header, source) = lay_out(entries);
    let patches = read_patches(&Container::of(&source, header, limits)?, limits)?;
    if patches.is_empty() && !unmatched.is_empty() {
        return Err(nothing_matches(unmatched.len(), unmatched.iter().map(String::as_str)));
    }
    let set = PatchSet::new(patches, unmatched)?;
    let report = ObjectReport {
        targets: set.patches().keys().cloned().collect(),
        unmatched: set.unmatched().to_vec(),
        foreign,
    };
    Ok((set, report))
}

/// Shape and type only: a tensor has megabytes of elements.
impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorView({} {:?})", self.dtype, self.shape)
    }
}

impl ObjectError {
    /// The wire code that answers this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownKind { .. } | Self::PadWeight => ErrorKind::Unsupported,
            Self::Count { .. } | Self::Element { .. } | Self::Offset(_) => ErrorKind::LoraRejected,
        }
    }
}

/// Type, shape and elements of one tensor.
struct Entry<'a> {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

/// What all objects come to, before any tensor is looked into.
#[derive(Default)]
struct Collected<'a> {
    targets: BTreeSet<Target>,
    /// Tensors by canonical name.
    entries: BTreeMap<String, Entry<'a>>,
    unmatched: Vec<String>,
    foreign: usize,
}

impl<'a> Collected<'a> {
    fn add(&mut self, object: &PatchObject<'a>) -> Result<(), AdapterError> {
        if !names_text_encoder(object.target) {
            self.foreign += 1;
            return Ok(());
        }
        let fault = |source| AdapterError::Object { target: clip(object.target), source };
        // A text with a slice in it is no name in ComfyUI, which keeps offsets apart.
        let Some(whole) =
            object.target.parse().ok().filter(|target: &Target| target.slice().is_none())
        else {
            self.unmatched.push(object.target.to_owned());
            return Ok(());
        };
        let target = match object.offset {
            None => whole,
            Some(offset) => whole.with_slice(slice(offset).map_err(|error| fault(error.into()))?),
        };
        let (kind, parts) = object.parts().map_err(fault)?;
        // Here already: of an object without any tensor nothing would be left to miss.
        if let Some(part) = missing(kind, |part| parts.contains_key(part)) {
            let name = tensor_name(&target, kind, part);
            return Err(CanonicalError::MissingPart { name }.into());
        }
        for (part, element) in parts {
            let key = tensor_name(&target, kind, part);
            let entry = entry(part, element, &key, fault)?;
            self.entries.insert(key, entry);
        }
        if self.targets.replace(target.clone()).is_some() {
            let name = target.to_string();
            return Err(AdapterError::Overlap { first: name.clone(), second: name });
        }
        Ok(())
    }
}

impl<'a> PatchObject<'a> {
    /// The kind, and the elements that are there and count, by part.
    fn parts(&self) -> Result<(PatchKind, BTreeMap<&'static str, Element<'a>>), ObjectError> {
        let kind = PatchKind::ALL.into_iter().find(|kind| kind.name() == self.kind);
        let Some(kind) = kind.filter(|kind| *kind != PatchKind::Unchanged) else {
            return Err(ObjectError::UnknownKind { kind: clip(self.kind) });
        };
        if kind == PatchKind::Diff && self.weights == [Element::Absent] {
            let mark = TensorView { dtype: Dtype::Float32.as_str(), shape: &[0], bytes: &[] };
            return Ok((PatchKind::Unchanged, BTreeMap::from([(MARK, Element::Tensor(mark))])));
        }
        let slots = slots(kind);
        // The dict behind a full difference may be left out.
        let needed = slots.iter().filter(|slot| **slot != PAD).count();
        if !(needed..=slots.len()).contains(&self.weights.len()) {
            let (actual, expected) = (self.weights.len(), needed);
            return Err(ObjectError::Count { kind, actual, expected });
        }
        let mut parts = BTreeMap::new();
        for (slot, element) in slots.iter().zip(&self.weights) {
            match (*slot, element) {
                (_, Element::Absent) | (PAD, Element::PadWeight(false)) => {}
                (PAD, Element::PadWeight(true)) => return Err(ObjectError::PadWeight),
                (slot, element) => {
                    parts.insert(slot, *element);
                }
            }
        }
        drop_unused(kind, &mut parts);
        Ok((kind, parts))
    }
}

/// The parts of a tuple of `kind` in ComfyUI's order.
fn slots(kind: PatchKind) -> &'static [&'static str] {
    match kind {
        PatchKind::Lora => &[UP, DOWN, ALPHA, MID, DORA_SCALE, RESHAPE],
        PatchKind::Loha => &["w1_a", "w1_b", ALPHA, "w2_a", "w2_b", "t1", "t2", DORA_SCALE],
        PatchKind::Lokr => &["w1", "w2", ALPHA, "w1_a", "w1_b", "w2_a", "w2_b", "t2", DORA_SCALE],
        PatchKind::Glora => &["a1", "a2", "b1", "b2", ALPHA, DORA_SCALE],
        PatchKind::Oft | PatchKind::Boft => &["blocks", "rescale", ALPHA, DORA_SCALE],
        PatchKind::Diff => &[VALUE, PAD],
        PatchKind::Set | PatchKind::ModelAsLora => &[VALUE],
        PatchKind::Unchanged => &[],
    }
}

/// The tensor of one part under its name `key`.
fn entry<'a>(
    part: &'static str,
    element: Element<'a>,
    key: &str,
    fault: impl Fn(ObjectError) -> AdapterError,
) -> Result<Entry<'a>, AdapterError> {
    let wrong = |actual: &str, expected| {
        fault(ObjectError::Element { part, actual: clip(actual), expected })
    };
    match (part, element) {
        (RESHAPE, _) => Err(AdapterError::UnsupportedReshape { key: key.to_owned() }),
        (PAD, _) => Err(wrong("not a dict", "a dict with `pad_weight`")),
        (_, Element::Tensor(view)) => tensor_entry(part, view, key),
        (ALPHA, Element::Scalar(alpha)) => Ok(Entry {
            dtype: safetensors::Dtype::F64,
            shape: Vec::new(),
            bytes: Cow::Owned(alpha.to_le_bytes().to_vec()),
        }),
        (_, Element::Scalar(_)) => Err(wrong("a number", "a tensor")),
        (_, Element::PadWeight(_)) => Err(wrong("a dict", "a tensor")),
        (ALPHA, Element::Other(actual)) => Err(wrong(actual, "a number")),
        (_, Element::Other(actual)) => Err(wrong(actual, "a tensor")),
        (_, Element::Absent) => Err(wrong("None", "a tensor")),
    }
}

fn tensor_entry<'a>(
    part: &str,
    view: TensorView<'a>,
    key: &str,
) -> Result<Entry<'a>, AdapterError> {
    let dtype: Dtype = view.dtype.parse().map_err(|_| AdapterError::UnsupportedDtype {
        key: key.to_owned(),
        dtype: clip(view.dtype),
    })?;
    let info = TensorInfo {
        dtype: file_dtype(dtype),
        shape: view.shape.to_vec(),
        data_offsets: (0, view.bytes.len()),
    };
    if part == MID {
        Tensor { key, info: &info }.check_mid()?;
    }
    Ok(Entry { dtype: info.dtype, shape: info.shape, bytes: Cow::Borrowed(view.bytes) })
}

fn slice([dim, start, length]: [i64; 3]) -> Result<Slice, InvalidSlice> {
    let index = usize::try_from;
    match (index(dim), index(start), index(length)) {
        (Ok(dim), Ok(start), Ok(length)) => Slice::new(dim, start, length),
        _ => Err(InvalidSlice { text: format!("[{dim}:{start}:{length}]") }),
    }
}

/// Puts the tensors one after the other.
fn lay_out(entries: BTreeMap<String, Entry<'_>>) -> (Header, Pieces<'_>) {
    let (mut header, mut source) = (Header::default(), Pieces::default());
    for (name, Entry { dtype, shape, bytes }) in entries {
        let (start, end) = (source.length, source.length + bytes.len());
        header.tensors.insert(name, TensorInfo { dtype, shape, data_offsets: (start, end) });
        // Tensors without elements are at the start of the next one.
        if !bytes.is_empty() {
            source.pieces.insert(start, bytes);
        }
        source.length = end;
    }
    (header, source)
}

/// The tensors' bytes by the place where they begin; read whole or not at all.
#[derive(Default)]
struct Pieces<'a> {
    pieces: BTreeMap<usize, Cow<'a, [u8]>>,
    length: usize,
}

impl ByteSource for Pieces<'_> {
    fn byte_len(&self) -> u64 {
        self.length as u64
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let piece = usize::try_from(offset).ok().and_then(|start| self.pieces.get(&start));
        match piece {
            _ if length == 0 => Ok(Vec::new()),
            Some(piece) if piece.len() == length => Ok(piece.to_vec()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
