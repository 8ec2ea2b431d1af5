//! Tensors on the wire: the header says dtype, shape and attachment, the attachment holds the raw
//! little-endian elements in row-major order.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::model::Dtype;

/// Most dimensions of a tensor on the wire.
const DIMENSIONS_MAX: usize = 4;

/// Where a tensor's elements are and how to read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRef {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes of the dimensions, outermost first.
    pub shape: Vec<u32>,
    /// Index of the attachment, counted from the first frame after the header.
    pub attachment: u16,
}

/// A tensor reference that does not fit the message it came in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTensor {
    /// The header points past the last attachment.
    #[error("attachment {attachment} does not exist: the message has {attachments}")]
    NoAttachment {
        /// The index asked for.
        attachment: u16,
        /// How many there are.
        attachments: usize,
    },
    /// The attachment is not as long as dtype and shape say.
    #[error(
        "attachment {attachment} has {found} bytes: {dtype} of shape {shape:?} needs {expected}"
    )]
    Size {
        /// The index of the attachment.
        attachment: u16,
        /// Element type in the header.
        dtype: Dtype,
        /// Shape in the header.
        shape: Vec<u32>,
        /// Bytes that dtype and shape ask for.
        expected: u64,
        /// Bytes that came.
        found: usize,
    },
    /// Too many dimensions, or more bytes than 64 bits count.
    #[error(
        "shape {0:?} is out of range: expected at most {DIMENSIONS_MAX} dimensions and fewer than 2^64 bytes"
    )]
    Shape(Vec<u32>),
}

impl TensorRef {
    /// Bytes that dtype and shape ask for, or nothing when they are out of range.
    pub fn byte_count(&self) -> Option<u64> {
        if self.shape.len() > DIMENSIONS_MAX {
            return None;
        }
        let element = u64::try_from(self.dtype.bytes()).ok()?;
        self.shape.iter().try_fold(element, |bytes, &size| bytes.checked_mul(u64::from(size)))
    }

    /// The elements' bytes, checked against dtype and shape.
    ///
    /// # Errors
    /// When the attachment is absent or not exactly as long as the header says.
    pub fn bytes<'a>(&self, attachments: &'a [Bytes]) -> Result<&'a Bytes, InvalidTensor> {
        let expected = self.byte_count().ok_or_else(|| InvalidTensor::Shape(self.shape.clone()))?;
        let Some(bytes) = attachments.get(usize::from(self.attachment)) else {
            let attachments = attachments.len();
            return Err(InvalidTensor::NoAttachment { attachment: self.attachment, attachments });
        };
        if u64::try_from(bytes.len()) != Ok(expected) {
            return Err(InvalidTensor::Size {
                attachment: self.attachment,
                dtype: self.dtype,
                shape: self.shape.clone(),
                expected,
                found: bytes.len(),
            });
        }
        Ok(bytes)
    }
}

/// Little-endian bytes of `elements`.
pub fn f32_to_bytes(elements: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(size_of_val(elements));
    for element in elements {
        bytes.extend_from_slice(&element.to_le_bytes());
    }
    bytes.into()
}

/// The elements in little-endian `bytes`; a rest shorter than one element is left out.
pub fn f32_from_bytes(bytes: &[u8]) -> Vec<f32> {
    let (elements, _) = bytes.as_chunks();
    elements.iter().map(|element| f32::from_le_bytes(*element)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_must_be_exactly_as_long_as_its_header_says() {
        let attachments = [f32_to_bytes(&[1.0, 2.0, 3.0])];
        let tensor = |shape: &[u32], attachment| TensorRef {
            dtype: Dtype::Float32,
            shape: shape.to_vec(),
            attachment,
        };

        assert_eq!(
            f32_from_bytes(tensor(&[1, 3], 0).bytes(&attachments).unwrap()),
            [1.0, 2.0, 3.0]
        );
        let error = tensor(&[2, 2], 0).bytes(&attachments).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attachment 0 has 12 bytes: float32 of shape [2, 2] needs 16"
        );
        assert!(matches!(
            tensor(&[3], 1).bytes(&attachments),
            Err(InvalidTensor::NoAttachment { .. })
        ));
        assert!(matches!(
            tensor(&[u32::MAX; 4], 0).bytes(&attachments),
            Err(InvalidTensor::Shape(_))
        ));
    }
}
