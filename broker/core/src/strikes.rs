//! Requests that workers died of.
//!
//! Strikes belong to what is asked for, not to who asks: the same poison under another id, or from
//! another client, is the same poison. A process counts once. An answer clears the request, so
//! that one which merely was in hand when workers were killed is never held against it for long.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::{RequestDigest, WorkerName};

/// Requests that are remembered; the ones that were struck longest ago are forgotten first.
const REQUESTS_MAX: usize = 4096;

/// Processes that are remembered for one request: more than are needed to judge it.
const PROCESSES_MAX: usize = 16;

/// The processes that died of every suspect.
#[derive(Debug)]
pub(crate) struct Strikes {
    suspects: BTreeMap<RequestDigest, Suspect>,
    by_time: BTreeSet<(Instant, RequestDigest)>,
    memory: Duration,
}

#[derive(Debug)]
struct Suspect {
    died: BTreeSet<(WorkerName, u64)>,
    last: Instant,
}

impl Strikes {
    /// No suspects; each is forgotten `memory` after its last strike.
    pub(crate) fn new(memory: Duration) -> Self {
        Self { suspects: BTreeMap::new(), by_time: BTreeSet::new(), memory }
    }

    /// Notes that a process died of a request, and says how many have by now.
    pub(crate) fn add(
        &mut self,
        key: RequestDigest,
        process: (WorkerName, u64),
        now: Instant,
    ) -> usize {
        self.forget_old(now);
        let mut died = self.remove(&key).map(|suspect| suspect.died).unwrap_or_default();
        if died.len() < PROCESSES_MAX {
            died.insert(process);
        }
        let count = died.len();
        while self.suspects.len() >= REQUESTS_MAX {
            let Some(&(_, oldest)) = self.by_time.first() else { break };
            self.remove(&oldest);
        }
        self.by_time.insert((now, key));
        self.suspects.insert(key, Suspect { died, last: now });
        count
    }

    /// The processes that died of a request.
    pub(crate) fn died(
        &self,
        key: &RequestDigest,
        now: Instant,
    ) -> impl ExactSizeIterator<Item = &(WorkerName, u64)> + use<'_> {
        static NONE: BTreeSet<(WorkerName, u64)> = BTreeSet::new();
        let suspect = self.suspects.get(key).filter(|suspect| suspect.last + self.memory > now);
        suspect.map_or(&NONE, |suspect| &suspect.died).iter()
    }

    /// How long a request is remembered, unless it strikes again.
    pub(crate) fn remembered(&self, key: &RequestDigest, now: Instant) -> Duration {
        let until = self.suspects.get(key).map(|suspect| suspect.last + self.memory);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Clears a request: it was answered.
    pub(crate) fn clear(&mut self, key: &RequestDigest) {
        self.remove(key);
    }

    fn forget_old(&mut self, now: Instant) {
        while let Some(&(last, key)) = self.by_time.first()
            && last + self.memory <= now
        {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &RequestDigest) -> Option<Suspect> {
        let suspect = self.suspects.remove(key)?;
        self.by_time.remove(&(suspect.last, *key));
        Some(suspect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn a_process_counts_once_and_an_answer_clears() {
        let (mut strikes, now) = (Strikes::new(MINUTE), now());
        let poison = RequestDigest::of(b"poison");
        assert_eq!(strikes.add(poison, process("a", 1), now), 1);
        assert_eq!(strikes.add(poison, process("a", 1), now), 1);
        assert_eq!(strikes.add(poison, process("a", 2), now), 2, "another process of that name");
        assert_eq!(strikes.died(&RequestDigest::of(b"innocent"), now).len(), 0);
        strikes.clear(&poison);
        assert_eq!(strikes.died(&poison, now).len(), 0);
    }

    #[test]
    fn strikes_are_forgotten_after_a_while() {
        let (mut strikes, now) = (Strikes::new(MINUTE), now());
        let poison = RequestDigest::of(b"poison");
        strikes.add(poison, process("a", 1), now);
        assert_eq!(strikes.remembered(&poison, now + MINUTE / 4), MINUTE * 3 / 4);
        assert_eq!(strikes.died(&poison, now + MINUTE).len(), 0);
        assert_eq!(strikes.add(poison, process("b", 1), now + MINUTE), 1);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_the_newest() {
        let (mut strikes, now) = (Strikes::new(MINUTE), now());
        let key = |number: usize| RequestDigest::of(&number.to_le_bytes());
        for number in 0..REQUESTS_MAX + 10 {
            let at = now + Duration::from_micros(number as u64);
            strikes.add(key(number), process("a", 1), at);
        }
        assert_eq!(strikes.suspects.len(), REQUESTS_MAX);
        assert_eq!(strikes.by_time.len(), REQUESTS_MAX);
        assert_eq!(strikes.died(&key(0), now).len(), 0);
        assert_eq!(strikes.died(&key(REQUESTS_MAX + 9), now).len(), 1);
    }

    fn process(name: &str, epoch: u64) -> (WorkerName, u64) {
        (name.parse().unwrap(), epoch)
    }

    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn now() -> Instant {
        Instant::now()
    }
}
