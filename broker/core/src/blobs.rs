//! What the blob store holds, as far as the core was told.
//!
//! The index decides which adapters have to go when the store is full, because only the broker
//! knows which are in use; the bytes themselves are the shell's.

use std::collections::BTreeMap;

use protocol::{AdapterId, BlobDigest};

use crate::{blob::StoredBlob, lru::Lru};

/// Digests of files that are known for one adapter, the newest ones. Whoever uploads a file with
/// other metadata again and again makes the same adapter of new files every time.
const RAW_MAX: usize = 64;

/// Stored adapters by id, by the digests of the files they came from, and by last use.
#[derive(Debug, Default)]
pub(crate) struct BlobIndex {
    stored: BTreeMap<AdapterId, StoredBlob>,
    by_raw: BTreeMap<BlobDigest, AdapterId>,
    lru: Lru<AdapterId>,
}

impl BlobIndex {
    /// Takes in an adapter as the one used last. Digests of further files are added to those known,
    /// of which the oldest are forgotten.
    pub(crate) fn insert(&mut self, mut blob: StoredBlob) {
        if let Some(known) = self.remove(&blob.adapter) {
            let older = known.raw.into_iter().filter(|raw| !blob.raw.contains(raw));
            let older: Vec<_> = older.collect();
            blob.raw.extend(older);
            blob.label = blob.label.or(known.label);
        }
        blob.raw.truncate(RAW_MAX);
        self.lru.insert(blob.adapter, blob.bytes);
        self.by_raw.extend(blob.raw.iter().map(|&raw| (raw, blob.adapter)));
        self.stored.insert(blob.adapter, blob);
    }

    pub(crate) fn remove(&mut self, adapter: &AdapterId) -> Option<StoredBlob> {
        let blob = self.stored.remove(adapter)?;
        self.lru.remove(adapter);
        for raw in &blob.raw {
            if self.by_raw.get(raw) == Some(adapter) {
                self.by_raw.remove(raw);
            }
        }
        Some(blob)
    }

    /// Notes that an adapter was used just now.
    pub(crate) fn touch(&mut self, adapter: &AdapterId) {
        self.lru.touch(adapter);
    }

    pub(crate) fn get(&self, adapter: &AdapterId) -> Option<&StoredBlob> {
        self.stored.get(adapter)
    }

    pub(crate) fn contains(&self, adapter: &AdapterId) -> bool {
        self.stored.contains_key(adapter)
    }

    /// The adapter that was made from the file with this digest.
    pub(crate) fn made_from(&self, raw: &BlobDigest) -> Option<AdapterId> {
        self.by_raw.get(raw).copied()
    }

    /// Stored adapters, by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &StoredBlob> {
        self.stored.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.stored.len()
    }

    /// Bytes of all stored adapters.
    pub(crate) fn bytes(&self) -> u64 {
        self.lru.bytes()
    }

    /// The adapter that was used last.
    pub(crate) fn latest(&self) -> Option<AdapterId> {
        self.lru.latest()
    }

    /// The adapters that have to go, least recently used first, so that at most `bytes_max` stay.
    /// Those that are `pinned` stay in any case.
    pub(crate) fn excess(
        &self,
        bytes_max: u64,
        pinned: impl Fn(&AdapterId) -> bool,
    ) -> Vec<AdapterId> {
        self.lru.excess(bytes_max, pinned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_adapters_go_first() {
        let mut index = BlobIndex::default();
        for name in ["a", "b", "c", "d"] {
            index.insert(blob(name, 10));
        }
        index.touch(&id("a"));

        assert_eq!(index.excess(40, |_| false), []);
        assert_eq!(index.excess(20, |_| false), [id("b"), id("c")]);
        assert_eq!(index.excess(20, |adapter| *adapter == id("b")), [id("c"), id("d")]);
        assert_eq!(index.latest(), Some(id("a")));
    }

    #[test]
    fn a_removed_adapter_leaves_no_trace() {
        let mut index = BlobIndex::default();
        index.insert(blob("a", 10));
        let raw = BlobDigest::of(b"a");
        assert_eq!(index.made_from(&raw), Some(id("a")));

        index.remove(&id("a"));

        assert_eq!(index.made_from(&raw), None);
        assert_eq!((index.len(), index.bytes()), (0, 0));
        assert_eq!(index.excess(0, |_| false), []);
    }

    #[test]
    fn the_same_adapter_from_another_file_is_found_by_both() {
        let mut index = BlobIndex::default();
        index.insert(blob("a", 10));
        let other = BlobDigest::of(b"other spelling");
        index.insert(StoredBlob { raw: vec![other], label: None, ..blob("a", 10) });

        assert_eq!(index.made_from(&BlobDigest::of(b"a")), Some(id("a")));
        assert_eq!(index.made_from(&other), Some(id("a")));
        assert_eq!(index.get(&id("a")).unwrap().label.as_deref(), Some("a"));
        assert_eq!(index.bytes(), 10);
    }

    #[test]
    fn ever_new_files_of_one_adapter_do_not_add_up() {
        let mut index = BlobIndex::default();
        let files: Vec<_> = (0..100_u8).map(|number| BlobDigest::of(&[number])).collect();
        for &file in &files {
            index.insert(StoredBlob { raw: vec![file], ..blob("a", 10) });
        }

        let (forgotten, known) = files.split_at(files.len() - RAW_MAX);
        assert!(forgotten.iter().all(|file| index.made_from(file).is_none()));
        assert!(known.iter().all(|file| index.made_from(file) == Some(id("a"))));
        assert_eq!(index.by_raw.len(), RAW_MAX);
    }

    fn id(name: &str) -> AdapterId {
        AdapterId::of(name.as_bytes())
    }

    fn blob(name: &str, bytes: u64) -> StoredBlob {
        let raw = vec![BlobDigest::of(name.as_bytes())];
        StoredBlob { adapter: id(name), bytes, label: Some(name.to_owned()), raw }
    }
}
