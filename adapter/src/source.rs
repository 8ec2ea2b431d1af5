//! Where bytes come from, so that of a file of gigabytes only the needed ranges are read.

use std::io;

/// Bytes that can be read at any place: a slice here, a file with positioned reads elsewhere.
pub trait ByteSource {
    /// Size of the whole in bytes.
    fn byte_len(&self) -> u64;

    /// Reads exactly `length` bytes from `offset`.
    ///
    /// # Errors
    ///
    /// Whatever the medium reports; a range that ends past the end is `UnexpectedEof`.
    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>>;
}

impl ByteSource for [u8] {
    fn byte_len(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(length)?))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_reads_inside_and_refuses_outside() {
        let bytes: &[u8] = b"abcd";
        assert_eq!(bytes.read(1, 2).unwrap(), b"bc");
        assert_eq!(bytes.read(4, 0).unwrap(), b"");
        for (offset, length) in [(3, 2), (5, 0), (u64::MAX, 1), (1, usize::MAX)] {
            let error = bytes.read(offset, length).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
