//! `LoKr`: the Kronecker product of two small matrices.

use adapter::{Factor, Kronecker};
use candle_core::{Device, Result, Tensor};

use super::{
    change::{Change, matrix},
    hadamard::product,
};

/// `w1 ⊗ w2`.
pub(super) fn change<'a>(patch: &'a Kronecker, device: &Device) -> Result<Change<'a>> {
    let left = match patch.w1() {
        Factor::Full(full) => matrix(full, device)?,
        Factor::LowRank { a, b } => product(a, None, b, device)?,
    };
    let right = match patch.w2() {
        Factor::Full(full) => matrix(full, device)?,
        Factor::LowRank { a, b } => product(a, patch.t2(), b, device)?,
    };
    let delta = kronecker(&left, &right)?;
    Ok(Change { delta, scale: patch.scale(), dora_scale: patch.dora_scale() })
}

/// Every element of `left` times all of `right`: one outer product, then reordered.
fn kronecker(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let ((rows1, cols1), (rows2, cols2)) = (left.dims2()?, right.dims2()?);
    left.reshape((rows1 * cols1, 1))?
        .matmul(&right.reshape((1, rows2 * cols2))?)?
        .reshape((rows1, cols1, rows2, cols2))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((rows1 * rows2, cols1 * cols2))
}
