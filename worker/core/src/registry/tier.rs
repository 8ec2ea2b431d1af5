//! One tier of the registry: a budget, and which of its adapters was used longest ago.

use std::collections::BTreeMap;

use protocol::AdapterId;

/// Bytes and order of use of the adapters in one place.
#[derive(Debug)]
pub(super) struct Tier {
    budget_bytes: u64,
    used_bytes: u64,
    /// By mark: the smallest was used longest ago.
    order: BTreeMap<u64, AdapterId>,
}

impl Tier {
    pub(super) fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, used_bytes: 0, order: BTreeMap::new() }
    }

    pub(super) fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Whether `bytes` would fit if the tier were empty. A tier without a budget takes nothing.
    pub(super) fn takes(&self, bytes: u64) -> bool {
        self.budget_bytes > 0 && bytes <= self.budget_bytes
    }

    /// Whether `bytes` fit beside what is there.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.used_bytes.saturating_add(bytes) <= self.budget_bytes
    }

    /// Counts bytes that are on their way.
    pub(super) fn reserve(&mut self, bytes: u64) {
        self.used_bytes += bytes;
        debug_assert!(self.used_bytes <= self.budget_bytes, "a tier is over its budget");
    }

    /// No longer counts these bytes.
    pub(super) fn release(&mut self, bytes: u64) {
        self.used_bytes -= bytes;
    }

    /// An adapter whose bytes are counted is there.
    pub(super) fn insert(&mut self, mark: u64, adapter: AdapterId) {
        self.order.insert(mark, adapter);
    }

    /// An adapter leaves, its bytes with it.
    pub(super) fn remove(&mut self, mark: u64, bytes: u64) {
        self.order.remove(&mark);
        self.release(bytes);
    }

    /// The adapter with mark `old` is used now.
    pub(super) fn touch(&mut self, old: u64, new: u64) {
        if let Some(adapter) = self.order.remove(&old) {
            self.order.insert(new, adapter);
        }
    }

    /// Its adapters, the one used longest ago first.
    pub(super) fn oldest_first(&self) -> impl DoubleEndedIterator<Item = AdapterId> {
        self.order.values().copied()
    }
}
