//! Tensors of an open file as values: matrices, arrays and alphas, with the key in every error.

use protocol::Dtype;
use safetensors::tensor::TensorInfo;

use crate::{
    array::{Array, DIMENSIONS_MAX},
    container::Container,
    error::{AdapterError, clip},
    matrix::Matrix,
    source::ByteSource,
};

/// One tensor of a file with the name that errors give it.
#[derive(Clone, Copy)]
pub(crate) struct Tensor<'f> {
    pub(crate) key: &'f str,
    pub(crate) info: &'f TensorInfo,
}

impl<'f> Tensor<'f> {
    /// Rows, and everything after them as columns: [r, i, 1, 1] is [r, i].
    ///
    /// Trailing dimensions are flattened whatever they are, as ComfyUI does.
    pub(crate) fn flattened(self) -> Result<[usize; 2], AdapterError> {
        match self.info.shape.as_slice() {
            // No overflow: the header was accepted, so the size of the whole tensor is a `usize`.
            [rows, cols @ ..] if !cols.is_empty() && *rows > 0 => {
                Ok([*rows, cols.iter().product()])
            }
            _ => Err(self.wrong_shape("two or more dimensions, none of them 0")),
        }
    }

    /// Rows and columns of a matrix or of a convolution of one point: [r, i, 1, 1] is [r, i].
    pub(crate) fn pointwise(self) -> Result<[usize; 2], AdapterError> {
        match *self.info.shape.as_slice() {
            [rows, cols] | [rows, cols, 1, 1] => Ok([rows, cols]),
            _ => Err(self.wrong_shape("[rows, columns] or [rows, columns, 1, 1]")),
        }
    }

    /// Rows and columns of a tensor that has nothing else.
    pub(crate) fn plain_matrix(self) -> Result<[usize; 2], AdapterError> {
        let shape = self.info.shape.as_slice();
        shape.try_into().map_err(|_| self.wrong_shape("two dimensions"))
    }

    /// The shape of a tensor that can be an array.
    pub(crate) fn array_shape(self) -> Result<&'f [usize], AdapterError> {
        let shape = self.info.shape.as_slice();
        if (1..=DIMENSIONS_MAX).contains(&shape.len()) && !shape.contains(&0) {
            return Ok(shape);
        }
        Err(self.wrong_shape("one to four dimensions, none of them 0"))
    }

    /// Checks a `mid` as files and ComfyUI have it. Of a linear weight it is [rank, rank, 1, 1]; a
    /// real kernel belongs to a convolution.
    pub(crate) fn check_mid(self) -> Result<(), AdapterError> {
        match *self.info.shape.as_slice() {
            [_, _, 1, 1] => Ok(()),
            _ => Err(self.wrong_shape("[rank, rank, 1, 1]")),
        }
    }

    /// Checks the shape of a tensor that is only there to be named.
    pub(crate) fn check_mark(self) -> Result<(), AdapterError> {
        if self.info.shape == [0] { Ok(()) } else { Err(self.wrong_shape("[0], no element")) }
    }

    /// The element type, if it is one that patches can have.
    pub(crate) fn dtype(self) -> Result<Dtype, AdapterError> {
        [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16]
            .into_iter()
            .find(|dtype| file_dtype(*dtype) == self.info.dtype)
            .ok_or_else(|| AdapterError::UnsupportedDtype {
                key: self.key.to_owned(),
                dtype: self.info.dtype.to_string(),
            })
    }

    /// Reads the tensor as a matrix of `shape`, which has as many elements as the tensor.
    pub(crate) fn read_matrix<S: ByteSource + ?Sized>(
        self,
        file: &Container<'_, S>,
        [rows, cols]: [usize; 2],
    ) -> Result<Matrix, AdapterError> {
        let dtype = self.dtype()?;
        Matrix::new(dtype, rows, cols, file.read(self.info)?)
            .map_err(|source| AdapterError::Matrix { key: self.key.to_owned(), source })
    }

    /// Reads the tensor as an array.
    pub(crate) fn read_array<S: ByteSource + ?Sized>(
        self,
        file: &Container<'_, S>,
    ) -> Result<Array, AdapterError> {
        let (dtype, shape) = (self.dtype()?, self.array_shape()?);
        Array::new(dtype, shape, file.read(self.info)?)
            .map_err(|source| AdapterError::Array { key: self.key.to_owned(), source })
    }

    /// Reads the tensor as one finite number. Trainers write it in any type; all are lifted exactly.
    pub(crate) fn read_alpha<S: ByteSource + ?Sized>(
        self,
        file: &Container<'_, S>,
    ) -> Result<f64, AdapterError> {
        if self.info.shape.iter().any(|dimension| *dimension != 1) {
            return Err(self.wrong_shape("a single number"));
        }
        let bytes = file.read(self.info)?;
        let value = lift(self.info.dtype, &bytes)
            .ok_or_else(|| self.wrong_alpha(self.info.dtype.to_string()))?;
        if value.is_finite() { Ok(value) } else { Err(self.wrong_alpha(value.to_string())) }
    }

    /// The error for a shape that this tensor's role cannot have.
    pub(crate) fn wrong_shape(self, expected: &'static str) -> AdapterError {
        let shape = clip(&format!("{:?}", self.info.shape));
        AdapterError::Shape { key: self.key.to_owned(), shape, expected }
    }

    fn wrong_alpha(self, value: String) -> AdapterError {
        AdapterError::Alpha { key: self.key.to_owned(), value }
    }
}

/// The safetensors type of elements of `dtype`.
pub(crate) fn file_dtype(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::Float32 => safetensors::Dtype::F32,
        Dtype::Float16 => safetensors::Dtype::F16,
        Dtype::Bfloat16 => safetensors::Dtype::BF16,
    }
}

/// The number in `bytes`, or nothing if it cannot be lifted to f64 exactly or is not of a plain type.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other type is refused, also those yet to come"
)]
fn lift(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<f64> {
    use safetensors::Dtype as File;
    let exact = |wide: i128| i32::try_from(wide).ok().map(f64::from);
    match dtype {
        File::F64 => Some(f64::from_le_bytes(bytes.try_into().ok()?)),
        File::F32 => Some(f64::from(f32::from_le_bytes(bytes.try_into().ok()?))),
        File::F16 => Some(half::f16::from_le_bytes(bytes.try_into().ok()?).to_f64()),
        File::BF16 => Some(half::bf16::from_le_bytes(bytes.try_into().ok()?).to_f64()),
        File::I64 => exact(i64::from_le_bytes(bytes.try_into().ok()?).into()),
        File::I32 => exact(i32::from_le_bytes(bytes.try_into().ok()?).into()),
        File::I16 => exact(i16::from_le_bytes(bytes.try_into().ok()?).into()),
        File::I8 => exact(i8::from_le_bytes(bytes.try_into().ok()?).into()),
        File::U64 => exact(u64::from_le_bytes(bytes.try_into().ok()?).into()),
        File::U32 => exact(u32::from_le_bytes(bytes.try_into().ok()?).into()),
        File::U16 => exact(u16::from_le_bytes(bytes.try_into().ok()?).into()),
        File::U8 => exact(u8::from_le_bytes(bytes.try_into().ok()?).into()),
        _ => None,
    }
}
