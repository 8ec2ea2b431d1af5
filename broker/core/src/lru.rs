//! Which stored things have to go when there are too many bytes: those that were not used for
//! longest. It knows names and sizes; what the names stand for is its owner's.

use std::collections::{BTreeMap, BTreeSet};

/// Names in the order of their last use, with their sizes.
#[derive(Debug)]
pub(crate) struct Lru<K> {
    entries: BTreeMap<K, Entry>,
    by_use: BTreeSet<(u64, K)>,
    bytes: u64,
    uses: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    last_used: u64,
}

impl<K> Default for Lru<K> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), by_use: BTreeSet::new(), bytes: 0, uses: 0 }
    }
}

impl<K: Copy + Ord> Lru<K> {
    /// Takes in a name as the one used last, in place of what was known of it.
    pub(crate) fn insert(&mut self, name: K, bytes: u64) {
        self.remove(&name);
        self.uses += 1;
        self.bytes += bytes;
        self.by_use.insert((self.uses, name));
        self.entries.insert(name, Entry { bytes, last_used: self.uses });
    }

    /// Forgets a name, whether or not it is known.
    pub(crate) fn remove(&mut self, name: &K) {
        if let Some(Entry { bytes, last_used }) = self.entries.remove(name) {
            self.bytes -= bytes;
            self.by_use.remove(&(last_used, *name));
        }
    }

    /// Notes that a name was used just now.
    pub(crate) fn touch(&mut self, name: &K) {
        if let Some(Entry { bytes, .. }) = self.entries.get(name).copied() {
            self.insert(*name, bytes);
        }
    }

    /// The name that was used last.
    pub(crate) fn latest(&self) -> Option<K> {
        self.by_use.last().map(|&(_, name)| name)
    }

    /// Bytes of everything.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The names that have to go, least recently used first, so that at most `bytes_max` stay.
    /// Those that are `pinned` stay in any case.
    pub(crate) fn excess(&self, bytes_max: u64, pinned: impl Fn(&K) -> bool) -> Vec<K> {
        let mut bytes = self.bytes;
        let mut excess = Vec::new();
        for (_, name) in &self.by_use {
            if bytes <= bytes_max {
                break;
            }
            if !pinned(name) {
                bytes -= self.entries[name].bytes;
                excess.push(*name);
            }
        }
        excess
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_go_first_and_the_pinned_stay() {
        let mut lru = Lru::default();
        for name in ["a", "b", "c"] {
            lru.insert(name, 10);
        }
        lru.touch(&"a");
        assert_eq!((lru.bytes(), lru.latest()), (30, Some("a")));
        assert_eq!(lru.excess(30, |_| false), Vec::<&str>::new());
        assert_eq!(lru.excess(11, |_| false), ["b", "c"]);
        assert_eq!(lru.excess(11, |name| *name == "b"), ["c", "a"]);
    }

    #[test]
    fn a_name_counts_once_and_leaves_no_trace() {
        let mut lru = Lru::default();
        lru.insert("a", 10);
        lru.insert("a", 7);
        assert_eq!(lru.bytes(), 7);
        lru.remove(&"a");
        lru.remove(&"a");
        lru.touch(&"a");
        assert_eq!((lru.bytes(), lru.latest()), (0, None));
        assert_eq!(lru.excess(0, |_| false), Vec::<&str>::new());
    }
}
