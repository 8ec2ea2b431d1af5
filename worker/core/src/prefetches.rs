//! Adapters that are wanted in memory although no dispatch needs them yet.
//!
//! They are brought one after the other. As soon as a dispatch needs one it is the dispatch's, and
//! nothing is left of it here.
//!
//! ```text
//! waiting => Fetching | Reading => gone     (here, failed, evicted, or needed by a dispatch)
//!    `=> gone
//! ```

use std::collections::VecDeque;

use protocol::{AdapterId, limits};

/// The wishes, in order.
#[derive(Debug, Default)]
pub(crate) struct Prefetches {
    waiting: VecDeque<AdapterId>,
    under_way: Option<(AdapterId, Way)>,
}

/// How an adapter comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the broker.
    Fetching,
    /// From the cache on disk.
    Reading,
}

impl Prefetches {
    /// Takes in a wish, unless it is known or there are too many.
    pub(crate) fn want(&mut self, adapter: AdapterId) {
        if self.waiting.len() < limits::ADAPTERS_MAX && !self.iter().any(|known| known == adapter) {
            self.waiting.push_back(adapter);
        }
    }

    /// Every wish, the one under way first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = AdapterId> {
        let under_way = self.under_way.map(|(adapter, _)| adapter);
        under_way.into_iter().chain(self.waiting.iter().copied())
    }

    /// How `adapter` comes, if it is under way.
    pub(crate) fn way(&self, adapter: &AdapterId) -> Option<Way> {
        self.under_way.filter(|(known, _)| known == adapter).map(|(_, way)| way)
    }

    /// The wish whose turn it is, unless one is under way.
    pub(crate) fn next(&self) -> Option<AdapterId> {
        self.waiting.front().copied().filter(|_| self.under_way.is_none())
    }

    /// `adapter` is under way from now on.
    pub(crate) fn begin(&mut self, adapter: AdapterId, way: Way) {
        self.waiting.retain(|waiting| *waiting != adapter);
        self.under_way = Some((adapter, way));
    }

    /// Forgets a wish; says how it was coming, if it was.
    pub(crate) fn forget(&mut self, adapter: &AdapterId) -> Option<Way> {
        self.waiting.retain(|waiting| waiting != adapter);
        self.under_way.take_if(|(known, _)| known == adapter).map(|(_, way)| way)
    }
}
