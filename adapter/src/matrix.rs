//! A matrix of finite numbers in the element type that its file had.

use protocol::Dtype;

use crate::elements::{first_not_finite, to_f32};

/// Numbers [rows, cols], row-major and little-endian, all of them finite.
#[derive(Clone, PartialEq, Eq)]
pub struct Matrix {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

/// Why bytes are not the matrix that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// More or fewer bytes than the shape needs.
    #[error("{actual} bytes do not make a {dtype} matrix [{rows}, {cols}]")]
    Length {
        /// Type of one element.
        dtype: Dtype,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
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

impl Matrix {
    /// A matrix [`rows`, `cols`] of row-major little-endian `bytes`.
    ///
    /// # Errors
    ///
    /// The size is not that of the shape, or an element is not finite.
    pub fn new(
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: Vec<u8>,
    ) -> Result<Self, MatrixError> {
        let expected = rows.checked_mul(cols).and_then(|count| count.checked_mul(dtype.bytes()));
        if expected != Some(bytes.len()) {
            return Err(MatrixError::Length { dtype, rows, cols, actual: bytes.len() });
        }
        match first_not_finite(dtype, &bytes) {
            Some(index) => Err(MatrixError::NotFinite { index }),
            None => Ok(Self { dtype, rows, cols, bytes }),
        }
    }

    /// Type of one element, the one that the file had.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
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

/// Shape and type only: an adapter has megabytes of elements.
impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({} [{}, {}])", self.dtype, self.rows, self.cols)
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn every_type_lifts_to_the_same_f32() {
        let values = [1.5_f32, -0.25, 0.0, 2.0];
        let float32 = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let float16 = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let bfloat16 = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        for (dtype, bytes) in
            [(Dtype::Float32, float32), (Dtype::Float16, float16), (Dtype::Bfloat16, bfloat16)]
        {
            let matrix = Matrix::new(dtype, 2, 2, bytes).unwrap();
            assert_eq!(matrix.to_f32(), values, "{dtype}");
            assert_eq!(matrix.shape(), [2, 2]);
        }
    }

    #[test]
    fn the_first_element_that_is_not_finite_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for index in [0, 1, 1023, 1024, 1025, 4999] {
                let mut values = vec![f32::MAX; 5000];
                values[index] = bad;
                values[4999] = bad;
                let expected = MatrixError::NotFinite { index };
                let float32 = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(Matrix::new(Dtype::Float32, 50, 100, float32).unwrap_err(), expected);
                let small = values.iter().map(|v| if v.is_finite() { 65504.0 } else { *v });
                let float16 = small.clone().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect();
                assert_eq!(Matrix::new(Dtype::Float16, 50, 100, float16).unwrap_err(), expected);
                let bfloat16 = small.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
                assert_eq!(Matrix::new(Dtype::Bfloat16, 50, 100, bfloat16).unwrap_err(), expected);
            }
        }
    }

    #[test]
    fn the_largest_number_of_every_type_is_finite() {
        let largest = [
            (Dtype::Float32, f32::MAX.to_le_bytes().to_vec(), f32::MAX),
            (Dtype::Float16, f16::MAX.to_le_bytes().to_vec(), f16::MAX.to_f32()),
            (Dtype::Bfloat16, bf16::MAX.to_le_bytes().to_vec(), bf16::MAX.to_f32()),
        ];
        for (dtype, bytes, value) in largest {
            assert_eq!(Matrix::new(dtype, 1, 1, bytes).unwrap().to_f32(), [value], "{dtype}");
        }
    }

    #[test]
    fn a_wrong_number_of_bytes_is_refused() {
        for (rows, cols, length) in
            [(2, 2, 15), (2, 2, 17), (usize::MAX, 2, 4), (usize::MAX, usize::MAX, 4)]
        {
            let error = Matrix::new(Dtype::Float32, rows, cols, vec![0; length]).unwrap_err();
            assert_eq!(
                error,
                MatrixError::Length { dtype: Dtype::Float32, rows, cols, actual: length }
            );
        }
    }
}
