//! Why tensors do not make a patch, and what is known about the weight of those that do.

use crate::error::clip;

/// Why tensors do not make a patch.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PatchError {
    /// A part whose shape does not go with the other parts.
    #[error("{part} has shape {shape}: expected {expected}")]
    Shape {
        /// The part, named as in the canonical form.
        part: &'static str,
        /// Its shape, cut to a length fit for a message.
        shape: String,
        /// The shape that goes with the other parts.
        expected: String,
    },
    /// `alpha` is NaN or infinite.
    #[error("alpha is {0}: expected a finite number")]
    Alpha(f64),
}

/// What the shapes of a patch's parts say, without a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fit {
    /// The greatest rank of a product; 1 where there is none.
    pub(crate) rank: usize,
    /// Rows of the weight, if known.
    pub(crate) rows: Option<usize>,
    /// Columns of the weight, if known.
    pub(crate) cols: Option<usize>,
}

impl Fit {
    /// No product, and no size known.
    pub(crate) const UNKNOWN: Self = Self { rank: 1, rows: None, cols: None };

    pub(crate) fn new(rank: usize, [rows, cols]: [usize; 2]) -> Self {
        Self { rank, rows: Some(rows), cols: Some(cols) }
    }

    /// Checks magnitudes: [out, 1] or [1, in].
    pub(crate) fn check_dora(self, [rows, cols]: [usize; 2]) -> Result<(), PatchError> {
        let on_output = cols == 1 && self.rows.is_none_or(|known| known == rows);
        let on_input = rows == 1 && self.cols.is_none_or(|known| known == cols);
        if rows > 0 && cols > 0 && (on_output || on_input) {
            return Ok(());
        }
        let show =
            |size: Option<usize>, name: &str| size.map_or(name.to_owned(), |n| n.to_string());
        let (out, input) = (show(self.rows, "out"), show(self.cols, "in"));
        Err(PatchError::shape("dora_scale", &[rows, cols], format!("[{out}, 1] or [1, {input}]")))
    }
}

impl PatchError {
    pub(crate) fn shape(part: &'static str, shape: &[usize], expected: String) -> Self {
        Self::Shape { part, shape: clip(&format!("{shape:?}")), expected }
    }
}

/// Checks that `alpha`, where there is one, is a number.
pub(crate) fn check_alpha(alpha: Option<f64>) -> Result<(), PatchError> {
    match alpha {
        Some(alpha) if !alpha.is_finite() => Err(PatchError::Alpha(alpha)),
        _ => Ok(()),
    }
}

/// Checks a product `a` [out, rank] · `b` [rank, in] and returns the shape of the result.
pub(crate) fn check_product(
    [a_name, b_name]: [&'static str; 2],
    [a, b]: [[usize; 2]; 2],
) -> Result<[usize; 2], PatchError> {
    if a.contains(&0) {
        return Err(PatchError::shape(a_name, &a, "no dimension of 0".to_owned()));
    }
    if b[0] != a[1] || b[1] == 0 {
        return Err(PatchError::shape(b_name, &b, format!("[{}, in], none of them 0", a[1])));
    }
    Ok([a[0], b[1]])
}

/// Checks a product through a `core` [i, j, k, l] of `a` [i, out] and `b` [j, in], and returns
/// the shape of the result, [out, in · k · l].
pub(crate) fn check_tucker(
    [core_name, a_name, b_name]: [&'static str; 3],
    core: &[usize],
    [a, b]: [[usize; 2]; 2],
) -> Result<[usize; 2], PatchError> {
    for (name, shape) in [(a_name, a), (b_name, b)] {
        if shape.contains(&0) {
            return Err(PatchError::shape(name, &shape, "no dimension of 0".to_owned()));
        }
    }
    match *core {
        [first, second, height, width]
            if [first, second] == [a[0], b[0]] && height > 0 && width > 0 =>
        {
            // Saturated is as wrong as the true product: no weight is that large.
            Ok([a[1], b[1].saturating_mul(height).saturating_mul(width)])
        }
        _ => Err(PatchError::shape(core_name, core, format!("[{}, {}, k, l]", a[0], b[0]))),
    }
}

/// What a product is multiplied with beside the strength: alpha / rank, or 1 without alpha.
pub(crate) fn scale(alpha: Option<f64>, rank: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
    alpha.map_or(1.0, |alpha| alpha / rank as f64)
}
