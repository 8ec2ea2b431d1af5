//! Which adapters this worker holds, and which of them go when room is needed.
//!
//! The registry knows ids and sizes only; the tensors live in the shell. An adapter is
//!
//! ```text
//! absent => Loading => Resident => absent        (evicted, or asked to go)
//!              |
//!              `=> absent                        (could not be fetched)
//! ```
//!
//! **Invariants:** a pinned adapter is never evicted; the resident bytes exceed the budget only by
//! what is pinned; the revision grows with every change of the resident set.

use std::collections::BTreeMap;

use protocol::AdapterId;

/// Adapters by id, with a budget in bytes.
#[derive(Debug)]
pub struct Registry {
    entries: BTreeMap<AdapterId, Entry>,
    budget_bytes: u64,
    /// Counts uses; the smallest mark was used longest ago.
    uses: u64,
    revision: u64,
}

#[derive(Debug)]
struct Entry {
    state: State,
    pins: u32,
    last_use: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Loading,
    Resident { bytes: u64 },
}

/// What the registry knows of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Ready to use.
    Resident,
    /// Being fetched.
    Loading,
    /// Neither.
    Absent,
}

/// An adapter larger than the whole budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "adapter {adapter} takes {bytes} bytes: this worker's whole adapter budget is {budget_bytes}, raise `adapter_budget_mb`"
)]
pub struct OverBudget {
    adapter: AdapterId,
    bytes: u64,
    budget_bytes: u64,
}

impl Registry {
    /// An empty registry that keeps at most `budget_bytes` of adapters that nothing uses.
    pub fn new(budget_bytes: u64) -> Self {
        Self { entries: BTreeMap::new(), budget_bytes, uses: 0, revision: 0 }
    }

    /// Whether `adapter` can be used.
    pub fn presence(&self, adapter: &AdapterId) -> Presence {
        match self.entries.get(adapter).map(|entry| entry.state) {
            Some(State::Resident { .. }) => Presence::Resident,
            Some(State::Loading) => Presence::Loading,
            None => Presence::Absent,
        }
    }

    /// The resident adapters, by id.
    pub fn resident(&self) -> impl Iterator<Item = AdapterId> {
        let is_resident = |entry: &Entry| matches!(entry.state, State::Resident { .. });
        self.entries.iter().filter(move |(_, entry)| is_resident(entry)).map(|(id, _)| *id)
    }

    /// Bytes of the resident adapters.
    pub fn resident_bytes(&self) -> u64 {
        self.entries.values().map(Entry::bytes).sum()
    }

    /// Grows with every change of the resident set.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Holds `adapter` for one more request, and says whether it must be fetched first.
    pub(crate) fn pin(&mut self, adapter: AdapterId) -> Presence {
        let presence = self.presence(&adapter);
        self.uses += 1;
        let entry = self.entries.entry(adapter).or_insert(Entry {
            // ## absent => Loading
            state: State::Loading,
            pins: 0,
            last_use: 0,
        });
        entry.pins += 1;
        entry.last_use = self.uses;
        presence
    }

    /// Lets go of `adapter` for one request. Returns what leaves to keep the budget.
    pub(crate) fn unpin(&mut self, adapter: &AdapterId) -> Vec<AdapterId> {
        if let Some(entry) = self.entries.get_mut(adapter) {
            debug_assert!(entry.pins > 0, "unpinned {adapter} more often than pinned");
            entry.pins = entry.pins.saturating_sub(1);
        }
        self.evict_over_budget()
    }

    /// `adapter` has arrived. Returns what leaves to make room.
    pub(crate) fn loaded(
        &mut self,
        adapter: AdapterId,
        bytes: u64,
    ) -> Result<Vec<AdapterId>, OverBudget> {
        if bytes > self.budget_bytes {
            self.failed(&adapter);
            return Err(OverBudget { adapter, bytes, budget_bytes: self.budget_bytes });
        }
        if let Some(entry) = self.entries.get_mut(&adapter) {
            // ## Loading => Resident
            entry.state = State::Resident { bytes };
            self.revision += 1;
        }
        Ok(self.evict_over_budget())
    }

