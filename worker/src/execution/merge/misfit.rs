//! Why a patch cannot be applied to a weight: what ComfyUI logs, and leaves the weight as it was.

use adapter::Slice;

/// A patch that does not fit its weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::execution) enum Misfit {
    /// The patch makes another shape.
    #[error("the weight is {weight:?}, the patch is {patch:?}")]
    Shape { weight: Vec<usize>, patch: Vec<usize> },
    /// A slice that ends beyond its weight.
    #[error("the weight is {weight:?}, which has no slice {slice}")]
    Slice { slice: Slice, weight: Vec<usize> },
    /// A kind for matrices on a weight that is none.
    #[error("the weight is {weight:?}, which `{kind}` cannot change: it changes matrices")]
    NotAMatrix { weight: Vec<usize>, kind: &'static str },
    /// Magnitudes for other rows or columns.
    #[error("`dora_scale` is {found:?}, which does not stretch over the weight {weight:?}")]
    DoraScale { found: [usize; 2], weight: [usize; 2] },
    /// Factors in neither of the two layouts of GLoRA.
    #[error("a1 {a1:?}, a2 {a2:?}, b1 {b1:?} and b2 {b2:?} do not fit the weight {weight:?}")]
    Glora { a1: [usize; 2], a2: [usize; 2], b1: [usize; 2], b2: [usize; 2], weight: [usize; 2] },
    /// Blocks that do not add up to the rows.
    #[error("{count} blocks of {size} rows do not make the {rows} rows of the weight")]
    Blocks { count: usize, size: usize, rows: usize },
    /// Butterfly stages wider than the weight.
    #[error("stage {stage} exchanges groups of {width} rows, which do not divide the {rows} rows")]
    Stage { stage: usize, width: usize, rows: usize },
    /// ComfyUI compares the missing alpha with 0 and gives up.
    #[error("a `boft` patch without alpha: ComfyUI leaves the weight as it was")]
    NoAlpha,
}

/// Rows and columns of a weight that is a matrix.
pub(super) fn matrix_sizes(weight: &[usize], kind: &'static str) -> Result<[usize; 2], Misfit> {
    <[usize; 2]>::try_from(weight).map_err(|_| Misfit::NotAMatrix { weight: weight.to_vec(), kind })
}

/// Whether the patch makes the weight's shape.
pub(super) fn same_shape(weight: &[usize], patch: &[usize]) -> Result<(), Misfit> {
    if weight == patch {
        return Ok(());
    }
    Err(Misfit::Shape { weight: weight.to_vec(), patch: patch.to_vec() })
}
