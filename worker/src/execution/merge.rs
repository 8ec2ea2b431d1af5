//! Merging patches into a weight: f32 arithmetic, rounded once at the end.
//!
//! The weight itself is only read. What is built has the size of the weight, and nothing larger
//! exists at any moment.

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor};
use protocol::Dtype;
use rayon::prelude::*;

use adapter::{LowRank, Matrix, Patch};

use super::stack::StackedPatch;
use crate::weights::round;

/// Elements that one thread combines at a time: its part of the weight stays in its cache.
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// `weight` with every patch applied in order, then rounded to `dtype` and held as f32.
pub(super) fn merged(
    weight: &Tensor,
    patches: &[StackedPatch<'_>],
    dtype: Dtype,
) -> Result<Tensor> {
    let mut merged = weight.clone();
    for (index, stacked) in patches.iter().enumerate() {
        let is_last = index + 1 == patches.len();
        let rounding = if is_last { dtype } else { Dtype::Float32 };
        merged = match stacked.patch {
            Patch::LowRank(patch) => add_low_rank(&merged, patch, stacked, rounding)?,
        };
    }
    Ok(merged)
}

/// `strength_model · W + (strength_patch · scale) · up · (mid · down)`.
fn add_low_rank(
    weight: &Tensor,
    patch: &LowRank,
    stacked: &StackedPatch<'_>,
    rounding: Dtype,
) -> Result<Tensor> {
    let device = weight.device();
    let mut down = tensor(patch.down(), device)?;
    if let Some(mid) = patch.mid() {
        down = tensor(mid, device)?.matmul(&down)?;
    }
    let product = tensor(patch.up(), device)?.matmul(&down)?;
    let combine = Combine {
        factor: stacked.strength_patch * patch.scale(),
        weight_factor: stacked.strength_model,
        rounding,
    };
    product.inplace_op2(weight, &combine)?;
    Ok(product)
}

fn tensor(matrix: &Matrix, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(matrix.to_f32(), (matrix.rows(), matrix.cols()), device)
}

/// Turns a change into the changed weight, in the change's own buffer:
/// `change = round(weight_factor · weight + factor · change)`.
struct Combine {
    factor: f64,
    weight_factor: f64,
    rounding: Dtype,
}

impl InplaceOp2 for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32")]
    fn cpu_fwd(
        &self,
        change: &mut CpuStorage,
        change_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<()> {
        let (Some(change_at), Some(weight_at)) =
            (change_layout.contiguous_offsets(), weight_layout.contiguous_offsets())
        else {
            candle_core::bail!("combine needs contiguous tensors");
        };
        let weight = &weight.as_slice::<f32>()?[weight_at.0..weight_at.1];
        let CpuStorage::F32(change) = change else {
            candle_core::bail!("combine needs f32 tensors");
        };
        let change = &mut change[change_at.0..change_at.1];
        if change.len() != weight.len() {
            candle_core::bail!("combine needs tensors of the same shape");
        }
        let (factor, weight_factor) = (self.factor as f32, self.weight_factor as f32);
        let tasks =
            change.par_chunks_mut(ELEMENTS_PER_TASK).zip(weight.par_chunks(ELEMENTS_PER_TASK));
        tasks.for_each(|(change, weight)| {
            for (change, weight) in change.iter_mut().zip(weight) {
                *change = weight_factor * weight + factor * *change;
            }
            round(self.rounding, change);
        });
        Ok(())
    }
}
