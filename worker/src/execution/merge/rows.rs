//! Patches on single rows of a weight: a prompt reads few rows of the token embedding, which is
//! the largest weight of all, so the whole of it is not built for that.

use adapter::{Array, Diff, LowRank, Matrix, ModelAsLora, Patch, SetWeight};

use crate::execution::stack::StackedPatch;

/// Whether every row of the patched weight depends on the same row of the weight and of the patches
/// alone, so that rows can be merged without the rest. False also for kinds which nobody uses on an
/// embedding.
pub(in crate::execution) fn changes_rows_alone(patches: &[StackedPatch<'_>]) -> bool {
    patches.iter().all(|stacked| {
        let is_whole = stacked.slice.is_none();
        is_whole && stacked.patch.is_none_or(is_by_rows)
    })
}

fn is_by_rows(patch: &Patch) -> bool {
    match patch {
        // The length of a column depends on every row.
        Patch::LowRank(patch) => patch.dora_scale().is_none_or(|scale| is_on_rows(scale, patch)),
        Patch::Diff(_) | Patch::Set(_) | Patch::ModelAsLora(_) | Patch::Unchanged => true,
        Patch::Hadamard(_)
        | Patch::Kronecker(_)
        | Patch::Glora(_)
        | Patch::Oft(_)
        | Patch::Boft(_) => false,
    }
}

/// Whether the scale has a length for every row.
fn is_on_rows(scale: &Matrix, patch: &LowRank) -> bool {
    scale.rows() == patch.up().rows()
}

/// What `patch`, which fits its weight, does to `rows` of it alone, in that order. Nothing where
/// [`changes_rows_alone`] is false.
pub(super) fn on_rows(patch: &Patch, rows: &[u32]) -> Option<Patch> {
    match patch {
        Patch::LowRank(patch) => low_rank_on_rows(patch, rows).map(Patch::LowRank),
        Patch::Diff(patch) => {
            array_rows(patch.value(), rows).map(|value| Patch::Diff(Diff::new(value)))
        }
        Patch::Set(patch) => {
            array_rows(patch.value(), rows).map(|value| Patch::Set(SetWeight::new(value)))
        }
        Patch::ModelAsLora(patch) => {
            array_rows(patch.value(), rows).map(|value| Patch::ModelAsLora(ModelAsLora::new(value)))
        }
        Patch::Unchanged => Some(Patch::Unchanged),
        Patch::Hadamard(_)
        | Patch::Kronecker(_)
        | Patch::Glora(_)
        | Patch::Oft(_)
        | Patch::Boft(_) => None,
    }
}

fn low_rank_on_rows(patch: &LowRank, rows: &[u32]) -> Option<LowRank> {
    let up = matrix_rows(patch.up(), rows)?;
    let alone = LowRank::new(up, patch.down().clone(), patch.mid().cloned(), patch.alpha()).ok()?;
    match patch.dora_scale() {
        None => Some(alone),
        Some(scale) if is_on_rows(scale, patch) => {
            alone.with_dora_scale(matrix_rows(scale, rows)?).ok()
        }
        Some(_) => None,
    }
}

fn matrix_rows(matrix: &Matrix, rows: &[u32]) -> Option<Matrix> {
    let bytes = bytes_of_rows(matrix.bytes(), matrix.rows(), rows)?;
    Matrix::new(matrix.dtype(), rows.len(), matrix.cols(), bytes).ok()
}

fn array_rows(array: &Array, rows: &[u32]) -> Option<Array> {
    let (count, rest) = array.shape().split_first()?;
    let bytes = bytes_of_rows(array.bytes(), *count, rows)?;
    Array::new(array.dtype(), &[&[rows.len()], rest].concat(), bytes).ok()
}

fn bytes_of_rows(bytes: &[u8], count: usize, rows: &[u32]) -> Option<Vec<u8>> {
    let width = bytes.len().checked_div(count)?;
    let mut picked = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        let start = usize::try_from(row).ok()?.checked_mul(width)?;
        picked.extend_from_slice(bytes.get(start..start.checked_add(width)?)?);
    }
    Some(picked)
}
