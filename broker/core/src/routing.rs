//! Which worker gets a request: filter, score, pick, as a pure function over a view.
//!
//! Residency is not a condition but a preference: when every holder is full and another worker is
//! free, the request spills over to it and the adapter is replicated there.

use std::cmp::Reverse;

use crate::{peer::WorkerPeer, residency::LoadCost};

/// What routing knows about one worker with regard to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) peer: WorkerPeer,
    /// Whether it serves the model and can get every adapter.
    pub(crate) able: bool,
    /// Whether it takes no new requests.
    pub(crate) draining: bool,
    /// Whether this request was lost together with this very process before.
    pub(crate) died_here: bool,
    /// Slots that are taken.
    pub(crate) load: usize,
    /// Slots that it has.
    pub(crate) slots: usize,
    /// What it has to load before it can encode.
    pub(crate) cost: LoadCost,
    /// When it was last given a request, in requests since the start.
    pub(crate) last_used: u64,
}

/// The worker that the request goes to, or none when it has to wait.
pub(crate) fn pick(candidates: &[Candidate]) -> Option<WorkerPeer> {
    // A process that came back from a pause is better than none.
    let spare = candidates.iter().any(|c| c.able && !c.draining && !c.died_here);
    let eligible = candidates
        .iter()
        .filter(|c| c.able && !c.draining && c.load < c.slots && !(c.died_here && spare));
    eligible.max_by_key(|candidate| score(candidate)).map(|candidate| candidate.peer)
}

/// The least to load, then least busy, then least recently used, then the first connection.
fn score(candidate: &Candidate) -> impl Ord + use<> {
    let Candidate { peer, load, cost, last_used, .. } = *candidate;
    (Reverse(cost), Reverse(load), Reverse(last_used), Reverse(peer))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const UNREAD: LoadCost = LoadCost { model: true, missing: 0, disk: 0, host: 0 };
    const MISSING: LoadCost = LoadCost { model: false, missing: 2, disk: 0, host: 0 };

    #[test]
    fn the_nearest_adapters_win_and_the_dearest_load_counts_first() {
        let cost = |missing, disk, host| LoadCost { model: false, missing, disk, host };
        let order = [cost(0, 0, 0), cost(0, 0, 3), cost(0, 1, 0), cost(0, 1, 1), cost(1, 0, 0)];
        for pair in order.windows(2) {
            let dear = Candidate { cost: pair[1], ..worker(0) };
            let cheap = Candidate { cost: pair[0], load: 1, ..worker(1) };
            assert_eq!(picked(&[dear, cheap]), Some(1), "{pair:?}");
        }
    }

    #[test]
    fn a_model_in_memory_outweighs_any_adapters() {
        let workers =
            [Candidate { cost: MISSING, ..worker(0) }, Candidate { cost: UNREAD, ..worker(1) }];
        assert_eq!(picked(&workers), Some(0));
    }

    #[test]
    fn a_full_holder_is_passed_over_for_a_free_worker() {
        let workers =
            [Candidate { load: 2, ..worker(0) }, Candidate { cost: MISSING, ..worker(1) }];
        assert_eq!(picked(&workers), Some(1));
    }

    proptest! {
        #[test]
        fn belief_decides_who_and_never_whether(mut candidates in vec(candidate(), 0..6)) {
            for (number, candidate) in (0..).zip(&mut candidates) {
                candidate.peer = WorkerPeer::new(number);
            }
            let believed = pick(&candidates);
            let blind: Vec<_> = candidates
                .iter()
                .map(|c| Candidate { cost: LoadCost::default(), ..*c })
                .collect();
            prop_assert_eq!(believed.is_some(), pick(&blind).is_some());
            if let Some(peer) = believed {
                let chosen = candidates.iter().find(|c| c.peer == peer).unwrap();
                prop_assert!(chosen.able && !chosen.draining && chosen.load < chosen.slots);
            }
        }
    }

    #[test]
    fn among_equals_the_least_loaded_and_then_the_least_recently_used_wins() {
        let workers = [Candidate { load: 1, ..worker(0) }, Candidate { last_used: 9, ..worker(1) }];
        assert_eq!(picked(&workers), Some(1));
        let workers =
            [Candidate { last_used: 9, ..worker(0) }, Candidate { last_used: 8, ..worker(1) }];
        assert_eq!(picked(&workers), Some(1));
        assert_eq!(picked(&[worker(1), worker(0)]), Some(0));
    }

    #[test]
    fn who_cannot_or_will_not_is_never_picked() {
        for out in [
            Candidate { able: false, ..worker(0) },
            Candidate { draining: true, ..worker(0) },
            Candidate { load: 2, ..worker(0) },
            Candidate { slots: 0, ..worker(0) },
        ] {
            assert_eq!(picked(&[out]), None, "{out:?}");
        }
    }

    #[test]
    fn where_the_request_died_is_the_last_resort() {
        let died = Candidate { died_here: true, ..worker(0) };
        assert_eq!(picked(&[died, worker(1)]), Some(1));
        assert_eq!(picked(&[died, Candidate { load: 2, ..worker(1) }]), None, "it waits instead");
        assert_eq!(picked(&[died, Candidate { able: false, ..worker(1) }]), Some(0));
    }

    fn worker(number: u64) -> Candidate {
        Candidate {
            peer: WorkerPeer::new(number),
            able: true,
            draining: false,
            died_here: false,
            load: 0,
            slots: 2,
            cost: LoadCost::default(),
            last_used: 0,
        }
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        let flags = any::<(bool, bool, bool)>();
        let cost = (any::<bool>(), 0..3_usize, 0..3_usize, 0..3_usize);
        (flags, 0..4_usize, 0..4_usize, cost).prop_map(|(flags, load, slots, cost)| {
            let (able, draining, died_here) = flags;
            let (model, missing, disk, host) = cost;
            let cost = LoadCost { model, missing, disk, host };
            Candidate { able, draining, died_here, load, slots, cost, ..worker(0) }
        })
    }

    fn picked(candidates: &[Candidate]) -> Option<u64> {
        let numbers = 0..10;
        let peer = pick(candidates)?;
        numbers.into_iter().find(|&number| WorkerPeer::new(number) == peer)
    }
}
