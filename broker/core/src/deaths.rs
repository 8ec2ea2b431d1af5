//! Ends of workers' processes: each is counted once, whoever tells of it first.
//!
//! The broker sees a connection close and knows what the worker had in hand; which of that it was
//! busy with, only its journal knows, and that is told when the worker is back. Then strikes of
//! what just waited its turn are taken back. A broker that restarts learns all of it that way.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{RequestDigest, WorkerName};

/// Lost processes that are remembered until a journal tells of them; the oldest go first.
const LOST_MAX: usize = 256;

/// Names of workers whose journals are remembered.
const NAMES_MAX: usize = 4096;

/// One process of a worker: its name and epoch.
pub(crate) type Process = (WorkerName, u64);

/// What is known of processes that are no more.
#[derive(Debug, Default)]
pub(crate) struct Deaths {
    /// What was struck when they were lost, of processes whose journals were not heard yet.
    lost: BTreeMap<Process, Lost>,
    by_age: BTreeMap<u64, Process>,
    losses: u64,
    /// The epochs that each worker's journal told of last.
    told: BTreeMap<WorkerName, BTreeSet<u64>>,
}

#[derive(Debug)]
struct Lost {
    number: u64,
    struck: BTreeSet<RequestDigest>,
}

impl Deaths {
    /// A process was lost, and these requests were struck for it.
    pub(crate) fn lose(&mut self, process: Process, struck: BTreeSet<RequestDigest>) {
        self.revive(&process);
        if self.lost.len() >= LOST_MAX
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.lost.remove(&oldest);
        }
        self.losses += 1;
        self.by_age.insert(self.losses, process.clone());
        self.lost.insert(process, Lost { number: self.losses, struck });
    }

    /// A process that was thought lost lives.
    pub(crate) fn revive(&mut self, process: &Process) {
        if let Some(lost) = self.lost.remove(process) {
            self.by_age.remove(&lost.number);
        }
    }

    /// A worker's journal tells of the ends of its processes with these epochs. Returns those that
    /// it had not told of before, with what was struck for them.
    pub(crate) fn tell(
        &mut self,
        worker: &WorkerName,
        epochs: BTreeSet<u64>,
    ) -> BTreeMap<u64, BTreeSet<RequestDigest>> {
        let told = self.told.remove(worker).unwrap_or_default();
        let mut news = BTreeMap::new();
        for &epoch in epochs.difference(&told) {
            let process = (worker.clone(), epoch);
            let struck = self.lost.remove(&process).map(|lost| {
                self.by_age.remove(&lost.number);
                lost.struck
            });
            news.insert(epoch, struck.unwrap_or_default());
        }
        if self.told.len() >= NAMES_MAX {
            self.told.pop_first();
        }
        self.told.insert(worker.clone(), epochs);
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_is_news_once() {
        let mut deaths = Deaths::default();
        let struck = BTreeSet::from([RequestDigest::of(b"a")]);
        deaths.lose(process("w", 1), struck.clone());
        let (first, second) = (BTreeSet::from([0, 1]), BTreeSet::from([1, 2]));
        let news = deaths.tell(&name("w"), first.clone());
        assert_eq!(news, BTreeMap::from([(0, BTreeSet::new()), (1, struck)]));
        assert!(deaths.tell(&name("w"), first.clone()).is_empty());
        assert!(deaths.tell(&name("w"), second).contains_key(&2));
        assert_eq!(deaths.tell(&name("other"), first).len(), 2, "another worker's epochs");
        assert!(deaths.lost.is_empty() && deaths.by_age.is_empty());
    }

    #[test]
    fn who_lives_was_not_lost_and_memory_is_bounded() {
        let mut deaths = Deaths::default();
        deaths.lose(process("w", 1), BTreeSet::from([RequestDigest::of(b"a")]));
        deaths.revive(&process("w", 1));
        assert!(deaths.tell(&name("w"), BTreeSet::from([1]))[&1].is_empty());
        for epoch in 0..2 * LOST_MAX as u64 {
            deaths.lose(process("x", epoch), BTreeSet::new());
            deaths.lose(process("x", epoch), BTreeSet::new());
        }
        assert_eq!((deaths.lost.len(), deaths.by_age.len()), (LOST_MAX, LOST_MAX));
        for number in 0..=NAMES_MAX {
            deaths.tell(&name(&format!("w{number}")), BTreeSet::new());
        }
        assert_eq!(deaths.told.len(), NAMES_MAX);
    }

    fn process(worker: &str, epoch: u64) -> Process {
        (name(worker), epoch)
    }

    fn name(worker: &str) -> WorkerName {
        worker.parse().unwrap()
    }
}
