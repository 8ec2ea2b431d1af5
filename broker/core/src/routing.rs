//! Which worker gets a request: filter, score, pick, as a pure function over a view.
//!
//! Residency is not a condition but a preference: when every holder is full and another worker is
//! free, the request spills over to it and the adapter is replicated there.

use std::cmp::Reverse;

use crate::peer::WorkerPeer;

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
    /// How many of the request's adapters it holds.
    pub(crate) holds: usize,
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

/// Most adapters held, then least loaded, then least recently used, then the first connection.
fn score(candidate: &Candidate) -> impl Ord + use<> {
    let Candidate { peer, load, holds, last_used, .. } = *candidate;
    (holds, Reverse(load), Reverse(last_used), Reverse(peer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_most_adapters_wins() {
        let workers = [worker(0), Candidate { holds: 2, load: 1, ..worker(1) }, {
            Candidate { holds: 1, ..worker(2) }
        }];
        assert_eq!(picked(&workers), Some(1));
    }

    #[test]
    fn a_full_holder_is_passed_over_for_a_free_worker() {
        let workers = [Candidate { holds: 2, load: 2, ..worker(0) }, worker(1)];
        assert_eq!(picked(&workers), Some(1));
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
        let died = Candidate { died_here: true, holds: 3, ..worker(0) };
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
            holds: 0,
            last_used: 0,
        }
    }

    fn picked(candidates: &[Candidate]) -> Option<u64> {
        let numbers = 0..10;
        let peer = pick(candidates)?;
        numbers.into_iter().find(|&number| WorkerPeer::new(number) == peer)
    }
}
