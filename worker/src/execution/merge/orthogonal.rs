//! OFT and BOFT: rows of the weight turned in blocks.
//!
//! A block B of free numbers becomes a rotation by the Cayley transform of `Q = B − Bᵀ`:
//! `R = (I + Q) (I − Q)⁻¹`. OFT turns every block of neighbouring rows once; BOFT turns blocks of
//! rows that lie ever farther apart, stage after stage. Both work on the weight as patched so far,
//! and in both the strength enters twice, as in ComfyUI.

use adapter::{Array, Boft, Matrix, Oft};
use candle_core::Tensor;
use rayon::prelude::*;

use super::{
    change::{Change, array},
    misfit::Misfit,
};

/// ComfyUI adds it to the norm that it compares with alpha.
const NORM_EPSILON: f64 = 1e-8;

/// Whether the blocks make the rows of a weight.
pub(super) fn check_oft(patch: &Oft, [rows, _]: [usize; 2]) -> Result<(), Misfit> {
    let [count, size, _] = sizes(patch.blocks());
    check_blocks(count, size, rows)
}

/// As [`check_oft`]; and ComfyUI wants an alpha here.
pub(super) fn check_boft(patch: &Boft, [rows, _]: [usize; 2]) -> Result<(), Misfit> {
    if patch.alpha().is_none() {
        return Err(Misfit::NoAlpha);
    }
    let [stages, count, size, _] = sizes(patch.blocks());
    check_blocks(count, size, rows)?;
    for stage in 0..stages {
        let width = half_width(stage, size).saturating_mul(2);
        if width == 0 || !rows.is_multiple_of(width) {
            return Err(Misfit::Stage { stage, width, rows });
        }
    }
    Ok(())
}

/// `strength · (Rᵀ − I) · W`, block by block.
pub(super) fn change_oft<'a>(
    patch: &'a Oft,
    weight: &Tensor,
    strength: f64,
) -> candle_core::Result<Change<'a>> {
    let [count, size, _] = sizes(patch.blocks());
    let turns = rotations(patch.blocks(), size, patch.alpha().unwrap_or(0.0));
    let turns = mixed(turns, size, [strength, -strength]);
    let turns = Tensor::from_vec(turns, (count, size, size), weight.device())?;
    let blocks = weight.reshape((count, size, weight.dim(1)?))?;
    let delta = turns.transpose(1, 2)?.contiguous()?.matmul(&blocks)?.reshape(weight.shape())?;
    Ok(change(delta, patch.alpha(), patch.dora_scale()))
}

/// What the stages make of the weight, less the weight.
pub(super) fn change_boft<'a>(
    patch: &'a Boft,
    weight: &Tensor,
    strength: f64,
) -> candle_core::Result<Change<'a>> {
    let [stages, count, size, _] = sizes(patch.blocks());
    let turns = rotations(patch.blocks(), size, patch.alpha().unwrap_or(0.0));
    let turns = mixed(turns, size, [strength, 1.0 - strength]);
    let turns = Tensor::from_vec(turns, (stages, count, size, size), weight.device())?;
    let (rows, cols) = weight.dims2()?;
    let mut turned = weight.clone();
    for stage in 0..stages {
        let half = half_width(stage, size);
        let pairs = rows / (2 * half);
        let blocks = turned
            .reshape((pairs, 2, half, cols))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((count, size, cols))?;
        turned = turns
            .get(stage)?
            .matmul(&blocks)?
            .reshape((pairs, half, 2, cols))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((rows, cols))?;
    }
    if let Some(rescale) = patch.rescale() {
        turned = turned.broadcast_mul(&array(rescale, weight.device())?)?;
    }
    Ok(change((turned - weight)?, patch.alpha(), patch.dora_scale()))
}

/// A change without a scale of its own; before `DoRA`, ComfyUI multiplies it with alpha.
fn change(delta: Tensor, alpha: Option<f64>, dora_scale: Option<&Matrix>) -> Change<'_> {
    let scale = if dora_scale.is_some() { alpha.unwrap_or(0.0) } else { 1.0 };
    Change { delta, scale, dora_scale }
}

/// Rows between the two partners of an exchange at `stage`.
fn half_width(stage: usize, size: usize) -> usize {
    u32::try_from(stage)
        .ok()
        .and_then(|stage| 1usize.checked_shl(stage))
        .map_or(0, |far| far.saturating_mul(size / 2))
}

