//! `GLoRA`: a low-rank product and a part that depends on the weight.

use super::fit::{Fit, PatchError, check_alpha, check_product};
use crate::matrix::Matrix;

/// Generalised `LoRA` on `W` [out, in], where `W` in the formula is the weight as patched so far.
///
/// There are two layouts, and shapes alone tell them apart, if need be that of the weight:
///
/// - new: `W += strength · scale · (W · a1 · a2 + b1 · b2)`, scale = alpha / rows of `a2`, with
///   `a1` [in, rank], `a2` [rank, in], `b1` [out, rank], `b2` [rank, in];
/// - old: `W += strength · scale · (W · a2 · a1 + b2 · b1)`, scale = alpha / rows of `a1`, with
///   `a1` [rank, in], `a2` [in, rank], `b1` [rank, in], `b2` [out, rank].
///
/// Where both fit, the old one is taken if the weight is square and has the rows of `a2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Glora {
    /// In the order `a1`, `a2`, `b1`, `b2`.
    matrices: [Matrix; 4],
    alpha: Option<f64>,
    dora_scale: Option<Matrix>,
}

impl Glora {
    /// The patch of `a` (`a1`, `a2`) and `b` (`b1`, `b2`).
    ///
    /// # Errors
    ///
    /// The shapes belong together in neither layout, or `alpha` is not finite.
    pub fn new(
        [a1, a2]: [Matrix; 2],
        [b1, b2]: [Matrix; 2],
        alpha: Option<f64>,
    ) -> Result<Self, PatchError> {
        check_alpha(alpha)?;
        let patch = Self { matrices: [a1, a2, b1, b2], alpha, dora_scale: None };
        patch.fit().map(|_| patch)
    }

    /// The same patch, weight-decomposed with these magnitudes, [out, 1] or [1, in].
    ///
    /// # Errors
    ///
    /// The magnitudes have another shape.
    pub fn with_dora_scale(mut self, dora_scale: Matrix) -> Result<Self, PatchError> {
        self.fit()?.check_dora(dora_scale.shape())?;
        self.dora_scale = Some(dora_scale);
        Ok(self)
    }

    /// The matrix `a1`.
    pub fn a1(&self) -> &Matrix {
        &self.matrices[0]
    }

    /// The matrix `a2`.
    pub fn a2(&self) -> &Matrix {
        &self.matrices[1]
    }

    /// The matrix `b1`.
    pub fn b1(&self) -> &Matrix {
        &self.matrices[2]
    }

    /// The matrix `b2`.
    pub fn b2(&self) -> &Matrix {
        &self.matrices[3]
    }

    /// The file's alpha, if it had one.
    pub fn alpha(&self) -> Option<f64> {
        self.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [out, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.dora_scale.as_ref()
    }

    /// Shape of the weight that the patch fits: [out, in]; none if it depends on the layout.
    pub fn shape(&self) -> Option<[usize; 2]> {
        let fit = self.fit().expect("the shapes were checked when the patch was made");
        fit.rows.zip(fit.cols).map(|(rows, cols)| [rows, cols])
    }

    fn fit(&self) -> Result<Fit, PatchError> {
        fit_glora(self.matrices.each_ref().map(Matrix::shape))
    }
}

/// Checks that the shapes of `a1`, `a2`, `b1` and `b2` make a patch in one of the layouts.
pub(crate) fn fit_glora([a1, a2, b1, b2]: [[usize; 2]; 4]) -> Result<Fit, PatchError> {
    let new = fit_layout(["a1", "a2", "b1", "b2"], [a1, a2, b1, b2]);
    let old = fit_layout(["a2", "a1", "b2", "b1"], [a2, a1, b2, b1]);
    match (new, old) {
        (Ok(new), Ok(old)) if new != old => {
            // What one layout calls the rank is the size of the weight in the other one.
            Ok(Fit { rank: new.rank.min(old.rank), rows: None, cols: None })
        }
        (Ok(fit), _) | (Err(_), Ok(fit)) => Ok(fit),
        (Err(error), Err(_)) => Err(error),
    }
}

/// The matrices in the order of the new layout: `W · first · second + third · fourth`.
fn fit_layout(names: [&'static str; 4], shapes: [[usize; 2]; 4]) -> Result<Fit, PatchError> {
    let [first, second, third, fourth] = shapes;
    let on_weight = check_product([names[0], names[1]], [first, second])?;
    let added = check_product([names[2], names[3]], [third, fourth])?;
    // Both products share one rank, and the first one maps the weight's columns to themselves.
    let (rank, cols) = (first[1], added[1]);
    if on_weight != [cols, cols] {
        return Err(PatchError::shape(names[0], &first, format!("[{cols}, {rank}]")));
    }
    if third[1] != rank {
        return Err(PatchError::shape(names[2], &third, format!("[out, {rank}]")));
    }
    Ok(Fit::new(rank, added))
}
