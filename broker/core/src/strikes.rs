//! Requests that workers died of.
//!
//! Strikes belong to what is asked for, not to who asks: the same poison under another id, or from
//! another client, is the same poison. A process counts once. After some deaths a request is
//! suspect and has to run alone; it is convicted by dying then, for what dies in company may be
//! innocent. An answer clears it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::RequestDigest;

use crate::deaths::Process;

/// Requests that are remembered; the ones that were struck longest ago are forgotten first.
const REQUESTS_MAX: usize = 4096;

/// Processes that are remembered for one request: more than are needed to judge it.
const PROCESSES_MAX: usize = 16;

/// The processes that died of every suspect.
#[derive(Debug)]
pub(crate) struct Strikes {
    suspects: BTreeMap<RequestDigest, Suspect>,
    by_time: BTreeSet<(Instant, RequestDigest)>,
    /// Deaths that convict, if the request was alone in one of them.
    deaths_max: usize,
    memory: Duration,
}

/// A process that died of a request, perhaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Died {
    pub(crate) process: Process,
    /// Whether it had nothing else in hand.
    pub(crate) alone: bool,
    pub(crate) at: Instant,
}

#[derive(Debug)]
struct Suspect {
    /// The processes, and whether each had nothing else in hand.
    died: BTreeMap<Process, bool>,
    last: Instant,
}

impl Strikes {
    /// No suspects; `deaths_max` convict, and each is forgotten `memory` after its last strike.
    pub(crate) fn new(deaths_max: usize, memory: Duration) -> Self {
        let (suspects, by_time) = (BTreeMap::new(), BTreeSet::new());
        Self { suspects, by_time, deaths_max, memory }
    }

    /// Notes that a process died of a request. What is told again only adds that it was alone.
    pub(crate) fn add(&mut self, key: RequestDigest, died: Died, now: Instant) {
        self.forget_old(now);
        let Died { process, alone, at } = died;
        if at + self.memory <= now {
            return;
        }
        let known = self.remove(&key);
        let last = known.as_ref().map_or(at, |suspect| suspect.last.max(at));
        let mut processes = known.map(|suspect| suspect.died).unwrap_or_default();
        if processes.len() < PROCESSES_MAX || processes.contains_key(&process) {
            *processes.entry(process).or_default() |= alone;
        }
        while self.suspects.len() >= REQUESTS_MAX {
            let Some(&(_, oldest)) = self.by_time.first() else { break };
            self.remove(&oldest);
        }
        self.by_time.insert((last, key));
        self.suspects.insert(key, Suspect { died: processes, last });
    }

    /// Whether a process counts as having died of a request.
    pub(crate) fn has(&self, key: &RequestDigest, process: &Process) -> bool {
        self.suspects.get(key).is_some_and(|suspect| suspect.died.contains_key(process))
    }

    /// A process did not die of a request that it had in hand.
    pub(crate) fn take_back(&mut self, key: &RequestDigest, process: &Process) {
        let Some(suspect) = self.suspects.get_mut(key) else { return };
        suspect.died.remove(process);
        if suspect.died.is_empty() {
            self.remove(key);
        }
    }

