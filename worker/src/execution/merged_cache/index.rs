//! Which values are kept: a pure index with a budget, by last use, from the second use on.

use std::collections::{BTreeMap, VecDeque};

/// Keys remembered that were asked for once.
const RECENT_MAX: usize = 256;

/// Values by key.
#[derive(Debug)]
pub(super) struct Index<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    /// Keys that were asked for and are not kept, the latest last.
    recent: VecDeque<K>,
    bytes: u64,
    evicted: u64,
    /// Counts questions.
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: u64,
    used_at: u64,
}

impl<K, V> Default for Index<K, V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), recent: VecDeque::new(), bytes: 0, evicted: 0, clock: 0 }
    }
}

impl<K: Ord + Clone, V: Clone> Index<K, V> {
    /// The values of `wanted` keys, which are used together: those that are kept, or are from now on.
    ///
    /// A key is kept when it was asked for not long before and all of `wanted` fit `budget_bytes`
    /// together; then what was not used for the longest time makes room. A key that comes once
    /// pushes nothing out.
    pub(super) fn open(&mut self, wanted: Vec<(K, u64, V)>, budget_bytes: u64) -> Vec<Option<V>> {
        self.clock += 1;
        for (key, ..) in &wanted {
            if let Some(entry) = self.entries.get_mut(key) {
                entry.used_at = self.clock;
            }
        }
        let total = wanted.iter().fold(0, |sum: u64, (_, bytes, _)| sum.saturating_add(*bytes));
        let fits = total <= budget_bytes;
        let opened = wanted.into_iter().map(|(key, bytes, value)| {
            if let Some(entry) = self.entries.get(&key) {
                return Some(entry.value.clone());
            }
            if !fits || !self.was_asked_for(&key) {
                return None;
            }
            self.make_room(bytes, budget_bytes);
            self.bytes += bytes;
            let entry = Entry { value: value.clone(), bytes, used_at: self.clock };
            self.entries.insert(key, entry);
            Some(value)
        });
        opened.collect()
    }

    /// Values that are kept.
    pub(super) fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Bytes of all that are kept.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Values that had to go.
    pub(super) const fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Whether `key` was asked for lately; if not, notes that it is now.
    fn was_asked_for(&mut self, key: &K) -> bool {
        if let Some(at) = self.recent.iter().position(|recent| recent == key) {
            self.recent.remove(at);
            return true;
        }
        self.recent.push_back(key.clone());
        if self.recent.len() > RECENT_MAX {
            self.recent.pop_front();
        }
        false
    }

    /// Drops what was not used for the longest time until `bytes` more fit. Values of the question
    /// under way were used last, and all of them fit together, so none of them goes.
    fn make_room(&mut self, bytes: u64, budget_bytes: u64) {
        while self.bytes.saturating_add(bytes) > budget_bytes {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used_at);
            let Some(key) = oldest.map(|(key, _)| key.clone()) else { return };
            if let Some(entry) = self.entries.remove(&key) {
                self.bytes -= entry.bytes;
                self.evicted += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kept_from_its_second_use_on() {
        let mut index = Index::default();
        assert_eq!(open(&mut index, &[("a", 4)]), [false]);
        assert_eq!(index.len(), 0);
        assert_eq!(open(&mut index, &[("a", 4)]), [true]);
        assert_eq!(open(&mut index, &[("a", 4)]), [true]);
        assert_eq!((index.len(), index.bytes(), index.evicted()), (1, 4, 0));
    }

    #[test]
    fn a_key_that_comes_once_pushes_nothing_out() {
        let mut index = Index::default();
        twice(&mut index, "hot", 10);
        for once in ["a", "b", "c", "d"] {
            assert_eq!(open(&mut index, &[(once, 10)]), [false]);
        }
        assert_eq!(open(&mut index, &[("hot", 10)]), [true]);
        assert_eq!(index.evicted(), 0);
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_makes_room() {
        let mut index = Index::default();
        for key in ["a", "b"] {
            twice(&mut index, key, 5);
        }
        open(&mut index, &[("a", 5)]);
        twice(&mut index, "c", 5);
        let kept: Vec<_> = index.entries.keys().copied().collect();
        assert_eq!((kept, index.bytes(), index.evicted()), (vec!["a", "c"], 10, 1));
    }

    #[test]
    fn what_does_not_fit_together_is_not_kept_in_part() {
        let mut index = Index::default();
        for _ in 0..3 {
            assert_eq!(open(&mut index, &[("l", 4), ("g", 7)]), [false, false]);
        }
        assert_eq!(open(&mut index, &[("l", 4)]), [false]);
        assert_eq!(open(&mut index, &[("l", 4)]), [true]);
        assert_eq!(open(&mut index, &[("l", 4), ("g", 7)]), [true, false]);
        assert_eq!(index.bytes(), 4);
    }

    #[test]
    fn values_of_one_question_do_not_push_each_other_out() {
        let mut index = Index::default();
        twice(&mut index, "old", 6);
        let both = [("l", 4), ("g", 6)];
        assert_eq!(open(&mut index, &both), [false, false]);
        assert_eq!(open(&mut index, &both), [true, true]);
        assert_eq!((index.len(), index.bytes(), index.evicted()), (2, 10, 1));
    }

    #[test]
    fn uses_that_are_long_ago_do_not_count() {
        let mut index = Index::default();
        index.open(vec![(0, 1, ())], 10);
        for key in 1..=RECENT_MAX {
            index.open(vec![(key, 1, ())], 10);
        }
        assert_eq!(index.open(vec![(0, 1, ())], 10), [None]);
        assert_eq!(index.recent.len(), RECENT_MAX);
    }

    /// Whether each key is kept afterwards, of a budget of 10.
    fn open(index: &mut Index<&'static str, ()>, keys: &[(&'static str, u64)]) -> Vec<bool> {
        let wanted = keys.iter().map(|(key, bytes)| (*key, *bytes, ())).collect();
        index.open(wanted, 10).iter().map(Option::is_some).collect()
    }

    fn twice(index: &mut Index<&'static str, ()>, key: &'static str, bytes: u64) {
        open(index, &[(key, bytes)]);
        assert_eq!(open(index, &[(key, bytes)]), [true]);
    }
}
