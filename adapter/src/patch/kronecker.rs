//! `LoKr`: a Kronecker product of two matrices, each whole or in factors.

use super::fit::{Fit, PatchError, check_alpha, check_product, check_tucker, scale};
use crate::{array::Array, matrix::Matrix};

/// `W += strength · scale · (w1 ⊗ w2)`, where `W` is [out, in].
///
/// With a core `t2` [i, j, k, l] it is `w2[p, r, k, l] = Σ t2[i, j, k, l] · b[j, r] · a[i, p]`,
/// taken as [out2, in2 · k · l].
#[derive(Debug, Clone, PartialEq)]
pub struct Kronecker {
    w1: Factor,
    w2: Factor,
    t2: Option<Array>,
    alpha: Option<f64>,
    dora_scale: Option<Matrix>,
}

/// One of the two matrices of a Kronecker product.
#[derive(Debug, Clone, PartialEq)]
pub enum Factor {
    /// The matrix itself.
    Full(Matrix),
    /// The matrix as a product `a · b`.
    LowRank {
        /// [out, rank], and [rank, out] with a core.
        a: Matrix,
        /// [rank, in].
        b: Matrix,
    },
}

/// The shapes of a [`Factor`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum FactorShape {
    Full([usize; 2]),
    LowRank([[usize; 2]; 2]),
}

impl Kronecker {
    /// The patch of `w1`, `w2` and, where `w2` is in factors and has one, its core `t2`.
    ///
    /// # Errors
    ///
    /// The shapes do not belong together, there is a core and `w2` is whole, or `alpha` is not
    /// finite.
    pub fn new(
        w1: Factor,
        w2: Factor,
        t2: Option<Array>,
        alpha: Option<f64>,
    ) -> Result<Self, PatchError> {
        check_alpha(alpha)?;
        let patch = Self { w1, w2, t2, alpha, dora_scale: None };
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

    /// The first matrix: its rows and columns are the outer ones of the product.
    pub fn w1(&self) -> &Factor {
        &self.w1
    }

    /// The second matrix.
    pub fn w2(&self) -> &Factor {
        &self.w2
    }

    /// The core of `w2`, [i, j, k, l]; there is one only if `w2` is in factors.
    pub fn t2(&self) -> Option<&Array> {
        self.t2.as_ref()
    }

    /// The file's alpha, if it had one.
    pub fn alpha(&self) -> Option<f64> {
        self.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [out, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.dora_scale.as_ref()
    }

    /// The inner rank of `w2`, else of `w1`; none if both are whole.
    pub fn rank(&self) -> Option<usize> {
        self.w2.rank().or_else(|| self.w1.rank())
    }

    /// What the product is multiplied with beside the strength: alpha / rank, and 1 without alpha
    /// or if both matrices are whole.
    pub fn scale(&self) -> f64 {
        self.rank().map_or(1.0, |rank| scale(self.alpha, rank))
    }

    /// Shape of the weight that the product fits: [out, in].
    pub fn shape(&self) -> [usize; 2] {
        let fit = self.fit().expect("the shapes were checked when the patch was made");
        fit.rows.zip(fit.cols).map(|(rows, cols)| [rows, cols]).expect("a product has both")
    }

    fn fit(&self) -> Result<Fit, PatchError> {
        fit_kronecker(self.w1.shapes(), self.w2.shapes(), self.t2.as_ref().map(Array::shape))
    }
}

impl Factor {
    /// The rows of `b`; none for a whole matrix.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Full(_) => None,
            Self::LowRank { b, .. } => Some(b.rows()),
        }
    }

    fn shapes(&self) -> FactorShape {
        match self {
            Self::Full(matrix) => FactorShape::Full(matrix.shape()),
            Self::LowRank { a, b } => FactorShape::LowRank([a.shape(), b.shape()]),
        }
    }
}

/// Checks that shapes make a patch.
pub(crate) fn fit_kronecker(
    w1: FactorShape,
    w2: FactorShape,
    t2: Option<&[usize]>,
) -> Result<Fit, PatchError> {
    let (outer, outer_rank) = fit_factor(["w1", "w1_a", "w1_b"], w1)?;
    let (inner, inner_rank) = match (w2, t2) {
        (FactorShape::LowRank([a, b]), Some(t2)) => {
            (check_tucker(["t2", "w2_a", "w2_b"], t2, [a, b])?, a[0].max(b[0]))
        }
        (FactorShape::Full(_), Some(t2)) => {
            return Err(PatchError::shape("t2", t2, "no t2 beside a whole w2".to_owned()));
        }
        (w2, None) => fit_factor(["w2", "w2_a", "w2_b"], w2)?,
    };
    // Saturated is as wrong as the true product: no weight is that large.
    let shape = [outer[0].saturating_mul(inner[0]), outer[1].saturating_mul(inner[1])];
    Ok(Fit::new(outer_rank.max(inner_rank), shape))
}

/// The shape and the rank of one matrix.
fn fit_factor(
    [full_name, a_name, b_name]: [&'static str; 3],
    factor: FactorShape,
) -> Result<([usize; 2], usize), PatchError> {
    match factor {
        FactorShape::Full(shape) if shape.contains(&0) => {
            Err(PatchError::shape(full_name, &shape, "no dimension of 0".to_owned()))
        }
        FactorShape::Full(shape) => Ok((shape, 1)),
        FactorShape::LowRank([a, b]) => Ok((check_product([a_name, b_name], [a, b])?, b[0])),
    }
}
