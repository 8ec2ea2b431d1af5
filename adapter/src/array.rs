//! Finite numbers of one to four dimensions in the element type that their file had.

use protocol::Dtype;

use crate::elements::{first_not_finite, to_f32};

/// Dimensions that an array may have; no patch needs more.
pub(crate) const DIMENSIONS_MAX: usize = 4;

/// Numbers of any shape with 1 to 4 dimensions, row-major and little-endian, all of them finite.
#[derive(Clone, PartialEq, Eq)]
pub struct Array {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Why bytes are not the array that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArrayError {
    /// No dimension, too many of them, or one of size zero.
    #[error(
        "shape {shape:?} is not usable: expected 1 to {DIMENSIONS_MAX} dimensions, none of them 0"
    )]
    Dimensions {
        /// The shape asked for, cut to its first dimensions.
        shape: Vec<usize>,
    },
    /// More or fewer bytes than the shape needs.
    #[error("{actual} bytes do not make a {dtype} array {shape:?}")]
    Length {
        /// Type of one element.
        dtype: Dtype,
        /// The shape asked for.
        shape: Vec<usize>,
        /// Bytes given.
        actual: usize,
    },
    /// A NaN or an infinity.
    #[error("element {index} is not finite")]
    NotFinite {
        /// Its place in row-major order.
        index: usize,
    },
}

impl Array {
    /// An array of `shape` of row-major little-endian `bytes`.
    ///
    /// # Errors
    ///
    /// The shape has no or more than 4 dimensions or one of size zero, the size is not that of the
    /// shape, or an element is not finite.
    pub fn new(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Result<Self, ArrayError> {
        if !(1..=DIMENSIONS_MAX).contains(&shape.len()) || shape.contains(&0) {
            let shape = shape.iter().copied().take(DIMENSIONS_MAX + 1).collect();
            return Err(ArrayError::Dimensions { shape });
        }
        let shape = shape.to_vec();
        let expected = shape.iter().try_fold(dtype.bytes(), |size, next| size.checked_mul(*next));
        if expected != Some(bytes.len()) {
            return Err(ArrayError::Length { dtype, shape, actual: bytes.len() });
        }
        match first_not_finite(dtype, &bytes) {
            Some(index) => Err(ArrayError::NotFinite { index }),
            None => Ok(Self { dtype, shape, bytes }),
        }
    }

    /// Type of one element, the one that the file had.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The size of every dimension: 1 to 4 of them, none of them 0.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as they are stored: row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The elements in row-major order, lifted to f32 (exact for every type).
    pub fn to_f32(&self) -> Vec<f32> {
        to_f32(self.dtype, &self.bytes)
    }
}

/// Shape and type only: an array can have megabytes of elements.
impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Array({} {:?})", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_keeps_shape_type_and_elements() {
        let bytes: Vec<u8> = [0.5_f32, -1.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let array = Array::new(Dtype::Float32, &[1, 2, 1], bytes.clone()).unwrap();
        assert_eq!((array.shape(), array.dtype()), ([1, 2, 1].as_slice(), Dtype::Float32));
        assert_eq!((array.bytes(), array.to_f32()), (bytes.as_slice(), vec![0.5, -1.0]));
    }

    #[test]
    fn shapes_that_no_patch_has_are_refused() {
        for shape in [&[][..], &[0], &[1, 0], &[1; 5], &[1; 1000]] {
            let error = Array::new(Dtype::Float16, shape, vec![0; 2]).unwrap_err();
            assert!(matches!(error, ArrayError::Dimensions { .. }), "{error}");
            assert!(error.to_string().len() < 200, "{error}");
        }
    }

    #[test]
    fn a_wrong_number_of_bytes_is_refused() {
        for shape in [&[2][..], &[1, 2], &[usize::MAX], &[usize::MAX, 2, usize::MAX]] {
            let error = Array::new(Dtype::Float16, shape, vec![0; 2]).unwrap_err();
            assert!(matches!(error, ArrayError::Length { actual: 2, .. }), "{error}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let bytes = [1.0_f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        let error = Array::new(Dtype::Float32, &[2], bytes).unwrap_err();
        assert_eq!(error, ArrayError::NotFinite { index: 1 });
    }
}
