//! LoRA files in every spelling, turned into canonical adapters with a digest.
//!
//! An *adapter* is the text-encoder part of one LoRA-like file, or of the patches that a ComfyUI
//! process holds: patches of weights and biases of `clip_l` and `clip_g`, of any [`PatchKind`],
//! without the file's spelling, its image-model tensors and the strength it is used with.
//!
//! ```text
//! file    ── read_lora ─────▶ (PatchSet, KeyReport)     PatchSet ── to_bytes ──▶ canonical bytes
//! objects ── read_objects ──▶ (PatchSet, ObjectReport)  PatchSet ◀── from_bytes ── canonical bytes
//!                                                       PatchSet ── id ──▶ AdapterId = BLAKE3 of them
//! ```
//!
//! **Invariants.** One content has one canonical form, so [`PatchSet::id`] is its identity wherever
//! it was made. A text-encoder key is taken, listed as unmatched or superseded, or refused with an
//! error; none is dropped in silence. Headers are checked before anything they announce is
//! allocated, and every number kept is finite.
//!
//! Nothing here opens files, reads a clock or knows a model's sizes: whether a patch fits a weight
//! is for the worker that holds the weight.

mod array;
mod canonical;
mod comfy;
mod container;
mod elements;
mod error;
mod group;
mod key;
mod limits;
mod matrix;
mod parts;
mod patch;
mod patch_set;
mod reader;
mod slice;
mod source;
mod suffix;
mod target;
mod tensor;

/// Grows whenever [`read_lora`] makes another adapter of the same file, for example because it
/// learned a new spelling: whoever remembers which file became which adapter starts anew then.
pub const READER_VERSION: u32 = 1;

pub use array::{Array, ArrayError};
pub use canonical::FORMAT;
pub use comfy::{
    Element, ObjectError, ObjectReport, PatchObject, TensorView, names_text_encoder, read_objects,
    read_objects_with,
};
pub use error::{AdapterError, CanonicalError, ErrorKind, FileError};
pub use limits::{KEY_BYTES_MAX, Limits, UNMATCHED_KEYS_MAX};
pub use matrix::{Matrix, MatrixError};
pub use patch::{
    Boft, Diff, Factor, Glora, Hadamard, Kronecker, LowRank, LowRankError, ModelAsLora, Oft, Patch,
    PatchError, PatchKind, SetWeight,
};
pub use patch_set::PatchSet;
pub use reader::{KeyReport, read_lora, read_lora_with};
pub use slice::{InvalidSlice, Slice};
pub use source::ByteSource;
pub use target::{InvalidTarget, LAYERS_MAX, Target};
