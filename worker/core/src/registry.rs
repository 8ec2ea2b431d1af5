//! Which adapters this worker holds and where, and which of them go when room is needed.
//!
//! The registry knows ids and sizes only; the tensors live in the shell. It has three tiers, each
//! with a budget: the device, main memory (*host*), and the cache on disk. What counts is the
//! nearest copy; a copy on disk may lie behind one in memory. An adapter is
//!
//! ```text
//! absent => Fetching => Device <=> Host
//!              ^  |      ^   |       |
//!        (lost)|  |      |   `-------+=> Disk, or absent without a copy there   (evicted, idle)
//!              |  |      |
//!    Disk => Reading ----'
//!
//! Fetching => absent, Reading => Disk                                 (nobody waits any more)
//! Disk => absent                                                      (evicted from the cache)
//! ```
//!
//! Adapters are fetched and read for dispatches, which *pin* them; so what is `Fetching` or
//! `Reading` is pinned, and its bytes are counted on the device from the moment they are known.
//! When a tier is full, what was used longest ago leaves it: from the device to the host if there
//! is such a tier, from the host altogether.
//!
//! An adapter may also come without a dispatch ([`prefetch`]): nothing is known of it here until it
//! has arrived, and then it is idle on the device, on the host or on disk.
//!
//! On a CPU device and host are the same memory, and moving between them costs nothing.
//!
//! **Invariants:** a pinned adapter never leaves the device; the bytes of every tier are within its
//! budget; the revision grows with every change of what is where.

mod eviction;
mod prefetch;
mod tier;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use protocol::{AdapterId, AdapterSource};

pub(crate) use self::prefetch::Arriving;
use self::tier::Tier;
use crate::command::Command;

/// Budgets of the tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tiers {
    /// Bytes of adapters on the device.
    pub device_budget_bytes: u64,
    /// Bytes of adapters in main memory beside those; 0 for no such tier.
    pub host_budget_bytes: u64,
    /// Bytes of adapters in the cache on disk; 0 for no such tier.
    pub disk_budget_bytes: u64,
    /// Time without use after which an adapter leaves memory.
    pub ttl: Option<Duration>,
}

/// Where a loaded adapter came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The broker's blob store.
    Broker,
    /// This worker's cache on disk.
    Disk,
}

/// How often adapters were found where, since the start. Every dispatch counts once for each of
/// its adapters, when it is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// On the device.
    pub hits: u64,
    /// In main memory.
    pub host_hits: u64,
    /// In the cache on disk.
    pub disk_hits: u64,
    /// Nowhere here; a request for an adapter that is being fetched is a miss as well.
    pub misses: u64,
    /// Adapters that left memory for want of room or of use.
    pub evictions: u64,
}

/// All adapters that are here or on their way.
#[derive(Debug)]
pub struct Registry {
    entries: BTreeMap<AdapterId, Entry>,
    device: Tier,
    host: Tier,
    disk: Tier,
    ttl: Option<Duration>,
    /// Bytes of pinned adapters, as far as known.
    pinned_bytes: u64,
    /// Counts uses; the smallest mark was used longest ago.
    marks: u64,
    revision: u64,
    counters: Counters,
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// Bytes of the copy on disk, if there is one.
    on_disk: Option<u64>,
    pins: u32,
    mark: u64,
    /// When the last use ended.
    idle_since: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fetching { bytes: Option<u64> },
    Disk { bytes: u64 },
    Reading { bytes: u64 },
    Host { bytes: u64 },
    Device { bytes: u64 },
}

impl Registry {
    pub(crate) fn new(tiers: Tiers) -> Self {
        Self {
            entries: BTreeMap::new(),
            device: Tier::new(tiers.device_budget_bytes),
            host: Tier::new(tiers.host_budget_bytes),
            disk: Tier::new(tiers.disk_budget_bytes),
            ttl: tiers.ttl,
            pinned_bytes: 0,
            marks: 0,
            revision: 0,
            counters: Counters::default(),
        }
    }

    /// Adapters on the device, most recently used first.
    pub fn on_device(&self) -> impl Iterator<Item = AdapterId> {
        self.device.oldest_first().rev()
    }

    /// Adapters in main memory, most recently used first.
    pub fn on_host(&self) -> impl Iterator<Item = AdapterId> {
        self.host.oldest_first().rev()
    }

    /// Adapters that are in the cache on disk and not in memory, most recently used first.
    pub fn on_disk(&self) -> impl Iterator<Item = AdapterId> {
        self.disk.oldest_first().rev().filter(|adapter| !self.is_in_memory(adapter))
    }

    /// Bytes on the device, those on their way included.
    pub fn device_bytes(&self) -> u64 {
        self.device.used_bytes()
    }

    /// Bytes in main memory.
    pub fn host_bytes(&self) -> u64 {
        self.host.used_bytes()
    }

