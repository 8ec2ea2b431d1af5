//! What a patch adds to a weight, and the addition itself.

use adapter::{Array, Matrix};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Result, Tensor};
use protocol::Dtype;
use rayon::prelude::*;

use crate::weights::round;

/// Elements that one thread combines at a time: its part of the weight stays in its cache.
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// A change of a weight, not yet multiplied with the strength.
pub(super) struct Change<'a> {
    /// Of the weight's shape, contiguous, in a buffer of its own.
    pub(super) delta: Tensor,
    /// Factor on `delta` beside the strength.
    pub(super) scale: f64,
    /// Where the patch has one: the length of every row or column of the changed weight.
    pub(super) dora_scale: Option<&'a Matrix>,
}

/// The elements of `matrix` as f32.
pub(super) fn matrix(matrix: &Matrix, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(matrix.to_f32(), (matrix.rows(), matrix.cols()), device)
}

/// The elements of `array` as f32, in its shape.
pub(super) fn array(array: &Array, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(array.to_f32(), array.shape(), device)
}

/// `round(weight + factor · delta)`, in the buffer of `delta`.
pub(super) fn combined(
    weight: &Tensor,
    delta: Tensor,
    factor: f64,
    rounding: Dtype,
) -> Result<Tensor> {
    delta.inplace_op2(weight, &Combine { factor, rounding })?;
    Ok(delta)
}

/// Every element rounded to what `dtype` can hold, as f32.
pub(super) fn rounded(weight: &Tensor, dtype: Dtype) -> Result<Tensor> {
    match dtype {
        Dtype::Float32 => Ok(weight.clone()),
        Dtype::Float16 => weight.to_dtype(DType::F16)?.to_dtype(DType::F32),
        Dtype::Bfloat16 => weight.to_dtype(DType::BF16)?.to_dtype(DType::F32),
    }
}

/// Turns a change into the changed weight, in the change's own buffer.
struct Combine {
    factor: f64,
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
        let factor = self.factor as f32;
        let tasks =
            change.par_chunks_mut(ELEMENTS_PER_TASK).zip(weight.par_chunks(ELEMENTS_PER_TASK));
        tasks.for_each(|(change, weight)| {
            for (change, weight) in change.iter_mut().zip(weight) {
                *change = weight + factor * *change;
            }
            round(self.rounding, change);
        });
        Ok(())
    }
}
