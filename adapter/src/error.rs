//! What can be wrong with a file or with canonical bytes, and which wire code answers it.

use std::io;

use crate::{
    array::ArrayError,
    comfy::ObjectError,
    limits::{KEY_BYTES_MAX, UNMATCHED_KEYS_MAX},
    matrix::MatrixError,
    patch::{LowRankError, PatchError, PatchKind},
    target::InvalidTarget,
};

/// Characters of foreign text that an error message shows.
const SHOWN_CHARS: usize = 160;

/// Keys that an error shows as examples.
const EXAMPLES_MAX: usize = 5;

/// Why no adapter could be made.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The container is broken, too large or of another format.
    #[error(transparent)]
    File(#[from] FileError),
    /// A LoRA that asks for a weight of another shape.
    #[error("`{key}` is a reshape_weight key: a text encoder's weights cannot change their shape")]
    UnsupportedReshape {
        /// The key.
        key: String,
    },
    /// A tensor that is needed has an element type that cannot be used.
    #[error("`{key}` has elements of type {dtype}: convert them to F32, F16 or BF16")]
    UnsupportedDtype {
        /// The tensor's key.
        key: String,
        /// The safetensors name of its element type.
        dtype: String,
    },
    /// One tensor of a patch without another one that it needs.
    #[error("`{key}` has no partner `{missing}`: the file is incomplete")]
    MissingPartner {
        /// The key that is there.
        key: String,
        /// The key that is not.
        missing: String,
    },
    /// A tensor with a shape that its role cannot have.
    #[error("`{key}` has shape {shape}: expected {expected}")]
    Shape {
        /// The tensor's key.
        key: String,
        /// Its shape in the file, cut to a length fit for a message.
        shape: String,
        /// What its role asks for.
        expected: &'static str,
    },
    /// A matrix with impossible content.
    #[error("`{key}`: {source}")]
    Matrix {
        /// The tensor's key.
        key: String,
        /// What is wrong with it.
        source: MatrixError,
    },
    /// An array with impossible content.
    #[error("`{key}`: {source}")]
    Array {
        /// The tensor's key.
        key: String,
        /// What is wrong with it.
        source: ArrayError,
    },
    /// An alpha that is not one finite number.
    #[error("`{key}` is {value}: alpha must be one finite number")]
    Alpha {
        /// The tensor's key.
        key: String,
        /// What it holds.
        value: String,
    },
    /// Matrices of one low-rank patch that do not belong together.
    #[error("`{key}`: {source}")]
    LowRank {
        /// What the patch's keys begin with, or its target.
        key: String,
        /// What does not fit.
        source: LowRankError,
    },
    /// Tensors of one patch of another kind that do not belong together.
    #[error("`{key}`: {source}")]
    Patch {
        /// What the patch's keys begin with, or its target.
        key: String,
        /// What does not fit.
        source: PatchError,
    },
    /// A rank beyond the limit.
    #[error("`{key}` has rank {rank}: the limit is {limit}")]
    RankTooLarge {
        /// What the patch's keys begin with, or its target.
        key: String,
        /// Its rank.
        rank: usize,
        /// The largest accepted rank.
        limit: usize,
    },
    /// A patch on a bias that only a weight can have.
    #[error("`{target}` is not a weight: {kind} needs a parameter that ends in `.weight`")]
    NotAWeight {
        /// The target's name.
        target: String,
        /// The kind of its patch.
        kind: PatchKind,
    },
    /// Two patches of one parameter that would have to be applied in some order.
    #[error(
        "`{first}` and `{second}` overlap, and the patches of one adapter have no order: put them into two adapters"
    )]
    Overlap {
        /// One target.
        first: String,
        /// The other one.
        second: String,
    },
    /// A text-encoder key that cannot be listed.
    #[error(
        "key `{key}` is not usable: expected 1 to {KEY_BYTES_MAX} visible ASCII characters without quotes and backslashes"
    )]
    Key {
        /// The key, cut to a length fit for a message.
        key: String,
    },
    /// More text-encoder keys that name no known weight than the limit.
    #[error("the adapter has more than {UNMATCHED_KEYS_MAX} keys that name no known weight")]
    TooManyUnmatched,
    /// Keys name a text encoder, and none of them names a weight that there is.
    #[error(
        "none of the {count} text-encoder keys names a known weight: {}; check which model the file was made for",
        quoted(examples)
    )]
    NothingMatches {
        /// How many text-encoder keys the file has.
        count: usize,
        /// Some of them.
        examples: Vec<String>,
    },
    /// A patch object of ComfyUI that is not known or not whole.
    #[error("`{target}`: {source}")]
    Object {
        /// The object's target.
        target: String,
        /// What is wrong with it.
        source: ObjectError,
    },
    /// Bytes that are not a canonical adapter.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
}

