//! `GLoRA`: a low-rank product, and another one applied to the weight as patched so far.

use adapter::{Glora, Matrix};
use candle_core::Tensor;

use super::{
    change::{Change, matrix},
    misfit::Misfit,
};

/// Which way round the factors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `W · a1 · a2 + b1 · b2`.
    New,
    /// Of older LyCORIS versions: `W · a2 · a1 + b2 · b1`.
    Old,
}

/// Whether the factors make a change of a weight of this shape.
pub(super) fn check(patch: &Glora, weight: [usize; 2]) -> Result<(), Misfit> {
    layout(patch, weight).map(drop)
}

/// The change of `weight`; its scale is alpha / rank, and 1 without alpha.
pub(super) fn change<'a>(patch: &'a Glora, weight: &Tensor) -> candle_core::Result<Change<'a>> {
    let (layout, rank) = layout(patch, weight.dims2()?.into()).map_err(candle_core::Error::wrap)?;
    let load = |factor: &Matrix| matrix(factor, weight.device());
    let (a1, a2, b1, b2) =
        (load(patch.a1())?, load(patch.a2())?, load(patch.b1())?, load(patch.b2())?);
    let delta = match layout {
        Layout::New => (weight.matmul(&a1)?.matmul(&a2)? + b1.matmul(&b2)?)?,
        Layout::Old => (weight.matmul(&a2)?.matmul(&a1)? + b2.matmul(&b1)?)?,
    };
    #[expect(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
    let scale = patch.alpha().map_or(1.0, |alpha| alpha / rank as f64);
    Ok(Change { delta, scale, dora_scale: patch.dora_scale() })
}

/// The layout and the rank, by ComfyUI's rule. Where the shapes allow both layouts, it takes the
/// old one only for a square weight with as many rows as `a2`.
fn layout(patch: &Glora, weight: [usize; 2]) -> Result<(Layout, usize), Misfit> {
    let [a1, a2, b1, b2] = [patch.a1(), patch.a2(), patch.b1(), patch.b2()].map(Matrix::shape);
    let is_old = b2[1] == b1[0] && b1[0] == a1[0] && a1[0] == a2[1];
    let is_new = b2[0] == b1[1] && b1[1] == a1[1] && a1[1] == a2[0];
    let [rows, cols] = weight;
    let (layout, rank, expected) = if is_old && (!is_new || (a2[0] == rows && rows == cols)) {
        let rank = a1[0];
        (Layout::Old, rank, [[rank, cols], [cols, rank], [rank, cols], [rows, rank]])
    } else {
        let rank = a2[0];
        (Layout::New, rank, [[cols, rank], [rank, cols], [rows, rank], [rank, cols]])
    };
    if [a1, a2, b1, b2] == expected {
        return Ok((layout, rank));
    }
    Err(Misfit::Glora { a1, a2, b1, b2, weight })
}
