//! `LoRA`: a product of two low-rank matrices, with a third between them in some files.

use super::fit::{Fit, PatchError, scale};
use crate::matrix::Matrix;

/// `W += strength · scale · up · mid · down`, where `mid` is optional and `W` is [out, in].
///
/// The order with `mid` is that of ComfyUI's `LoCon` layers on a linear weight: `mid` multiplies
/// `down` from the left.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    up: Matrix,
    down: Matrix,
    mid: Option<Matrix>,
    alpha: Option<f64>,
    dora_scale: Option<Matrix>,
}

/// Why matrices do not make a low-rank patch.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LowRankError {
    /// A matrix without elements.
    #[error("up {up:?} and down {down:?} make a patch of size zero")]
    Empty {
        /// Shape of `up`.
        up: [usize; 2],
        /// Shape of `down`.
        down: [usize; 2],
    },
    /// `up` and `down` cannot be multiplied.
    #[error("up {up:?} and down {down:?} do not fit: the columns of up must be the rows of down")]
    UpDown {
        /// Shape of `up`.
        up: [usize; 2],
        /// Shape of `down`.
        down: [usize; 2],
    },
    /// `mid` is not [rank, rank].
    #[error("mid {mid:?} does not fit rank {rank}: expected [{rank}, {rank}]")]
    Mid {
        /// Shape of `mid`.
        mid: [usize; 2],
        /// The rows of `down`.
        rank: usize,
    },
    /// `alpha` is NaN or infinite.
    #[error("alpha is {0}: expected a finite number")]
    Alpha(f64),
}

impl LowRank {
    /// The patch of `up` [out, rank], `down` [rank, in] and, where there is one, `mid` [rank, rank].
    ///
    /// # Errors
    ///
    /// The shapes do not belong together, or `alpha` is not finite.
    pub fn new(
        up: Matrix,
        down: Matrix,
        mid: Option<Matrix>,
        alpha: Option<f64>,
    ) -> Result<Self, LowRankError> {
        check_shapes(up.shape(), down.shape(), mid.as_ref().map(Matrix::shape))?;
        match alpha {
            Some(alpha) if !alpha.is_finite() => Err(LowRankError::Alpha(alpha)),
            _ => Ok(Self { up, down, mid, alpha, dora_scale: None }),
        }
    }

    /// The same patch, weight-decomposed (`DoRA`) with these magnitudes, [out, 1] or [1, in].
    ///
    /// # Errors
    ///
    /// The magnitudes have another shape.
    pub fn with_dora_scale(mut self, dora_scale: Matrix) -> Result<Self, PatchError> {
        Fit::new(self.rank(), self.shape()).check_dora(dora_scale.shape())?;
        self.dora_scale = Some(dora_scale);
        Ok(self)
    }

    /// The matrix [out, rank]; PEFT's `lora_B`.
    pub fn up(&self) -> &Matrix {
        &self.up
    }

    /// The matrix [rank, in]; PEFT's `lora_A`.
    pub fn down(&self) -> &Matrix {
        &self.down
    }

    /// The matrix [rank, rank] between the two, if the file had one.
    pub fn mid(&self) -> Option<&Matrix> {
        self.mid.as_ref()
    }

    /// The file's alpha, if it had one.
    pub fn alpha(&self) -> Option<f64> {
        self.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [out, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.dora_scale.as_ref()
    }

    /// The rows of `down`, at least 1.
    pub fn rank(&self) -> usize {
        self.down.rows()
    }

    /// What the product is multiplied with beside the strength: alpha / rank, or 1 without alpha.
    pub fn scale(&self) -> f64 {
        scale(self.alpha, self.rank())
    }

    /// Shape of the weight that the product fits: [out, in].
    pub fn shape(&self) -> [usize; 2] {
        [self.up.rows(), self.down.cols()]
    }
}

/// Checks that `up`, `down` and `mid` make a patch, before any of them is read; returns the rank.
pub(crate) fn check_shapes(
    up: [usize; 2],
    down: [usize; 2],
    mid: Option<[usize; 2]>,
) -> Result<usize, LowRankError> {
    let rank = down[0];
    if up.contains(&0) || down.contains(&0) {
        return Err(LowRankError::Empty { up, down });
    }
    if up[1] != rank {
        return Err(LowRankError::UpDown { up, down });
    }
    match mid {
        Some(mid) if mid != [rank, rank] => Err(LowRankError::Mid { mid, rank }),
        _ => Ok(rank),
    }
}
