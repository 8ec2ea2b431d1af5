//! Elements of a file to elements in memory: rounded to the storage dtype, hashed on the way.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use protocol::Dtype;

/// Elements converted at a time; their buffers stay in the first-level cache.
const CHUNK_ELEMENTS: usize = 2048;

/// Elements of a tensor as a file holds them, little-endian.
#[derive(Debug, Clone, Copy)]
pub(super) struct Elements<'a> {
    pub(super) dtype: Dtype,
    pub(super) bytes: &'a [u8],
}

/// The elements in the dtype that weights are stored in.
#[derive(Debug)]
pub(super) enum Stored {
    Float32(Vec<f32>),
    Float16(Vec<f16>),
    Bfloat16(Vec<bf16>),
}

impl Elements<'_> {
    fn len(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// The elements rounded to `storage` and widened again; their stored bytes go to `hasher`.
    pub(super) fn rounded(&self, storage: Dtype, hasher: &mut blake3::Hasher) -> Vec<f32> {
        let mut rounded = Vec::with_capacity(self.len());
        self.convert(storage, |elements, bytes| {
            rounded.extend_from_slice(elements);
            hasher.update(bytes);
        });
        rounded
    }

    /// The elements in `storage`; their bytes go to `hasher`.
    pub(super) fn stored(&self, storage: Dtype, hasher: &mut blake3::Hasher) -> Stored {
        let mut stored = Stored::with_capacity(storage, self.len());
        self.convert(storage, |elements, bytes| {
            stored.extend(elements);
            hasher.update(bytes);
        });
        stored
    }

    /// An `[inputs, outputs]` matrix turned into an `[outputs, inputs]` one, widened.
    pub(super) fn transposed(&self, inputs: usize, outputs: usize) -> Vec<u8> {
        let width = self.dtype.bytes();
        let mut transposed = Vec::with_capacity(self.bytes.len());
        for output in 0..outputs {
            for input in 0..inputs {
                let start = (input * outputs + output) * width;
                transposed.extend_from_slice(&self.bytes[start..start + width]);
            }
        }
        transposed
    }

    /// Calls `each` with chunks of rounded, widened elements and of their bytes in `storage`.
    fn convert(&self, storage: Dtype, mut each: impl FnMut(&[f32], &[u8])) {
        let mut elements = [0f32; CHUNK_ELEMENTS];
        let mut bytes = [0u8; CHUNK_ELEMENTS * 4];
        for chunk in self.bytes.chunks(CHUNK_ELEMENTS * self.dtype.bytes()) {
            let count = chunk.len() / self.dtype.bytes();
            let elements = &mut elements[..count];
            widen(self.dtype, chunk, elements);
            round(storage, elements);
            let bytes = &mut bytes[..count * storage.bytes()];
            narrow(storage, elements, bytes);
            each(elements, bytes);
        }
    }
}

impl Stored {
    fn with_capacity(dtype: Dtype, capacity: usize) -> Self {
        match dtype {
            Dtype::Float32 => Self::Float32(Vec::with_capacity(capacity)),
            Dtype::Float16 => Self::Float16(Vec::with_capacity(capacity)),
            Dtype::Bfloat16 => Self::Bfloat16(Vec::with_capacity(capacity)),
        }
    }

    fn extend(&mut self, elements: &[f32]) {
        match self {
            Self::Float32(stored) => stored.extend_from_slice(elements),
            Self::Float16(stored) => stored.extend(elements.iter().map(|x| f16::from_f32(*x))),
            Self::Bfloat16(stored) => stored.extend(elements.iter().map(|x| bf16::from_f32(*x))),
        }
    }
}

/// The element type of a file's tensor, if it is one that weights have.
pub(crate) fn float_dtype(dtype: safetensors::Dtype) -> Option<Dtype> {
    [
        (safetensors::Dtype::F32, Dtype::Float32),
        (safetensors::Dtype::F16, Dtype::Float16),
        (safetensors::Dtype::BF16, Dtype::Bfloat16),
    ]
    .into_iter()
    .find_map(|(file, ours)| (file == dtype).then_some(ours))
}

/// Little-endian elements of `dtype` as f32, which holds all of them exactly.
pub(crate) fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let mut elements = Vec::with_capacity(bytes.len() / dtype.bytes());
    let source = Elements { dtype, bytes };
    source.convert(Dtype::Float32, |chunk, _| elements.extend_from_slice(chunk));
    elements
}

