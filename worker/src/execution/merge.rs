//! Merging patches into a weight: f32 arithmetic in ComfyUI's order, rounded once at the end.
//!
//! The weight itself is only read. What is built has the size of the weight, and at most a few
//! such buffers exist at any moment. Every kind of patch has a file of its own, which says what it
//! adds; `DoRA` is an addition to most of them.

mod change;
mod dora;
mod glora;
mod hadamard;
mod kronecker;
mod low_rank;
mod misfit;
mod orthogonal;
mod rows;
#[cfg(test)]
mod tests;

use adapter::Patch;
use candle_core::{Result, Tensor};
use protocol::Dtype;

use self::change::{Change, array, combined, rounded};
use super::stack::StackedPatch;

pub(super) use misfit::Misfit;

/// `weight` with every patch applied in order, then rounded to `dtype` and held as f32.
///
/// # Errors
/// When a patch does not pass [`check`], or the device fails.
pub(super) fn merged(
    weight: &Tensor,
    patches: &[StackedPatch<'_>],
    dtype: Dtype,
) -> Result<Tensor> {
    let mut merged = weight.clone();
    for (index, stacked) in patches.iter().enumerate() {
        let is_last = index + 1 == patches.len();
        let rounding = if is_last { dtype } else { Dtype::Float32 };
        merged = applied(&merged, stacked, rounding)?;
    }
    Ok(merged)
}

/// As [`merged`], for `rows` of a weight: `weights` has them in that order. Nothing when a patch needs
/// the whole weight.
///
/// # Errors
/// As [`merged`].
pub(super) fn merged_rows(
    weights: &Tensor,
    patches: &[StackedPatch<'_>],
    rows: &[u32],
    dtype: Dtype,
) -> Result<Option<Tensor>> {
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

/// Whether `patch` can change a weight of the shape `weight`. What passes can be merged.
pub(super) fn check(patch: &Patch, weight: &[usize]) -> std::result::Result<(), Misfit> {
    match patch {
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

/// `weight · strength_model` with one patch applied, then rounded.
fn applied(weight: &Tensor, stacked: &StackedPatch<'_>, rounding: Dtype) -> Result<Tensor> {
    let weight = scaled(weight, stacked.strength_model)?;
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
        Patch::Set(patch) => return rounded(&array(patch.value(), device)?, rounding),
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
