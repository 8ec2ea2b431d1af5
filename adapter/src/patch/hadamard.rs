//! `LoHa`: the element-wise product of two low-rank products.

use super::fit::{Fit, PatchError, check_alpha, check_product, check_tucker, scale};
use crate::{array::Array, matrix::Matrix};

/// `W += strength · scale · (w1 ∘ w2)`, element by element, where `W` is [out, in].
///
/// Without cores `w = w_a · w_b` of [out, rank] and [rank, in]. With a core `t` [i, j, k, l] it is
/// `w[p, r, k, l] = Σ t[i, j, k, l] · w_b[j, r] · w_a[i, p]`, taken as [out, in · k · l].
#[derive(Debug, Clone, PartialEq)]
pub struct Hadamard {
    w1: [Matrix; 2],
    w2: [Matrix; 2],
    cores: Option<[Array; 2]>,
    alpha: Option<f64>,
    dora_scale: Option<Matrix>,
}

impl Hadamard {
    /// The patch of `w1` (`w1_a`, `w1_b`), `w2` (`w2_a`, `w2_b`) and, where there are some, the
    /// cores (`t1`, `t2`).
    ///
    /// # Errors
    ///
    /// The shapes do not belong together, or `alpha` is not finite.
    pub fn new(
        w1: [Matrix; 2],
        w2: [Matrix; 2],
        cores: Option<[Array; 2]>,
        alpha: Option<f64>,
    ) -> Result<Self, PatchError> {
        check_alpha(alpha)?;
        let patch = Self { w1, w2, cores, alpha, dora_scale: None };
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

    /// The first factor of the first product: [out, rank], and [rank, out] with a core.
    pub fn w1_a(&self) -> &Matrix {
        &self.w1[0]
    }

    /// The second factor of the first product: [rank, in].
    pub fn w1_b(&self) -> &Matrix {
        &self.w1[1]
    }

    /// The first factor of the second product: [out, rank], and [rank, out] with a core.
    pub fn w2_a(&self) -> &Matrix {
        &self.w2[0]
    }

    /// The second factor of the second product: [rank, in].
    pub fn w2_b(&self) -> &Matrix {
        &self.w2[1]
    }

    /// The core of the first product, [i, j, k, l]; there is one if and only if there is `t2`.
    pub fn t1(&self) -> Option<&Array> {
        self.cores.as_ref().map(|[t1, _]| t1)
    }

    /// The core of the second product, [i, j, k, l].
    pub fn t2(&self) -> Option<&Array> {
        self.cores.as_ref().map(|[_, t2]| t2)
    }

    /// The file's alpha, if it had one.
    pub fn alpha(&self) -> Option<f64> {
        self.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [out, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.dora_scale.as_ref()
    }

    /// The rows of `w1_b`, at least 1.
    pub fn rank(&self) -> usize {
        self.w1_b().rows()
    }

    /// What the product is multiplied with beside the strength: alpha / rank, or 1 without alpha.
    pub fn scale(&self) -> f64 {
        scale(self.alpha, self.rank())
    }

    /// Shape of the weight that the product fits: [out, in].
    pub fn shape(&self) -> [usize; 2] {
        let fit = self.fit().expect("the shapes were checked when the patch was made");
        fit.rows.zip(fit.cols).map(|(rows, cols)| [rows, cols]).expect("a product has both")
    }

    fn fit(&self) -> Result<Fit, PatchError> {
        let shapes = |pair: &[Matrix; 2]| [pair[0].shape(), pair[1].shape()];
        let cores = self.cores.as_ref().map(|[t1, t2]| [t1.shape(), t2.shape()]);
        fit_hadamard(shapes(&self.w1), shapes(&self.w2), cores)
    }
}

/// Checks that the shapes of (`w1_a`, `w1_b`), (`w2_a`, `w2_b`) and (`t1`, `t2`) make a patch.
pub(crate) fn fit_hadamard(
    w1: [[usize; 2]; 2],
    w2: [[usize; 2]; 2],
    cores: Option<[&[usize]; 2]>,
) -> Result<Fit, PatchError> {
    let (first, second) = match cores {
        None => (check_product(["w1_a", "w1_b"], w1)?, check_product(["w2_a", "w2_b"], w2)?),
        Some([t1, t2]) => (
            check_tucker(["t1", "w1_a", "w1_b"], t1, w1)?,
            check_tucker(["t2", "w2_a", "w2_b"], t2, w2)?,
        ),
    };
    if first != second {
        let expected = format!("{first:?}, the shape of w1_a · w1_b");
        return Err(PatchError::shape("w2_a · w2_b", &second, expected));
    }
    Ok(Fit::new(w1[1][0].max(w2[1][0]), first))
}
