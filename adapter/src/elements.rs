//! Elements as they are stored: little-endian bytes of one type, checked and lifted.

use protocol::Dtype;

/// Bytes that are scanned before an early exit is considered: lets the scan be vectorised.
const SCAN_BLOCK_BYTES: usize = 4096;

/// All elements, lifted to f32 (exact for every type).
pub(crate) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::Float32 => words(bytes, f32::from_le_bytes),
        Dtype::Float16 => words(bytes, |word| half::f16::from_le_bytes(word).to_f32()),
        Dtype::Bfloat16 => words(bytes, |word| half::bf16::from_le_bytes(word).to_f32()),
    }
}

/// Index of the first NaN or infinity: an element whose exponent bits are all set.
pub(crate) fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    const F32: u32 = 0x7f80_0000;
    const F16: u16 = 0x7c00;
    const BF16: u16 = 0x7f80;
    match dtype {
        Dtype::Float32 => first_where(bytes, |word| u32::from_le_bytes(word) & F32 == F32),
        Dtype::Float16 => first_where(bytes, |word| u16::from_le_bytes(word) & F16 == F16),
        Dtype::Bfloat16 => first_where(bytes, |word| u16::from_le_bytes(word) & BF16 == BF16),
    }
}

fn words<const N: usize>(bytes: &[u8], lift: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().map(|word| lift(*word)).collect()
}

fn first_where<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (words, _) = bytes.as_chunks::<N>();
    let mut block_start = 0;
    for block in words.chunks(SCAN_BLOCK_BYTES / N) {
        if block.iter().fold(false, |bad, word| bad | is_bad(*word)) {
            return block.iter().position(|word| is_bad(*word)).map(|index| block_start + index);
        }
        block_start += block.len();
    }
    None
}
