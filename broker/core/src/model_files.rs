//! The files of models that the blob store holds, as far as the core was told.
//!
//! They have a budget of their own, so that neither they nor adapters push the other out.

use std::collections::BTreeMap;

use protocol::BlobDigest;

use crate::{blob::StoredModelFile, lru::Lru};

/// Stored files by digest and by last use.
#[derive(Debug, Default)]
pub(crate) struct ModelFiles {
    stored: BTreeMap<BlobDigest, StoredModelFile>,
    lru: Lru<BlobDigest>,
}

impl ModelFiles {
    /// Takes in a file as the one used last.
    pub(crate) fn insert(&mut self, file: StoredModelFile) {
        self.lru.insert(file.blob, file.bytes);
        self.stored.insert(file.blob, file);
    }

    pub(crate) fn remove(&mut self, blob: &BlobDigest) -> Option<StoredModelFile> {
        self.lru.remove(blob);
        self.stored.remove(blob)
    }

    /// Notes that a file was used just now.
    pub(crate) fn touch(&mut self, blob: &BlobDigest) {
        self.lru.touch(blob);
    }

    pub(crate) fn contains(&self, blob: &BlobDigest) -> bool {
        self.stored.contains_key(blob)
    }

    /// Bytes of the files that are `pinned`.
    pub(crate) fn pinned_bytes(&self, pinned: impl Fn(&BlobDigest) -> bool) -> u64 {
        let files = self.stored.values().filter(|file| pinned(&file.blob));
        files.map(|file| file.bytes).sum()
    }

    /// The files that have to go, least recently used first, so that at most `bytes_max` stay.
    /// Those that are `pinned` stay in any case.
    pub(crate) fn excess(
        &self,
        bytes_max: u64,
        pinned: impl Fn(&BlobDigest) -> bool,
    ) -> Vec<BlobDigest> {
        self.lru.excess(bytes_max, pinned)
    }

    /// Bytes of all stored files.
    pub(crate) fn bytes(&self) -> u64 {
        self.lru.bytes()
    }
}