    /// Bytes in the cache on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk.used_bytes()
    }

    /// Bytes that may be on the device.
    pub fn device_budget_bytes(&self) -> u64 {
        self.device.budget_bytes()
    }

    /// Adapters that are here or on their way.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is here or on its way.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How often adapters were found where.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Grows with every change of what is where.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The nearest place of `adapter`.
    pub fn source(&self, adapter: &AdapterId) -> AdapterSource {
        match self.state(adapter) {
            Some(State::Device { .. }) => AdapterSource::Resident,
            Some(State::Host { .. }) => AdapterSource::Host,
            Some(State::Disk { .. } | State::Reading { .. }) => AdapterSource::Disk,
            Some(State::Fetching { .. }) | None => AdapterSource::Broker,
        }
    }

    /// Whether `adapter` is on the device or the host.
    pub fn is_in_memory(&self, adapter: &AdapterId) -> bool {
        matches!(self.state(adapter), Some(State::Device { .. } | State::Host { .. }))
    }

    /// Whether `adapter` is being fetched or read.
    pub fn is_coming(&self, adapter: &AdapterId) -> bool {
        matches!(self.state(adapter), Some(State::Fetching { .. } | State::Reading { .. }))
    }

    /// The size of `adapter`, if it is known.
    pub(crate) fn bytes(&self, adapter: &AdapterId) -> Option<u64> {
        self.state(adapter)?.bytes()
    }

    /// Whether adapters of these sizes can be pinned beside those that are.
    pub(crate) fn has_room(
        &self,
        sizes: impl IntoIterator<Item = (AdapterId, Option<u64>)>,
    ) -> bool {
        let is_pinned =
            |adapter: &AdapterId| self.entries.get(adapter).is_some_and(|entry| entry.pins > 0);
        let more = sizes.into_iter().filter(|(adapter, _)| !is_pinned(adapter));
        let more = more.filter_map(|(_, bytes)| bytes).fold(0, u64::saturating_add);
        self.pinned_bytes.saturating_add(more) <= self.device.budget_bytes()
    }

    /// Whether `adapter`, which is coming, can turn out to have `bytes`.
    pub(crate) fn has_room_to_grow(&self, adapter: &AdapterId, bytes: u64) -> bool {
        let others = self.pinned_bytes - self.bytes(adapter).unwrap_or(0);
        others.saturating_add(bytes) <= self.device.budget_bytes()
    }

    /// Counts a use of `adapter`, found at `source`.
    pub(crate) fn count(&mut self, source: AdapterSource) {
        let counter = match source {
            AdapterSource::Resident => &mut self.counters.hits,
            AdapterSource::Host => &mut self.counters.host_hits,
            AdapterSource::Disk => &mut self.counters.disk_hits,
            AdapterSource::Broker => &mut self.counters.misses,
        };
        *counter += 1;
    }

    /// Holds `adapters`, for which there is room, for one more dispatch, and brings to the device
    /// what is not there.
    pub(crate) fn pin(&mut self, adapters: &[AdapterId], commands: &mut VecDeque<Command>) {
        // All first, so that none of them makes room for another.
        for adapter in adapters {
            let entry = self.entries.entry(*adapter).or_insert(Entry {
                // ## absent => Fetching
                state: State::Fetching { bytes: None },
                on_disk: None,
                pins: 0,
                mark: 0,
                idle_since: None,
            });
            let is_new = entry.mark == 0;
            entry.pins += 1;
            if entry.pins == 1 {
                self.pinned_bytes += entry.state.bytes().unwrap_or(0);
            }
            self.touch(adapter);
            if is_new {
                commands.push_back(Command::Fetch(*adapter));
            }
        }
        for adapter in adapters {
            match self.state(adapter) {
                Some(State::Host { bytes }) => self.promote(*adapter, bytes, commands),
                Some(State::Disk { bytes }) => {
                    // ## Disk => Reading
                    self.make_room(bytes, commands);
                    self.device.reserve(bytes);
                    self.set(adapter, State::Reading { bytes });
                    commands.push_back(Command::ReadDisk(*adapter));
                }
                Some(State::Fetching { .. } | State::Reading { .. } | State::Device { .. })
                | None => {}
            }
        }
    }

    /// Lets go of `adapters` for one dispatch.
    pub(crate) fn unpin(
        &mut self,
        adapters: &[AdapterId],
        now: Instant,
        commands: &mut VecDeque<Command>,
    ) {
        for adapter in adapters {
            self.touch(adapter);
            let Some(entry) = self.entries.get_mut(adapter) else { continue };
            debug_assert!(entry.pins > 0, "unpinned {adapter} more often than pinned");
            entry.pins = entry.pins.saturating_sub(1);
            entry.idle_since = Some(now);
            if entry.pins > 0 {
                continue;
            }
            let bytes = entry.state.bytes().unwrap_or(0);
            self.pinned_bytes -= bytes;
            match entry.state {
                State::Fetching { .. } => {
                    // ## Fetching => absent
                    self.device.release(bytes);
                    self.entries.remove(adapter);
                    commands.push_back(Command::StopFetch(*adapter));
                }
                State::Reading { bytes } => {
                    // ## Reading => Disk
                    self.device.release(bytes);
                    self.set(adapter, State::Disk { bytes });
                }
                State::Disk { .. } | State::Host { .. } | State::Device { .. } => {}
            }
        }
    }

    /// `adapter`, which is coming and for which there is room, has `bytes`.
    pub(crate) fn resize(
        &mut self,
        adapter: &AdapterId,
        bytes: u64,
        commands: &mut VecDeque<Command>,
    ) {
        let Some(state @ (State::Fetching { .. } | State::Reading { .. })) = self.state(adapter)
        else {
            return;
        };
        let before = state.bytes().unwrap_or(0);
        self.device.release(before);
        self.make_room(bytes, commands);
        self.device.reserve(bytes);
        self.pinned_bytes = self.pinned_bytes - before + bytes;
        let is_read = matches!(state, State::Reading { .. });
        let state =
            if is_read { State::Reading { bytes } } else { State::Fetching { bytes: Some(bytes) } };
        self.set(adapter, state);
    }

    /// `adapter`, which was coming and whose size is known, is here. One from the broker goes to
    /// the cache on disk as well.
    pub(crate) fn arrive(
        &mut self,
        adapter: &AdapterId,
        origin: Origin,
        commands: &mut VecDeque<Command>,
    ) {
        let Some(bytes) = self.bytes(adapter).filter(|_| self.is_coming(adapter)) else { return };
        // ## Fetching => Device, Reading => Device
        self.set(adapter, State::Device { bytes });
        self.device.insert(self.entries[adapter].mark, *adapter);
        self.revision += 1;
        let is_stored = self.entries[adapter].on_disk.is_some();
        if origin == Origin::Broker && !is_stored && self.make_disk_room(bytes, commands) {
            self.store(*adapter, bytes);
            commands.push_back(Command::WriteDisk(*adapter));
        }
    }

    /// The cache on disk holds `adapter` already, when the worker starts. Says whether it may stay.
    pub(crate) fn found_on_disk(&mut self, adapter: AdapterId, bytes: u64) -> bool {
        if self.entries.contains_key(&adapter) || !self.disk.has_room(bytes) {
            return false;
        }
        // ## absent => Disk
        let state = State::Disk { bytes };
        let entry = Entry { state, on_disk: None, pins: 0, mark: 0, idle_since: None };
        self.entries.insert(adapter, entry);
        self.touch(&adapter);
        self.store(adapter, bytes);
        true
    }

    /// The copy of `adapter` on disk cannot be read or could not be written.
    pub(crate) fn lost_on_disk(&mut self, adapter: AdapterId, commands: &mut VecDeque<Command>) {
        let Some(entry) = self.entries.get_mut(&adapter) else { return };
        let Some(bytes) = entry.on_disk.take() else { return };
        self.disk.remove(entry.mark, bytes);
        self.revision += 1;
        match entry.state {
            State::Disk { .. } => drop(self.entries.remove(&adapter)), // ## Disk => absent
            State::Reading { bytes } => {
                // ## Reading => Fetching
                entry.state = State::Fetching { bytes: Some(bytes) };
                commands.push_back(Command::Fetch(adapter));
            }
            State::Fetching { .. } | State::Host { .. } | State::Device { .. } => {}
        }
    }

    fn promote(&mut self, adapter: AdapterId, bytes: u64, commands: &mut VecDeque<Command>) {
        // ## Host => Device
        self.leave_tier(&adapter);
        self.make_room(bytes, commands);
        self.device.reserve(bytes);
        self.device.insert(self.entries[&adapter].mark, adapter);
        self.set(&adapter, State::Device { bytes });
        self.revision += 1;
        commands.push_back(Command::Promote(adapter));
    }

    /// Counts a copy of `adapter` on disk, for which there is room.
    fn store(&mut self, adapter: AdapterId, bytes: u64) {
        let Some(entry) = self.entries.get_mut(&adapter) else { return };
        entry.on_disk = Some(bytes);
        self.disk.reserve(bytes);
        self.disk.insert(entry.mark, adapter);
        self.revision += 1;
    }

    /// Notes that `adapter` is used now.
    fn touch(&mut self, adapter: &AdapterId) {
        let Some(entry) = self.entries.get_mut(adapter) else { return };
        self.marks += 1;
        for tier in [&mut self.device, &mut self.host, &mut self.disk] {
            tier.touch(entry.mark, self.marks);
        }
        entry.mark = self.marks;
    }

    fn state(&self, adapter: &AdapterId) -> Option<State> {
        self.entries.get(adapter).map(|entry| entry.state)
    }

    fn set(&mut self, adapter: &AdapterId, state: State) {
        if let Some(entry) = self.entries.get_mut(adapter) {
            entry.state = state;
        }
    }
}

impl State {
    fn bytes(self) -> Option<u64> {
        match self {
            Self::Fetching { bytes } => bytes,
            Self::Disk { bytes }
            | Self::Reading { bytes }
            | Self::Host { bytes }
            | Self::Device { bytes } => Some(bytes),
        }
    }
}

#[cfg(test)]
mod tests;
