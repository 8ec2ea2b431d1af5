//! Adapters that are brought here before a dispatch needs them, when there is nothing better to do.

use std::time::Instant;

use protocol::AdapterId;

use super::{Phase, Scheduler};
use crate::{
    command::Command,
    prefetches::Way,
    registry::{Arriving, Origin},
};

impl Scheduler {
    /// The broker expects requests for these adapters. They come into memory one after the other as
    /// far as there is room; dispatches go before.
    pub fn handle_prefetch(&mut self, adapters: &[AdapterId]) {
        for &adapter in adapters {
            if !self.registry.is_in_memory(&adapter) && !self.registry.is_coming(&adapter) {
                self.prefetches.want(adapter);
            }
        }
        self.prefetch_next();
    }

    /// Gives up what no dispatch needs: the worker is about to leave.
    pub fn forget_prefetches(&mut self) {
        for adapter in self.prefetching().collect::<Vec<_>>() {
            self.forget_prefetch(&adapter);
        }
    }

    /// Adapters on their way that no dispatch needs.
    pub fn prefetching(&self) -> impl Iterator<Item = AdapterId> {
        self.prefetches.iter()
    }

    /// Whether `adapter` is of use when it arrives: a dispatch needs it, or it is being prefetched.
    pub fn awaits(&self, adapter: &AdapterId) -> bool {
        self.registry.is_coming(adapter) || self.prefetches.way(adapter).is_some()
    }

    /// Begins with the next adapter that is to be prefetched.
    pub(super) fn prefetch_next(&mut self) {
        while let Some(adapter) = self.prefetches.next() {
            if self.registry.is_in_memory(&adapter) || self.registry.is_coming(&adapter) {
                self.prefetches.forget(&adapter);
                continue;
            }
            // ## waiting => Fetching, waiting => Reading
            if !self.registry.is_on_disk(&adapter) {
                self.prefetches.begin(adapter, Way::Fetching);
                return self.commands.push_back(Command::Prefetch(adapter));
            }
            // The disk takes no turns: whoever reads next waits for this.
            if !self.is_loading() {
                self.prefetches.begin(adapter, Way::Reading);
                self.commands.push_back(Command::ReadDisk(adapter));
            }
            return;
        }
    }

    /// What is prefetched turns out to have `bytes`: given up if there will be no room for it.
    pub(super) fn learn_prefetch(&mut self, adapter: &AdapterId, bytes: u64, now: Instant) {
        if self.prefetches.way(adapter) == Some(Way::Fetching)
            && !self.registry.is_coming(adapter)
            && !self.registry.may_take_in(bytes, now)
        {
            self.forget_prefetch(adapter);
        }
    }

    /// What was prefetched is here, if it still is that; says whether it was.
    pub(super) fn take_prefetched(
        &mut self,
        adapter: AdapterId,
        bytes: u64,
        origin: Origin,
        now: Instant,
    ) -> bool {
        let is_known = self.prefetches.forget(&adapter).is_some();
        if is_known {
            let arriving = Arriving { adapter, bytes, origin };
            self.registry.take_in(arriving, now, &mut self.commands);
        }
        is_known
    }

    /// What is prefetched cannot be read: it is fetched.
    pub(super) fn prefetch_from_broker(&mut self, adapter: AdapterId) {
        if self.prefetches.way(&adapter) == Some(Way::Reading) {
            // ## Reading => Fetching
            self.prefetches.begin(adapter, Way::Fetching);
            self.commands.push_back(Command::Prefetch(adapter));
        }
    }

    /// Gives up one that nobody needs.
    pub(super) fn forget_prefetch(&mut self, adapter: &AdapterId) {
        if self.prefetches.forget(adapter) == Some(Way::Fetching) {
            self.commands.push_back(Command::StopFetch(*adapter));
        }
    }

    fn is_loading(&self) -> bool {
        self.dispatches.values().any(|entry| matches!(entry.phase, Phase::Loading { .. }))
    }
}