fn check_blocks(count: usize, size: usize, rows: usize) -> Result<(), Misfit> {
    if count.checked_mul(size) == Some(rows) {
        return Ok(());
    }
    Err(Misfit::Blocks { count, size, rows })
}

/// The sizes of an array whose number of dimensions the adapter has checked.
fn sizes<const N: usize>(blocks: &Array) -> [usize; N] {
    blocks.shape().try_into().expect("an orthogonal patch has blocks of its kind's dimensions")
}

/// The rotations of all blocks […, size, size]. Where the norm of all Q together is above a
/// positive `constraint`, they are scaled down to it.
fn rotations(blocks: &Array, size: usize, constraint: f64) -> Vec<f32> {
    let blocks = blocks.to_f32();
    let mut skew = vec![0.0; blocks.len()];
    for (skew, block) in skew.chunks_mut(size * size).zip(blocks.chunks(size * size)) {
        for row in 0..size {
            for col in 0..size {
                skew[row * size + col] =
                    f64::from(block[row * size + col]) - f64::from(block[col * size + row]);
            }
        }
    }
    let norm = skew.iter().map(|q| q * q).sum::<f64>().sqrt() + NORM_EPSILON;
    if constraint > 0.0 && norm > constraint {
        let factor = constraint / norm;
        for q in &mut skew {
            *q *= factor;
        }
    }
    skew.par_chunks_mut(size * size).for_each(|skew| cayley(skew, size));
    #[expect(clippy::cast_possible_truncation, reason = "the elements of a rotation are at most 1")]
    skew.into_iter().map(|r| r as f32).collect()
}

/// Turns Q into `(I + Q) (I − Q)⁻¹ = 2 (I − Q)⁻¹ − I`.
fn cayley(skew: &mut [f64], size: usize) {
    for q in &mut *skew {
        *q = -*q;
    }
    add_to_diagonal(skew, size, 1.0);
    invert(skew, size);
    for element in &mut *skew {
        *element *= 2.0;
    }
    add_to_diagonal(skew, size, -1.0);
}

/// Gauss-Jordan elimination in place. `matrix` is the identity plus a skew-symmetric matrix, whose
/// pivots are all at least 1, so that rows need no exchange.
fn invert(matrix: &mut [f64], size: usize) {
    let mut pivot_row = vec![0.0; size];
    for pivot in 0..size {
        let row = &mut matrix[pivot * size..][..size];
        let inverse = row[pivot].recip();
        row[pivot] = 1.0;
        for element in &mut *row {
            *element *= inverse;
        }
        pivot_row.copy_from_slice(row);
        for (_, row) in matrix.chunks_mut(size).enumerate().filter(|(index, _)| *index != pivot) {
            let factor = std::mem::take(&mut row[pivot]);
            for (element, pivot) in row.iter_mut().zip(&pivot_row) {
                *element -= factor * pivot;
            }
        }
    }
}

fn add_to_diagonal(matrix: &mut [f64], size: usize, value: f64) {
    for element in matrix.iter_mut().step_by(size + 1) {
        *element += value;
    }
}

/// `of_turn · R + of_identity · I` for every block, in f32.
#[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32")]
fn mixed(mut turns: Vec<f32>, size: usize, [of_turn, of_identity]: [f64; 2]) -> Vec<f32> {
    for block in turns.chunks_mut(size * size) {
        for element in &mut *block {
            *element *= of_turn as f32;
        }
        for element in block.iter_mut().step_by(size + 1) {
            *element += of_identity as f32;
        }
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_is_the_cayley_transform_of_the_unit_skew() {
        let mut matrix = [0.0, -1.0, 1.0, 0.0];
        cayley(&mut matrix, 2);
        let expected = [0.0, -1.0, 1.0, 0.0];
        assert!(matrix.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-15), "{matrix:?}");
    }

    #[test]
    fn a_stage_beyond_every_weight_has_no_width() {
        assert_eq!([0, 1, 3].map(|stage| half_width(stage, 4)), [2, 4, 16]);
        assert_eq!(half_width(64, 4), 0);
        assert_eq!(half_width(0, 1), 0);
    }
}
