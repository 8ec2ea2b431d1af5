//! Patches on single rows of a weight: a prompt reads few rows of the token embedding, which is
//! the largest weight of all, so the whole of it is not built for that.

use adapter::{Array, Diff, LowRank, Matrix, Patch, SetWeight};

/// What `patch`, which fits its weight, does to `rows` of it alone, in that order. Nothing for kinds
/// in which rows depend on each other, or which nobody uses on an embedding.
pub(super) fn on_rows(patch: &Patch, rows: &[u32]) -> Option<Patch> {
    match patch {
        Patch::LowRank(patch) => low_rank_on_rows(patch, rows).map(Patch::LowRank),
        Patch::Diff(patch) => {
            array_rows(patch.value(), rows).map(|value| Patch::Diff(Diff::new(value)))
        }
        Patch::Set(patch) => {
            array_rows(patch.value(), rows).map(|value| Patch::Set(SetWeight::new(value)))
        }
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
        Some(scale) if scale.rows() == patch.up().rows() => {
            alone.with_dora_scale(matrix_rows(scale, rows)?).ok()
        }
        // The length of a column depends on every row.
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
