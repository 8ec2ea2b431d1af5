//! Merging patches into a weight: f32 arithmetic in ComfyUI's order, rounded once at the end.
//!
//! The weight itself is only read. What is built has the size of the weight, and at most a few
//! such buffers exist at any moment. Every kind of patch has a file of its own, which says what it
//! adds; `DoRA` is an addition to most of them, and `slice` restricts any of them to a part of the
//! weight.

mod change;
mod dora;
mod glora;
mod hadamard;
mod kronecker;
mod low_rank;
mod misfit;
mod orthogonal;
mod rows;
mod slice;
#[cfg(test)]
mod tests;

use adapter::{Patch, Slice};
use candle_core::{Result, Tensor};
use protocol::Dtype;

use self::change::{Change, array, combined, rounded};
use super::stack::StackedPatch;

pub(super) use self::{misfit::Misfit, rows::changes_rows_alone};

/// A weight, or rows of one, to which patches are applied.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    /// As the stages before left it, in f32.
    pub(super) patched: &'a Tensor,
    /// Gives what the model itself has in its place, in f32; few patches ask for it.
    pub(super) original: &'a dyn Fn() -> Result<Tensor>,
}

/// `weight` with every patch applied in order, then rounded to `dtype` and held as f32.
///
/// # Errors
/// When a patch does not pass [`check`], or the device fails.
pub(super) fn merged(
    weight: Weight<'_>,
    patches: &[StackedPatch<'_>],
    dtype: Dtype,
) -> Result<Tensor> {
    let mut merged = weight.patched.clone();
    for (index, stacked) in patches.iter().enumerate() {
        let is_last = index + 1 == patches.len();
        let rounding = if is_last { dtype } else { Dtype::Float32 };
        let weight = Weight { patched: &merged, ..weight };
        merged = match stacked.slice {
            None => applied(weight, stacked, rounding)?,
            Some(slice) => slice::applied_to(slice, weight, stacked, rounding)?,
        };
    }
    Ok(merged)
}

/// As [`merged`], for `rows` of a weight: `weights` has them in that order. Nothing when a patch
/// needs the whole weight.
///
/// # Errors
/// As [`merged`].
pub(super) fn merged_rows(
    weights: Weight<'_>,
    patches: &[StackedPatch<'_>],
    rows: &[u32],
    dtype: Dtype,
) -> Result<Option<Tensor>> {
    if !changes_rows_alone(patches) {
        return Ok(None);
    }
    let mut alone = Vec::with_capacity(patches.len());
    for patch in patches.iter().filter_map(|stacked| stacked.patch) {
        let Some(patch) = rows::on_rows(patch, rows) else { return Ok(None) };
        alone.push(patch);
    }
    let mut alone = alone.iter();
    let stacked = patches.iter().map(|stacked| StackedPatch {
        patch: stacked.patch.and_then(|_| alone.next()),
        ..*stacked
    });
    merged(weights, &stacked.collect::<Vec<_>>(), dtype).map(Some)
}

/// The shape of what a patch acts on: that of `weight`, or of the slice of it.
///
/// # Errors
/// When the weight does not reach as far as the slice.
pub(super) fn shape_of(
    slice: Option<Slice>,
    weight: &[usize],
) -> std::result::Result<Vec<usize>, Misfit> {
    match slice {
        None => Ok(weight.to_vec()),
        Some(slice) => slice::shape(slice, weight),
    }
}

/// Whether `patch` can change a weight, or a slice of one, of the shape `weight`. What passes can be
/// merged.
pub(super) fn check(patch: &Patch, weight: &[usize]) -> std::result::Result<(), Misfit> {
    match patch {
        Patch::Unchanged => return Ok(()),
        Patch::ModelAsLora(patch) => return misfit::same_shape(weight, patch.value().shape()),
        Patch::Diff(patch) => return misfit::same_shape(weight, patch.value().shape()),
        Patch::Set(patch) => return misfit::same_shape(weight, patch.value().shape()),
        Patch::LowRank(patch) => misfit::same_shape(weight, &patch.shape())?,
        Patch::Hadamard(patch) => misfit::same_shape(weight, &patch.shape())?,
        Patch::Kronecker(patch) => misfit::same_shape(weight, &patch.shape())?,
        Patch::Glora(patch) => glora::check(patch, misfit::matrix_sizes(weight, "glora")?)?,
        Patch::Oft(patch) => orthogonal::check_oft(patch, misfit::matrix_sizes(weight, "oft")?)?,
        Patch::Boft(patch) => {
            orthogonal::check_boft(patch, misfit::matrix_sizes(weight, "boft")?)?;
        }
    }
    dora::check(patch.dora_scale(), misfit::matrix_sizes(weight, "dora")?)
}

/// `weight · strength_model` with one patch applied, then rounded. The patch's slice is the caller's
/// business.
fn applied(weight: Weight<'_>, stacked: &StackedPatch<'_>, rounding: Dtype) -> Result<Tensor> {
    let original = weight.original;
    let weight = scaled(weight.patched, stacked.strength_model)?;
    let (device, strength) = (weight.device(), stacked.strength_patch);
    let Some(patch) = stacked.patch else { return rounded(&weight, rounding) };
    let change = match patch {
        Patch::LowRank(patch) => low_rank::change(patch, device)?,
        Patch::Hadamard(patch) => hadamard::change(patch, device)?,
        Patch::Kronecker(patch) => kronecker::change(patch, device)?,
        Patch::Glora(patch) => glora::change(patch, &weight)?,
        Patch::Oft(patch) => orthogonal::change_oft(patch, &weight, strength)?,
        Patch::Boft(patch) => orthogonal::change_boft(patch, &weight, strength)?,
        Patch::Diff(patch) => {
            Change { delta: array(patch.value(), device)?, scale: 1.0, dora_scale: None }
        }
        Patch::ModelAsLora(patch) => {
            let delta = (array(patch.value(), device)? - original()?)?;
            Change { delta, scale: 1.0, dora_scale: None }
        }
        Patch::Set(patch) => return rounded(&array(patch.value(), device)?, rounding),
        Patch::Unchanged => return rounded(&weight, rounding),
    };
    match change.dora_scale {
        None => combined(&weight, change.delta, strength * change.scale, rounding),
        Some(dora_scale) => {
            rounded(&dora::decomposed(&weight, change, dora_scale, strength)?, rounding)
        }
    }
}

/// The weight as patched so far, times the entry's factor on it.
fn scaled(weight: &Tensor, strength_model: f64) -> Result<Tensor> {
    #[expect(clippy::float_cmp, reason = "only exactly 1 changes nothing")]
    if strength_model == 1.0 {
        return Ok(weight.clone());
    }
    weight.affine(strength_model, 0.0)
}
