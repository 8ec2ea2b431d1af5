//! What comes without a dispatch: it gets a place only where nothing has to leave that is in use or
//! was used lately.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use protocol::AdapterId;

use super::{Entry, Origin, Registry, State, Tier};
use crate::command::{Command, Place};

/// An adapter that was used within this time does not leave memory for one that is prefetched.
pub(crate) const RECENT: Duration = Duration::from_mins(1);

/// An adapter that is here and that nobody needs yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arriving {
    pub(crate) adapter: AdapterId,
    pub(crate) bytes: u64,
    pub(crate) origin: Origin,
}

impl Registry {
    /// Whether there is a place for `bytes` that nobody needs yet.
    pub(crate) fn may_take_in(&self, bytes: u64, now: Instant) -> bool {
        self.idle_state(bytes, now).is_some() || self.disk.takes(bytes)
    }

    /// Whether `adapter` is in the cache on disk and nowhere nearer.
    pub(crate) fn is_on_disk(&self, adapter: &AdapterId) -> bool {
        matches!(self.state(adapter), Some(State::Disk { .. }))
    }

    /// Takes in an adapter that is neither in memory nor coming: on the device, else on the host,
    /// else on disk alone.
    pub(crate) fn take_in(
        &mut self,
        arriving: Arriving,
        now: Instant,
        commands: &mut VecDeque<Command>,
    ) {
        let Arriving { adapter, bytes, origin } = arriving;
        let state = self.idle_state(bytes, now);
        if let Some(state) = state {
            self.place(adapter, state, now, commands);
        }
        let is_stored = self.entries.get(&adapter).is_some_and(|entry| entry.on_disk.is_some());
        if origin == Origin::Broker && !is_stored && self.make_disk_room(bytes, commands) {
            if state.is_none() {
                // ## absent => Disk
                self.entries.insert(adapter, Entry::idle(State::Disk { bytes }, now));
                self.touch(&adapter);
            }
            self.store(adapter, bytes);
            commands.push_back(Command::WriteDisk(adapter));
        }
        if state.is_none() {
            commands.push_back(Command::Forget(adapter, Place::Memory));
        }
    }

    /// Puts an adapter in a place that has room, or can have.
    fn place(
        &mut self,
        adapter: AdapterId,
        state: State,
        now: Instant,
        commands: &mut VecDeque<Command>,
    ) {
        let on_host = matches!(state, State::Host { .. });
        let bytes = state.bytes().unwrap_or(0);
        self.send_away(on_host, bytes, now, commands);
        // ## absent => Device, absent => Host, Disk => Device, Disk => Host
        let entry = self.entries.entry(adapter).or_insert(Entry::idle(state, now));
        entry.state = state;
        entry.idle_since = Some(now);
        self.touch(&adapter);
        let mark = self.entries[&adapter].mark;
        let tier = if on_host { &mut self.host } else { &mut self.device };
        tier.reserve(bytes);
        tier.insert(mark, adapter);
        self.revision += 1;
        if on_host {
            commands.push_back(Command::Demote(adapter));
        }
    }

    /// Where in memory `bytes` fit without sending away what was used lately.
    fn idle_state(&self, bytes: u64, now: Instant) -> Option<State> {
        let fits = |tier: &Tier| {
            let idle = tier.oldest_first().filter(|adapter| self.is_long_idle(adapter, now));
            let idle = idle.filter_map(|adapter| self.bytes(&adapter)).fold(0, u64::saturating_add);
            let rest = tier.used_bytes().saturating_sub(idle);
            tier.takes(bytes) && rest.saturating_add(bytes) <= tier.budget_bytes()
        };
        if fits(&self.device) {
            return Some(State::Device { bytes });
        }
        fits(&self.host).then_some(State::Host { bytes })
    }

    /// Sends long idle adapters away until `bytes` more fit.
    fn send_away(
        &mut self,
        from_host: bool,
        bytes: u64,
        now: Instant,
        commands: &mut VecDeque<Command>,
    ) {
        loop {
            let tier = if from_host { &self.host } else { &self.device };
            if tier.has_room(bytes) {
                return;
            }
            let oldest = tier.oldest_first().find(|adapter| self.is_long_idle(adapter, now));
            match oldest {
                Some(adapter) if from_host => self.leave_memory(adapter, commands),
                Some(adapter) => self.demote(adapter, commands),
                None => return,
            }
        }
    }

    fn is_long_idle(&self, adapter: &AdapterId, now: Instant) -> bool {
        self.entries.get(adapter).is_some_and(|entry| {
            entry.pins == 0 && entry.idle_since.is_some_and(|since| since + RECENT <= now)
        })
    }
}

impl Entry {
    fn idle(state: State, now: Instant) -> Self {
        Self { state, on_disk: None, pins: 0, mark: 0, idle_since: Some(now) }
    }
}