/// What is wrong with a safetensors container.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The source could not be read.
    #[error("the file cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A Python pickle, or a zip archive around one.
    #[error(
        "the file is a {0}, which can run code when loaded: convert it to safetensors first (`.pt` and `.ckpt` files are pickles)"
    )]
    Pickle(&'static str),
    /// Something else altogether.
    #[error("the file is not a safetensors file")]
    NotSafetensors,
    /// The file is beyond the limit.
    #[error("the file has {bytes} bytes: the limit is {limit}")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The largest accepted size.
        limit: u64,
    },
    /// The header is beyond the limit.
    #[error("the file's header has {bytes} bytes: the limit is {limit}; strip the file's metadata")]
    HeaderTooLarge {
        /// Its size.
        bytes: u64,
        /// The largest accepted size.
        limit: u64,
    },
    /// More tensors than the limit.
    #[error("the file has more than {limit} tensors")]
    TooManyTensors {
        /// The largest accepted number.
        limit: usize,
    },
    /// Two tensors with one name.
    #[error("the file's header names `{name}` twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// The header is not the JSON that it should be.
    #[error("the file's header is not valid: {0}")]
    Header(String),
    /// The file ends before its last tensor does.
    #[error("the file is truncated: its header announces {expected} bytes and there are {actual}")]
    Truncated {
        /// Size according to the length field and the header.
        expected: u64,
        /// Size of the file.
        actual: u64,
    },
    /// The file goes on after its last tensor.
    #[error("the file has {actual} bytes and its header accounts for {expected} only")]
    TrailingBytes {
        /// Size according to the header.
        expected: u64,
        /// Size of the file.
        actual: u64,
    },
    /// A tensor's size overflows or is not what its shape and element type need.
    #[error(
        "tensor `{name}` of type {dtype} and shape {shape} does not fit its data offsets {start}..{end}"
    )]
    TensorSize {
        /// The tensor's name.
        name: String,
        /// The safetensors name of its element type.
        dtype: String,
        /// Its shape, cut to a length fit for a message.
        shape: String,
        /// First byte, counted from the end of the header.
        start: usize,
        /// The byte after the last.
        end: usize,
    },
    /// A tensor that overlaps another one or leaves a hole before it.
    #[error("tensor `{name}` starts at byte {start} of the data: expected {expected}")]
    TensorPlace {
        /// The tensor's name.
        name: String,
        /// Where it starts.
        start: usize,
        /// Where the tensor before it ends.
        expected: usize,
    },
}

/// Why bytes in a sound container are not a canonical adapter.
#[derive(Debug, thiserror::Error)]
pub enum CanonicalError {
    /// No or another format mark.
    #[error("the bytes are marked as `{found}`: expected format `{expected}`", expected = crate::FORMAT)]
    Format {
        /// The mark, or nothing.
        found: String,
    },
    /// A tensor name that is not `TARGET/KIND.PART`.
    #[error("tensor name `{name}` is not `TARGET/KIND.PART`")]
    Name {
        /// The name.
        name: String,
    },
    /// A target that no known model has.
    #[error(transparent)]
    Target(#[from] InvalidTarget),
    /// A kind or part that this version does not know.
    #[error("`{name}` is of a kind that this version does not know: update Luna")]
    UnknownPart {
        /// The tensor's name.
        name: String,
    },
    /// Two kinds of patch on one target.
    #[error("`{name}` is of another kind than the other parts of its target: expected one kind")]
    SecondKind {
        /// The tensor's name.
        name: String,
    },
    /// A patch without one of its parts.
    #[error("`{name}` is missing")]
    MissingPart {
        /// The missing tensor's name.
        name: String,
    },
    /// The content is sound, but not written in the one canonical way.
    #[error(
        "the bytes differ from the canonical form at byte {offset}: write them with this format's rules"
    )]
    NotCanonical {
        /// The first byte that differs.
        offset: usize,
    },
}

/// Which wire code answers an [`AdapterError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Valid, but not something that this version can apply: `unsupported`.
    Unsupported,
    /// Over a limit: `too_large`.
    TooLarge,
    /// Anything else that is wrong with the file: `lora_rejected`.
    LoraRejected,
}

impl AdapterError {
    /// The wire code that answers this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnsupportedReshape { .. } | Self::UnsupportedDtype { .. } => {
                ErrorKind::Unsupported
            }
            Self::RankTooLarge { .. } | Self::TooManyUnmatched => ErrorKind::TooLarge,
            Self::File(file) => file.kind(),
            Self::Canonical(canonical) => canonical.kind(),
            Self::Object { source, .. } => source.kind(),
            Self::MissingPartner { .. }
            | Self::Shape { .. }
            | Self::Matrix { .. }
            | Self::Array { .. }
            | Self::Alpha { .. }
            | Self::LowRank { .. }
            | Self::Patch { .. }
            | Self::NotAWeight { .. }
            | Self::Overlap { .. }
            | Self::Key { .. }
            | Self::NothingMatches { .. } => ErrorKind::LoraRejected,
        }
    }
}

impl FileError {
    /// The wire code that answers this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLarge { .. } | Self::HeaderTooLarge { .. } | Self::TooManyTensors { .. } => {
                ErrorKind::TooLarge
            }
            Self::Io(_)
            | Self::Pickle(_)
            | Self::NotSafetensors
            | Self::DuplicateName { .. }
            | Self::Header(_)
            | Self::Truncated { .. }
            | Self::TrailingBytes { .. }
            | Self::TensorSize { .. }
            | Self::TensorPlace { .. } => ErrorKind::LoraRejected,
        }
    }
}

impl CanonicalError {
    /// The wire code that answers this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownPart { .. } => ErrorKind::Unsupported,
            Self::Format { found } if found.starts_with("luna-adapter/") => ErrorKind::Unsupported,
            Self::Format { .. }
            | Self::Name { .. }
            | Self::Target(_)
            | Self::SecondKind { .. }
            | Self::MissingPart { .. }
            | Self::NotCanonical { .. } => ErrorKind::LoraRejected,
        }
    }
}

/// The error for `count` keys of text encoders none of which names a known weight.
pub(crate) fn nothing_matches<'k>(
    count: usize,
    keys: impl Iterator<Item = &'k str>,
) -> AdapterError {
    AdapterError::NothingMatches { count, examples: keys.take(EXAMPLES_MAX).map(clip).collect() }
}

/// Makes foreign text fit for an error message: short, and on one line.
pub(crate) fn clip(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