    /// `adapter` could not be fetched.
    pub(crate) fn failed(&mut self, adapter: &AdapterId) {
        if self.presence(adapter) == Presence::Loading {
            // ## Loading => absent
            self.entries.remove(adapter);
        }
    }

    /// Drops `adapter` if nothing uses it; says whether it did.
    pub(crate) fn evict(&mut self, adapter: &AdapterId) -> bool {
        let idle = self.entries.get(adapter).is_some_and(Entry::is_idle);
        if idle {
            // ## Resident => absent
            self.entries.remove(adapter);
            self.revision += 1;
        }
        idle
    }

    /// Evicts idle adapters, least recently used first, until the budget holds.
    fn evict_over_budget(&mut self) -> Vec<AdapterId> {
        let mut evicted = Vec::new();
        let mut used = self.resident_bytes();
        while used > self.budget_bytes {
            let idle = self.entries.iter().filter(|(_, entry)| entry.is_idle());
            let Some((&oldest, entry)) = idle.min_by_key(|(_, entry)| entry.last_use) else {
                break;
            };
            used -= entry.bytes();
            self.evict(&oldest);
            evicted.push(oldest);
        }
        evicted
    }
}

impl Entry {
    fn bytes(&self) -> u64 {
        match self.state {
            State::Resident { bytes } => bytes,
            State::Loading => 0,
        }
    }

    fn is_idle(&self) -> bool {
        self.pins == 0 && matches!(self.state, State::Resident { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_adapter_leaves_first() {
        let mut registry = Registry::new(100);
        for (name, bytes) in [("a", 40), ("b", 40)] {
            load(&mut registry, name, bytes);
        }
        registry.pin(id("a"));
        registry.unpin(&id("a"));

        assert_eq!(load(&mut registry, "c", 40), [id("b")]);
        assert_eq!(registry.presence(&id("a")), Presence::Resident);
        assert_eq!(registry.resident_bytes(), 80);
    }

    #[test]
    fn a_pinned_adapter_stays_even_over_budget() {
        let mut registry = Registry::new(100);
        registry.pin(id("a"));
        registry.loaded(id("a"), 80).unwrap();
        registry.pin(id("b"));
        assert_eq!(registry.loaded(id("b"), 80).unwrap(), []);
        assert!(!registry.evict(&id("a")));

        assert_eq!(registry.unpin(&id("a")), [id("a")]);
        assert_eq!(registry.resident_bytes(), 80);
    }

    #[test]
    fn an_adapter_over_the_whole_budget_is_refused_by_name() {
        let mut registry = Registry::new(100);
        registry.pin(id("a"));
        let error = registry.loaded(id("a"), 101).unwrap_err();
        assert!(error.to_string().contains("takes 101 bytes"), "{error}");
        assert_eq!(registry.presence(&id("a")), Presence::Absent);
    }

    #[test]
    fn the_revision_grows_with_every_change_of_the_resident_set() {
        let mut registry = Registry::new(100);
        load(&mut registry, "a", 10);
        assert_eq!(registry.revision(), 1);
        registry.pin(id("a"));
        registry.unpin(&id("a"));
        assert_eq!(registry.revision(), 1);
        assert!(registry.evict(&id("a")));
        assert_eq!(registry.revision(), 2);
    }

    fn load(registry: &mut Registry, name: &str, bytes: u64) -> Vec<AdapterId> {
        registry.pin(id(name));
        let mut evicted = registry.loaded(id(name), bytes).unwrap();
        evicted.extend(registry.unpin(&id(name)));
        evicted
    }

    fn id(name: &str) -> AdapterId {
        AdapterId::of(name.as_bytes())
    }
}
