//! How large a file and its parts may be. Every limit is checked before the allocation it bounds.

/// Longest key of a text-encoder tensor that is kept by name, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// Unmatched keys of one adapter: as many as a file within the default limits can have tensors.
pub const UNMATCHED_KEYS_MAX: usize = 8192;

const MIB: u64 = 1 << 20;

/// What is accepted from a file; the default suits files from strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the whole file. Only its header and its text-encoder tensors are ever read.
    pub file_bytes_max: u64,
    /// Size of the JSON header, which includes the metadata that trainers leave.
    pub header_bytes_max: u64,
    /// Tensors in the file, those of the image model included.
    pub tensors_max: usize,
    /// Rank of a low-rank patch.
    pub rank_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes_max: 2048 * MIB,
            header_bytes_max: 4 * MIB,
            tensors_max: 8192,
            rank_max: 512,
        }
    }
}
