//! `LoHa`: the elementwise product of two low-rank products.

use adapter::{Array, Hadamard, Matrix};
use candle_core::{Device, Result, Tensor};

use super::change::{Change, array, matrix};

/// `(w1_a · w1_b) ∘ (w2_a · w2_b)`.
pub(super) fn change<'a>(patch: &'a Hadamard, device: &Device) -> Result<Change<'a>> {
    let left = product(patch.w1_a(), patch.t1(), patch.w1_b(), device)?;
    let right = product(patch.w2_a(), patch.t2(), patch.w2_b(), device)?;
    Ok(Change { delta: (left * right)?, scale: patch.scale(), dora_scale: patch.dora_scale() })
}

/// `a · b`. With a core [i, j, k, l], of which linear layers have one slice: `aᵀ · core · b` for
/// every slice, the slices side by side for every column.
pub(super) fn product(
    a: &Matrix,
    core: Option<&Array>,
    b: &Matrix,
    device: &Device,
) -> Result<Tensor> {
    let (a, b) = (matrix(a, device)?, matrix(b, device)?);
    let Some(core) = core else { return a.matmul(&b) };
    let slices = array(core, device)?.flatten_from(2)?.permute((2, 0, 1))?.contiguous()?;
    let products = a.t()?.contiguous()?.broadcast_matmul(&slices)?.broadcast_matmul(&b)?;
    products.permute((1, 2, 0))?.contiguous()?.flatten_from(1)
}
