//! When adapters were last given to a worker, and with which model.
//!
//! It decides what is worth handing over when a worker leaves. It is a memory, not a promise: a
//! broker that has just started knows nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use protocol::{AdapterId, ModelName};

/// Adapters that are remembered; those used longest ago are forgotten.
const ADAPTERS_MAX: usize = 16_384;

/// Last uses by adapter.
#[derive(Debug, Default)]
pub(crate) struct Heat {
    uses: BTreeMap<AdapterId, LastUse>,
    by_time: BTreeSet<(Instant, AdapterId)>,
}

/// The last use of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LastUse {
    pub(crate) at: Instant,
    pub(crate) model: ModelName,
}

impl Heat {
    /// Notes a use.
    pub(crate) fn touch(&mut self, adapter: AdapterId, model: &ModelName, now: Instant) {
        match self.uses.get_mut(&adapter) {
            Some(last) => {
                self.by_time.remove(&(last.at, adapter));
                last.at = now;
                if last.model != *model {
                    last.model.clone_from(model);
                }
            }
            None => {
                self.uses.insert(adapter, LastUse { at: now, model: model.clone() });
            }
        }
        self.by_time.insert((now, adapter));
        if self.uses.len() > ADAPTERS_MAX
            && let Some((_, coldest)) = self.by_time.pop_first()
        {
            self.uses.remove(&coldest);
        }
    }

    /// The last use of `adapter`, if it is remembered.
    pub(crate) fn last(&self, adapter: &AdapterId) -> Option<&LastUse> {
        self.uses.get(adapter)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn the_last_use_counts_and_the_oldest_are_forgotten() {
        let (mut heat, start) = (Heat::default(), Instant::now());
        let id = |number: usize| AdapterId::of(&number.to_le_bytes());
        let (first, second): (ModelName, ModelName) =
            ("sd15".parse().unwrap(), "sdxl".parse().unwrap());
        heat.touch(id(0), &first, start);
        heat.touch(id(1), &first, start);
        let later = start + Duration::from_secs(1);
        heat.touch(id(0), &second, later);
        assert_eq!(heat.last(&id(0)), Some(&LastUse { at: later, model: second }));
        for number in 2..=ADAPTERS_MAX {
            heat.touch(id(number), &first, later);
        }
        assert_eq!(heat.last(&id(1)), None);
        assert!(heat.last(&id(0)).is_some());
        assert_eq!((heat.uses.len(), heat.by_time.len()), (ADAPTERS_MAX, ADAPTERS_MAX));
    }
}