    /// A process that was thought dead lives: nothing died with it.
    pub(crate) fn acquit(&mut self, process: &Process) {
        let struck = self.suspects.iter().filter(|(_, suspect)| suspect.died.contains_key(process));
        for key in struck.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.take_back(&key, process);
        }
    }

    /// Whether the next death convicts, so that the request has to run alone.
    pub(crate) fn is_suspect(&self, key: &RequestDigest, now: Instant) -> bool {
        let died = self.died(key, now).len();
        died > 0 && died.saturating_add(1) >= self.deaths_max
    }

    /// Whether a request is not tried any more.
    pub(crate) fn is_convicted(&self, key: &RequestDigest, now: Instant) -> bool {
        let is_alone = |suspect: &Suspect| suspect.died.values().any(|&alone| alone);
        let alone = self.suspects.get(key).is_some_and(is_alone);
        alone && self.died(key, now).len() >= self.deaths_max
    }

    /// The processes that died of a request.
    pub(crate) fn died(
        &self,
        key: &RequestDigest,
        now: Instant,
    ) -> impl ExactSizeIterator<Item = &Process> + use<'_> {
        static NONE: BTreeMap<Process, bool> = BTreeMap::new();
        let suspect = self.suspects.get(key).filter(|suspect| suspect.last + self.memory > now);
        suspect.map_or(&NONE, |suspect| &suspect.died).keys()
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
        let (mut strikes, now) = (Strikes::new(3, MINUTE), now());
        let poison = RequestDigest::of(b"poison");
        for (epoch, deaths) in [(1, 1), (1, 1), (2, 2)] {
            strikes.add(poison, died("a", epoch, now), now);
            assert_eq!(strikes.died(&poison, now).len(), deaths);
        }
        assert!(strikes.is_suspect(&poison, now) && !strikes.is_convicted(&poison, now));
        assert_eq!(strikes.died(&RequestDigest::of(b"innocent"), now).len(), 0);
        strikes.clear(&poison);
        assert_eq!(strikes.died(&poison, now).len(), 0);
    }

    #[test]
    fn only_what_died_alone_is_convicted() {
        let (mut strikes, now) = (Strikes::new(3, MINUTE), now());
        let suspect = RequestDigest::of(b"suspect");
        for epoch in 0..5 {
            strikes.add(suspect, died("a", epoch, now), now);
            assert!(!strikes.is_convicted(&suspect, now));
            assert_eq!(strikes.is_suspect(&suspect, now), epoch > 0);
        }
        strikes.add(suspect, Died { alone: true, ..died("a", 5, now) }, now);
        assert!(strikes.is_convicted(&suspect, now));
        assert!(!strikes.is_convicted(&suspect, now + MINUTE));
        // One death is no proof, alone or not: somebody may have killed the process.
        let unlucky = RequestDigest::of(b"unlucky");
        strikes.add(unlucky, Died { alone: true, ..died("a", 6, now) }, now);
        assert!(!strikes.is_convicted(&unlucky, now) && !strikes.is_suspect(&unlucky, now));
    }

    #[test]
    fn who_lives_did_not_die() {
        let (mut strikes, now) = (Strikes::new(2, MINUTE), now());
        let suspect = RequestDigest::of(b"suspect");
        for epoch in 0..2 {
            strikes.add(suspect, Died { alone: epoch == 1, ..died("a", epoch, now) }, now);
        }
        assert!(strikes.is_convicted(&suspect, now));
        strikes.acquit(&("a".parse().unwrap(), 1));
        assert!(!strikes.is_convicted(&suspect, now) && strikes.is_suspect(&suspect, now));
        // Nor was it the one that was alone.
        strikes.add(suspect, died("a", 2, now), now);
        assert!(!strikes.is_convicted(&suspect, now));
        strikes.take_back(&suspect, &("a".parse().unwrap(), 0));
        strikes.take_back(&suspect, &("a".parse().unwrap(), 2));
        assert!(strikes.suspects.is_empty() && strikes.by_time.is_empty());
    }

    #[test]
    fn strikes_are_forgotten_after_a_while() {
        let (mut strikes, now) = (Strikes::new(3, MINUTE), now());
        let poison = RequestDigest::of(b"poison");
        strikes.add(poison, died("a", 1, now), now);
        assert_eq!(strikes.remembered(&poison, now + MINUTE / 4), MINUTE * 3 / 4);
        assert_eq!(strikes.died(&poison, now + MINUTE).len(), 0);
        strikes.add(poison, died("b", 1, now), now + MINUTE);
        assert_eq!(strikes.died(&poison, now + MINUTE).len(), 0, "it is told too late");
        strikes.add(poison, died("b", 1, now + MINUTE), now + MINUTE);
        assert_eq!(strikes.died(&poison, now + MINUTE).len(), 1);
        // An older one that is told later does not shorten the memory.
        strikes.add(poison, died("c", 1, now + MINUTE / 2), now + MINUTE);
        assert_eq!(strikes.remembered(&poison, now + MINUTE), MINUTE);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_the_newest() {
        let (mut strikes, now) = (Strikes::new(3, MINUTE), now());
        let key = |number: usize| RequestDigest::of(&number.to_le_bytes());
        for number in 0..REQUESTS_MAX + 10 {
            let at = now + Duration::from_micros(number as u64);
            strikes.add(key(number), died("a", 1, at), at);
        }
        assert_eq!(strikes.suspects.len(), REQUESTS_MAX);
        assert_eq!(strikes.by_time.len(), REQUESTS_MAX);
        assert_eq!(strikes.died(&key(0), now).len(), 0);
        assert_eq!(strikes.died(&key(REQUESTS_MAX + 9), now).len(), 1);
    }

    fn died(worker: &str, epoch: u64, at: Instant) -> Died {
        Died { process: (worker.parse().unwrap(), epoch), alone: false, at }
    }

    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn now() -> Instant {
        Instant::now()
    }
}
