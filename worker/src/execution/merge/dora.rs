//! `DoRA`: the changed weight with the length of every row or column set by the patch.
//!
//! Arithmetic of ComfyUI 0.3.64, where the two axes differ: rows are measured before the change,
//! columns after it.

use adapter::Matrix;
use candle_core::Tensor;
use protocol::Dtype;

use super::{
    change::{Change, combined, matrix},
    misfit::Misfit,
};

/// Added to every length: the machine epsilon of f32.
const EPSILON: f64 = f32::EPSILON as f64;

/// Whether `dora_scale` stretches over a weight.
pub(super) fn check(dora_scale: Option<&Matrix>, weight: [usize; 2]) -> Result<(), Misfit> {
    let Some(found) = dora_scale.map(Matrix::shape) else { return Ok(()) };
    if found.iter().zip(weight).all(|(&found, weight)| found == 1 || found == weight) {
        return Ok(());
    }
    Err(Misfit::DoraScale { found, weight })
}

/// `V = weight + scale · delta` with lengths set by `dora_scale`: all of V for strength 1,
/// otherwise `weight + strength · (V − weight)`.
pub(super) fn decomposed(
    weight: &Tensor,
    change: Change<'_>,
    dora_scale: &Matrix,
    strength: f64,
) -> candle_core::Result<Tensor> {
    let changed = combined(weight, change.delta, change.scale, Dtype::Float32)?;
    let lengths = if dora_scale.rows() == weight.dim(0)? {
        weight.sqr()?.sum_keepdim(1)?.sqrt()?
    } else {
        changed.sqr()?.sum_keepdim(0)?.sqrt()?
    };
    let wanted = matrix(dora_scale, weight.device())?;
    let changed = changed.broadcast_mul(&wanted.broadcast_div(&(lengths + EPSILON)?)?)?;
    #[expect(clippy::float_cmp, reason = "only exactly 1 takes all of it")]
    if strength == 1.0 {
        return Ok(changed);
    }
    combined(weight, (changed - weight)?, strength, Dtype::Float32)
}
