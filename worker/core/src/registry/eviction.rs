//! Who leaves a tier, when and where to: for room, for want of use, or on request.

use std::{collections::VecDeque, time::Instant};

use protocol::AdapterId;

use super::{Registry, State, Tier};
use crate::command::{Command, Place};

impl Registry {
    /// Drops every copy of `adapter` if nothing uses it.
    pub(crate) fn evict(&mut self, adapter: AdapterId, commands: &mut VecDeque<Command>) {
        if self.entries.get(&adapter).is_none_or(|entry| entry.pins > 0) {
            return;
        }
        if self.leave_tier(&adapter) {
            commands.push_back(Command::Forget(adapter, Place::Memory));
        }
        let entry = self.entries.remove(&adapter).expect("it is there, see above");
        if let Some(bytes) = entry.on_disk {
            self.disk.remove(entry.mark, bytes);
            commands.push_back(Command::Forget(adapter, Place::Disk));
        }
        self.revision += 1;
    }

    /// Takes out of memory what has not been used for the whole TTL.
    pub(crate) fn expire(&mut self, now: Instant, commands: &mut VecDeque<Command>) {
        while let Some((adapter, at)) = self.next_expiry()
            && at <= now
        {
            self.leave_memory(adapter, commands);
        }
    }

    /// When `expire` has something to do, if ever.
    pub(crate) fn expires_at(&self) -> Option<Instant> {
        self.next_expiry().map(|(_, at)| at)
    }

    fn next_expiry(&self) -> Option<(AdapterId, Instant)> {
        let ttl = self.ttl?;
        let oldest = [&self.device, &self.host].into_iter().filter_map(|tier| self.idle_in(tier));
        let expiry = oldest.filter_map(|id| Some((id, self.entries[&id].idle_since? + ttl)));
        expiry.min_by_key(|(_, at)| *at)
    }

    /// The adapter of a tier that may leave and was used longest ago.
    fn idle_in(&self, tier: &Tier) -> Option<AdapterId> {
        tier.oldest_first().find(|adapter| self.entries[adapter].pins == 0)
    }

    /// Sends idle adapters off the device until `bytes` more fit.
    pub(super) fn make_room(&mut self, bytes: u64, commands: &mut VecDeque<Command>) {
        while !self.device.has_room(bytes) {
            let Some(adapter) = self.idle_in(&self.device) else { break };
            self.demote(adapter, commands);
        }
    }

    /// Sends an idle adapter from the device to the host, or out of memory.
    pub(super) fn demote(&mut self, adapter: AdapterId, commands: &mut VecDeque<Command>) {
        let bytes = self.bytes(&adapter).unwrap_or(0);
        if !self.host.takes(bytes) {
            return self.leave_memory(adapter, commands);
        }
        while !self.host.has_room(bytes) {
            let Some(oldest) = self.idle_in(&self.host) else {
                return self.leave_memory(adapter, commands);
            };
            self.leave_memory(oldest, commands);
        }
        // ## Device => Host
        self.leave_tier(&adapter);
        self.host.reserve(bytes);
        self.host.insert(self.entries[&adapter].mark, adapter);
        self.set(&adapter, State::Host { bytes });
        self.revision += 1;
        commands.push_back(Command::Demote(adapter));
    }

    /// Drops the copy of an idle adapter in memory.
    pub(super) fn leave_memory(&mut self, adapter: AdapterId, commands: &mut VecDeque<Command>) {
        self.leave_tier(&adapter);
        self.counters.evictions += 1;
        self.revision += 1;
        commands.push_back(Command::Forget(adapter, Place::Memory));
        // ## Device => Disk, Host => Disk
        match self.entries[&adapter].on_disk {
            Some(bytes) => self.set(&adapter, State::Disk { bytes }),
            None => drop(self.entries.remove(&adapter)), // ## Device => absent, Host => absent
        }
    }

    /// Takes `adapter` out of the memory tier that holds it; says whether one did.
    pub(super) fn leave_tier(&mut self, adapter: &AdapterId) -> bool {
        let Some(entry) = self.entries.get(adapter) else { return false };
        match entry.state {
            State::Device { bytes } => self.device.remove(entry.mark, bytes),
            State::Host { bytes } => self.host.remove(entry.mark, bytes),
            State::Fetching { .. } | State::Disk { .. } | State::Reading { .. } => return false,
        }
        true
    }

    /// Drops copies on disk, least recently used first, until `bytes` more fit; says whether they
    /// do. What is being read stays.
    pub(super) fn make_disk_room(&mut self, bytes: u64, commands: &mut VecDeque<Command>) -> bool {
        if !self.disk.takes(bytes) {
            return false;
        }
        while !self.disk.has_room(bytes) {
            let is_read = |id: &AdapterId| matches!(self.entries[id].state, State::Reading { .. });
            let Some(oldest) = self.disk.oldest_first().find(|id| !is_read(id)) else {
                return false;
            };
            self.lost_on_disk(oldest, commands);
            commands.push_back(Command::Forget(oldest, Place::Disk));
        }
        true
    }
}
