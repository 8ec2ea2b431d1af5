//! OFT and BOFT: rotations of a weight's rows.

use super::fit::{Fit, PatchError, check_alpha};
use crate::{array::Array, matrix::Matrix};

/// Block-diagonal rotation of `W` [n · b, in], in n blocks of b rows.
///
/// For a block `B` [b, b] let `Q = B - Bᵀ`, scaled down to norm alpha where alpha is above 0 and
/// the norm of all `Q` greater, and `R = (I + Q) · (I - Q)⁻¹`. Then
/// `W += strength · (strength · (R - I)) · W`: the strength enters squared.
#[derive(Debug, Clone, PartialEq)]
pub struct Oft(Rotation);

/// Rotation of `W` [n · b, in] through m butterfly factors of n blocks [b, b].
///
/// Without alpha `ComfyUI` fails to apply such a patch and leaves the weight alone. The patch is
/// content all the same: that it was not applied is for the worker to say.
#[derive(Debug, Clone, PartialEq)]
pub struct Boft(Rotation);

/// What both kinds have.
#[derive(Debug, Clone, PartialEq)]
struct Rotation {
    blocks: Array,
    rescale: Option<Array>,
    alpha: Option<f64>,
    dora_scale: Option<Matrix>,
}

impl Oft {
    /// The patch of `blocks` [n, b, b] and, where there is one, `rescale` [n · b, 1].
    ///
    /// # Errors
    ///
    /// The shapes do not belong together, or `alpha` is not finite.
    pub fn new(
        blocks: Array,
        rescale: Option<Array>,
        alpha: Option<f64>,
    ) -> Result<Self, PatchError> {
        check_alpha(alpha)?;
        fit_oft(blocks.shape(), rescale.as_ref().map(Array::shape))?;
        Ok(Self(Rotation { blocks, rescale, alpha, dora_scale: None }))
    }

    /// The same patch, weight-decomposed with these magnitudes, [n · b, 1] or [1, in].
    ///
    /// # Errors
    ///
    /// The magnitudes have another shape.
    pub fn with_dora_scale(mut self, dora_scale: Matrix) -> Result<Self, PatchError> {
        fit_oft(self.blocks().shape(), None)?.check_dora(dora_scale.shape())?;
        self.0.dora_scale = Some(dora_scale);
        Ok(self)
    }

    /// The blocks [n, b, b].
    pub fn blocks(&self) -> &Array {
        &self.0.blocks
    }

    /// Factors of the rows [n · b, 1], which `ComfyUI` reads and does not use.
    pub fn rescale(&self) -> Option<&Array> {
        self.0.rescale.as_ref()
    }

    /// The file's alpha, if it had one; none counts as 0.
    pub fn alpha(&self) -> Option<f64> {
        self.0.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [n · b, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.0.dora_scale.as_ref()
    }
}

impl Boft {
    /// The patch of `blocks` [m, n, b, b] and, where there is one, `rescale` [n · b, 1].
    ///
    /// # Errors
    ///
    /// The shapes do not belong together, the factors do not divide n · b rows, or `alpha` is not
    /// finite.
    pub fn new(
        blocks: Array,
        rescale: Option<Array>,
        alpha: Option<f64>,
    ) -> Result<Self, PatchError> {
        check_alpha(alpha)?;
        fit_boft(blocks.shape(), rescale.as_ref().map(Array::shape))?;
        Ok(Self(Rotation { blocks, rescale, alpha, dora_scale: None }))
    }

    /// The same patch, weight-decomposed with these magnitudes, [n · b, 1] or [1, in].
    ///
    /// # Errors
    ///
    /// The magnitudes have another shape.
    pub fn with_dora_scale(mut self, dora_scale: Matrix) -> Result<Self, PatchError> {
        fit_boft(self.blocks().shape(), None)?.check_dora(dora_scale.shape())?;
        self.0.dora_scale = Some(dora_scale);
        Ok(self)
    }

    /// The blocks [m, n, b, b].
    pub fn blocks(&self) -> &Array {
        &self.0.blocks
    }

    /// Factors of the rows [n · b, 1].
    pub fn rescale(&self) -> Option<&Array> {
        self.0.rescale.as_ref()
    }

    /// The file's alpha, if it had one.
    pub fn alpha(&self) -> Option<f64> {
        self.0.alpha
    }

    /// The magnitudes of a weight-decomposed patch, [n · b, 1] or [1, in].
    pub fn dora_scale(&self) -> Option<&Matrix> {
        self.0.dora_scale.as_ref()
    }
}

/// Checks that the shapes of blocks and `rescale` make an OFT patch.
pub(crate) fn fit_oft(blocks: &[usize], rescale: Option<&[usize]>) -> Result<Fit, PatchError> {
    match *blocks {
        [n, b, b_too] if b == b_too && n > 0 && b > 0 => fit_rows(n.saturating_mul(b), rescale),
        _ => Err(PatchError::shape("blocks", blocks, "[n, b, b], none of them 0".to_owned())),
    }
}

/// Checks that the shapes of blocks and `rescale` make a BOFT patch.
pub(crate) fn fit_boft(blocks: &[usize], rescale: Option<&[usize]>) -> Result<Fit, PatchError> {
    let [m, n, b, b_too] = *blocks else {
        return Err(PatchError::shape("blocks", blocks, "[m, n, b, b]".to_owned()));
    };
    let rows = n.saturating_mul(b);
    // The last factor works on groups of 2^m times half a block.
    let group = u32::try_from(m)
        .ok()
        .and_then(|m| 2_usize.checked_pow(m)?.checked_mul(b / 2))
        .filter(|group| *group > 0 && rows > 0 && rows.is_multiple_of(*group));
    if m == 0 || b != b_too || group.is_none() {
        let expected = "[m, n, b, b] where 2^m times half of b divides n times b";
        return Err(PatchError::shape("blocks", blocks, expected.to_owned()));
    }
    fit_rows(rows, rescale)
}

fn fit_rows(rows: usize, rescale: Option<&[usize]>) -> Result<Fit, PatchError> {
    match rescale {
        Some(shape) if *shape != [rows, 1] => {
            Err(PatchError::shape("rescale", shape, format!("[{rows}, 1]")))
        }
        _ => Ok(Fit { rank: 1, rows: Some(rows), cols: None }),
    }
}
