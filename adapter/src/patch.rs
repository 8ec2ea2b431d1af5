//! What is done to one weight or bias: one variant for each kind of LoRA-like file, and for the
//! patches that only ComfyUI's nodes make.

mod fit;
mod glora;
mod hadamard;
mod kronecker;
mod low_rank;
mod orthogonal;
mod whole;

use std::fmt;

pub use fit::PatchError;
pub use glora::Glora;
pub use hadamard::Hadamard;
pub use kronecker::{Factor, Kronecker};
pub use low_rank::{LowRank, LowRankError};
pub use orthogonal::{Boft, Oft};
pub use whole::{Diff, ModelAsLora, SetWeight};

use crate::matrix::Matrix;

pub(crate) use fit::Fit;
pub(crate) use glora::fit_glora;
pub(crate) use hadamard::fit_hadamard;
pub(crate) use kronecker::{FactorShape, fit_kronecker};
pub(crate) use low_rank::check_shapes;
pub(crate) use orthogonal::{fit_boft, fit_oft};

/// A change of one weight, without the strength it is applied with.
#[derive(Debug, Clone, PartialEq)]
pub enum Patch {
    /// Adds a low-rank product: `LoRA`.
    LowRank(LowRank),
    /// Adds the Hadamard product of two low-rank products: `LoHa`.
    Hadamard(Hadamard),
    /// Adds a Kronecker product: `LoKr`.
    Kronecker(Kronecker),
    /// Adds a low-rank product and one that depends on the weight: `GLoRA`.
    Glora(Glora),
    /// Rotates the weight's rows block by block: OFT.
    Oft(Oft),
    /// Rotates the weight's rows through butterfly factors: BOFT.
    Boft(Boft),
    /// Adds a full difference: `diff`, `diff_b`, `w_norm`, `b_norm`.
    Diff(Diff),
    /// Replaces the weight: `set_weight`.
    Set(SetWeight),
    /// Adds the way from the model's own weight to another model's: `model_as_lora`.
    ModelAsLora(ModelAsLora),
    /// Leaves the weight to `strength_model` of the stack entry alone: ComfyUI's `(None,)`.
    Unchanged,
}

/// The ways in which LoRA-like files and ComfyUI's nodes change a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PatchKind {
    /// Low-rank product: `up · down`, in any spelling.
    Lora,
    /// Hadamard product of two low-rank products.
    Loha,
    /// Kronecker product.
    Lokr,
    /// Generalised `LoRA`, with a part that depends on the weight.
    Glora,
    /// Orthogonal fine-tuning, block-diagonal.
    Oft,
    /// Orthogonal fine-tuning, butterfly factors.
    Boft,
    /// A full difference of a weight or bias.
    Diff,
    /// A weight that replaces the model's.
    Set,
    /// The weight of another model, of which the difference to the model's own counts.
    ModelAsLora,
    /// Nothing beside `strength_model`.
    Unchanged,
}

impl Patch {
    /// The patch's kind. Weight decomposition (`DoRA`) is an addition to a kind, not a kind.
    pub fn kind(&self) -> PatchKind {
        match self {
            Self::LowRank(_) => PatchKind::Lora,
            Self::Hadamard(_) => PatchKind::Loha,
            Self::Kronecker(_) => PatchKind::Lokr,
            Self::Glora(_) => PatchKind::Glora,
            Self::Oft(_) => PatchKind::Oft,
            Self::Boft(_) => PatchKind::Boft,
            Self::Diff(_) => PatchKind::Diff,
            Self::Set(_) => PatchKind::Set,
            Self::ModelAsLora(_) => PatchKind::ModelAsLora,
            Self::Unchanged => PatchKind::Unchanged,
        }
    }

