//! Patches on a slice of a weight: ComfyUI's offset.
//!
//! To the patch the slice is the whole weight; `strength_model` acts on it alone as well.

use adapter::Slice;
use candle_core::{Result, Tensor};
use protocol::Dtype;

use super::{Weight, applied, change::rounded, misfit::Misfit};
use crate::execution::stack::StackedPatch;

/// The shape of `slice` of a weight.
pub(super) fn shape(slice: Slice, weight: &[usize]) -> std::result::Result<Vec<usize>, Misfit> {
    let mut shape = weight.to_vec();
    match shape.get_mut(slice.dim()) {
        Some(size) if slice.end() <= *size => *size = slice.length(),
        _ => return Err(Misfit::Slice { slice, weight: weight.to_vec() }),
    }
    Ok(shape)
}

/// `weight` with one patch applied to `slice` of it, then all of it rounded.
pub(super) fn applied_to(
    slice: Slice,
    weight: Weight<'_>,
    stacked: &StackedPatch<'_>,
    rounding: Dtype,
) -> Result<Tensor> {
    let whole = weight.patched;
    let original = || cut(&(weight.original)()?, slice);
    let patched = cut(whole, slice)?;
    let changed =
        applied(Weight { patched: &patched, original: &original }, stacked, Dtype::Float32)?;
    let after = whole.dim(slice.dim())? - slice.end();
    let mut parts = Vec::with_capacity(3);
    if slice.start() > 0 {
        parts.push(whole.narrow(slice.dim(), 0, slice.start())?);
    }
    parts.push(changed);
    if after > 0 {
        parts.push(whole.narrow(slice.dim(), slice.end(), after)?);
    }
    rounded(&Tensor::cat(&parts, slice.dim())?.contiguous()?, rounding)
}

/// The slice as a tensor of its own.
fn cut(whole: &Tensor, slice: Slice) -> Result<Tensor> {
    whole.narrow(slice.dim(), slice.start(), slice.length())?.contiguous()
}