/// Rounds every element to the nearest that `dtype` can hold.
pub(crate) fn round(dtype: Dtype, elements: &mut [f32]) {
    let mut half = [f16::ZERO; CHUNK_ELEMENTS];
    let mut brain = [bf16::ZERO; CHUNK_ELEMENTS];
    for chunk in elements.chunks_mut(CHUNK_ELEMENTS) {
        match dtype {
            Dtype::Float32 => return,
            Dtype::Float16 => {
                let half = &mut half[..chunk.len()];
                half.convert_from_f32_slice(chunk);
                half.convert_to_f32_slice(chunk);
            }
            Dtype::Bfloat16 => {
                let brain = &mut brain[..chunk.len()];
                brain.convert_from_f32_slice(chunk);
                brain.convert_to_f32_slice(chunk);
            }
        }
    }
}

/// Reads as many elements as `elements` takes.
fn widen(dtype: Dtype, bytes: &[u8], elements: &mut [f32]) {
    match dtype {
        Dtype::Float32 => {
            for (element, bytes) in elements.iter_mut().zip(bytes.as_chunks().0) {
                *element = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::Float16 => {
            let mut half = [f16::ZERO; CHUNK_ELEMENTS];
            let half = &mut half[..elements.len()];
            for (element, bytes) in half.iter_mut().zip(bytes.as_chunks().0) {
                *element = f16::from_le_bytes(*bytes);
            }
            half.convert_to_f32_slice(elements);
        }
        Dtype::Bfloat16 => {
            for (element, bytes) in elements.iter_mut().zip(bytes.as_chunks().0) {
                *element = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

/// Writes elements that `dtype` holds exactly.
fn narrow(dtype: Dtype, elements: &[f32], bytes: &mut [u8]) {
    match dtype {
        Dtype::Float32 => {
            for (bytes, element) in bytes.as_chunks_mut().0.iter_mut().zip(elements) {
                *bytes = element.to_le_bytes();
            }
        }
        Dtype::Float16 => {
            let mut half = [f16::ZERO; CHUNK_ELEMENTS];
            let half = &mut half[..elements.len()];
            half.convert_from_f32_slice(elements);
            for (bytes, element) in bytes.as_chunks_mut().0.iter_mut().zip(half) {
                *bytes = element.to_le_bytes();
            }
        }
        Dtype::Bfloat16 => {
            for (bytes, element) in bytes.as_chunks_mut().0.iter_mut().zip(elements) {
                *bytes = bf16::from_f32(*element).to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_rounded_to_the_storage_dtype_and_hashed_in_it() {
        // 1 + 2^-11 lies halfway between two f16 and goes to the even one.
        let values = [1.0f32, 1.000_488_3, -0.1, 65504.0, f32::from_bits(1)];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let elements = Elements { dtype: Dtype::Float32, bytes: &bytes };

        for storage in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            let expected: Vec<f32> = values
                .iter()
                .map(|&value| match storage {
                    Dtype::Float32 => value,
                    Dtype::Float16 => f16::from_f32(value).to_f32(),
                    Dtype::Bfloat16 => bf16::from_f32(value).to_f32(),
                })
                .collect();
            let (mut widened, mut held) = (blake3::Hasher::new(), blake3::Hasher::new());
            assert_eq!(elements.rounded(storage, &mut widened), expected, "{storage}");
            elements.stored(storage, &mut held);
            assert_eq!(widened.finalize(), held.finalize());
        }
    }

    #[test]
    fn a_file_of_any_dtype_gives_the_same_hash_once_it_is_rounded() {
        let values: Vec<f32> = (0..5000u16).map(|x| f32::from(x % 1000) * 0.25 - 125.0).collect();
        let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let half: Vec<u8> =
            values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();

        let hash = |dtype, bytes: &[u8]| {
            let mut hasher = blake3::Hasher::new();
            let elements = Elements { dtype, bytes };
            assert!(elements.rounded(Dtype::Float16, &mut hasher) == values);
            hasher.finalize()
        };
        assert_eq!(hash(Dtype::Float32, &wide), hash(Dtype::Float16, &half));
    }

    #[test]
    fn a_transposed_matrix_keeps_its_elements() {
        let bytes: Vec<u8> =
            [1f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let elements = Elements { dtype: Dtype::Float32, bytes: &bytes };
        let transposed = elements.transposed(2, 3);
        let transposed = Elements { dtype: Dtype::Float32, bytes: &transposed };
        let read = transposed.rounded(Dtype::Float32, &mut blake3::Hasher::new());
        assert_eq!(read, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