    /// Shape [out, in] of the weight that the patch fits, where the patch alone tells it.
    ///
    /// It does not for OFT and BOFT, which fit any number of columns, for a `GLoRA` that can be
    /// read in both layouts, for a full value that is not a matrix, and for [`Patch::Unchanged`].
    pub fn shape(&self) -> Option<[usize; 2]> {
        match self {
            Self::LowRank(patch) => Some(patch.shape()),
            Self::Hadamard(patch) => Some(patch.shape()),
            Self::Kronecker(patch) => Some(patch.shape()),
            Self::Glora(patch) => patch.shape(),
            Self::Oft(_) | Self::Boft(_) | Self::Unchanged => None,
            Self::Diff(patch) => patch.value().shape().try_into().ok(),
            Self::Set(patch) => patch.value().shape().try_into().ok(),
            Self::ModelAsLora(patch) => patch.value().shape().try_into().ok(),
        }
    }

    /// The file's alpha, for the kinds that can have one.
    pub fn alpha(&self) -> Option<f64> {
        match self {
            Self::LowRank(patch) => patch.alpha(),
            Self::Hadamard(patch) => patch.alpha(),
            Self::Kronecker(patch) => patch.alpha(),
            Self::Glora(patch) => patch.alpha(),
            Self::Oft(patch) => patch.alpha(),
            Self::Boft(patch) => patch.alpha(),
            Self::Diff(_) | Self::Set(_) | Self::ModelAsLora(_) | Self::Unchanged => None,
        }
    }

    /// The magnitudes of a weight-decomposed patch (`DoRA`): [out, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        match self {
            Self::LowRank(patch) => patch.dora_scale(),
            Self::Hadamard(patch) => patch.dora_scale(),
            Self::Kronecker(patch) => patch.dora_scale(),
            Self::Glora(patch) => patch.dora_scale(),
            Self::Oft(patch) => patch.dora_scale(),
            Self::Boft(patch) => patch.dora_scale(),
            Self::Diff(_) | Self::Set(_) | Self::ModelAsLora(_) | Self::Unchanged => None,
        }
    }

    /// The same patch, weight-decomposed with these magnitudes.
    pub(crate) fn with_dora_scale(self, scale: Matrix) -> Result<Self, PatchError> {
        match self {
            Self::LowRank(patch) => patch.with_dora_scale(scale).map(Self::LowRank),
            Self::Hadamard(patch) => patch.with_dora_scale(scale).map(Self::Hadamard),
            Self::Kronecker(patch) => patch.with_dora_scale(scale).map(Self::Kronecker),
            Self::Glora(patch) => patch.with_dora_scale(scale).map(Self::Glora),
            Self::Oft(patch) => patch.with_dora_scale(scale).map(Self::Oft),
            Self::Boft(patch) => patch.with_dora_scale(scale).map(Self::Boft),
            Self::Diff(_) | Self::Set(_) | Self::ModelAsLora(_) | Self::Unchanged => {
                let expected = "none beside a patch without factors".to_owned();
                Err(PatchError::shape("dora_scale", &scale.shape(), expected))
            }
        }
    }
}

impl PatchKind {
    /// All kinds.
    pub(crate) const ALL: [Self; 10] = [
        Self::Lora,
        Self::Loha,
        Self::Lokr,
        Self::Glora,
        Self::Oft,
        Self::Boft,
        Self::Diff,
        Self::Set,
        Self::ModelAsLora,
        Self::Unchanged,
    ];

    /// Whether a bias can have a patch of this kind too.
    pub(crate) fn fits_bias(self) -> bool {
        match self {
            Self::Diff | Self::Set | Self::ModelAsLora | Self::Unchanged => true,
            Self::Lora | Self::Loha | Self::Lokr | Self::Glora | Self::Oft | Self::Boft => false,
        }
    }

    /// The kind's name in the canonical form.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Loha => "loha",
            Self::Lokr => "lokr",
            Self::Glora => "glora",
            Self::Oft => "oft",
            Self::Boft => "boft",
            Self::Diff => "diff",
            Self::Set => "set",
            Self::ModelAsLora => "model_as_lora",
            Self::Unchanged => "none",
        }
    }
}

impl fmt::Display for PatchKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora => "LoRA",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
            Self::Glora => "GLoRA",
            Self::Oft => "OFT",
            Self::Boft => "BOFT",
            Self::Diff => "full difference (diff)",
            Self::Set => "weight replacement (set_weight)",
            Self::ModelAsLora => "weight of another model (model_as_lora)",
            Self::Unchanged => "no change (none)",
        })
    }
}
