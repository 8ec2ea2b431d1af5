//! What a journal remembers of processes that ended, and what it makes of other files.

use protocol::RequestDigest;
use tempfile::TempDir;

use super::*;

#[test]
fn what_a_process_was_busy_with_is_told_by_the_next_ones() {
    let place = Place::new();
    let mut journal = place.open(1);
    assert_eq!(journal.deaths(), []);
    journal.begin(DispatchId(1), busy(1));
    journal.begin(DispatchId(2), busy(2));
    journal.begin(DispatchId(2), busy(9));
    journal.begin(DispatchId(3), Busy { alone: true, ..busy(3) });
    journal.end(DispatchId(1));
    journal.end(DispatchId(7));
    drop(journal);

    let died_with = vec![busy(2), Busy { alone: true, ..busy(3) }];
    let mut journal = place.open(2);
    assert_eq!(told(&journal), [(1, died_with.clone())]);
    journal.begin(DispatchId(1), busy(4));
    drop(journal);
    assert_eq!(told(&place.open(3)), [(1, died_with), (2, vec![busy(4)])]);
}

#[test]
fn who_ends_in_peace_was_busy_with_nothing() {
    let place = Place::new();
    let mut journal = place.open(1);
    journal.begin(DispatchId(1), busy(1));
    journal.close();
    drop(journal);
    assert_eq!(told(&place.open(2)), [(1, vec![])]);
}

#[test]
fn two_workers_share_no_journal() {
    let place = Place::new();
    let _first = place.open(1);
    let again = Journal::open(place.0.path(), &name("gpu-0"), 2);
    assert!(matches!(again, Err(JournalError::InUse(_))), "{again:?}");
    Journal::open(place.0.path(), &name("rack/gpu-0"), 2).unwrap();
}

#[test]
fn foreign_and_torn_journals_start_anew() {
    let place = Place::new();
    let good = text::head(&[], 7);
    for foreign in
        ["", "luna journal 2\nprocess 1\n", "luna journal 1\n", "{}", "luna journal 1\nx"]
    {
        fs::write(place.file(), foreign).unwrap();
        assert_eq!(place.open(1).deaths(), [], "{foreign}");
    }
    // Half a slot, bytes that are no text, and slots that nobody wrote.
    let mut torn = good.into_bytes();
    torn.extend([0; 2 * text::SLOT_BYTES]);
    torn.extend(Slot::Free.to_bytes());
    torn.extend(Slot::Busy(busy(1)).to_bytes());
    torn.extend(b"\xff\xfe busy zz -----\n");
    torn.extend(&Slot::Busy(busy(2)).to_bytes()[..40]);
    fs::write(place.file(), torn).unwrap();
    assert_eq!(told(&place.open(1)), [(7, vec![busy(1)])]);
}

#[test]
fn memory_is_bounded_in_number_and_time() {
    let place = Place::new();
    let old = Ended { epoch: 1, at: 1_000_000, busy_with: vec![busy(1)] };
    fs::write(place.file(), text::head(&[old], 2)).unwrap();
    assert_eq!(told(&place.open(3)), [(2, vec![])], "the first ended long ago");
    for epoch in 10..10 + 2 * DEATHS_MAX as u64 {
        let mut journal = place.open(epoch);
        for number in 0..2 * SLOTS_MAX as u64 {
            journal.begin(DispatchId(number), busy(number));
        }
    }
    let told = told(&place.open(1000));
    assert_eq!(told.len(), DEATHS_MAX);
    assert_eq!(told.last().map(|(epoch, _)| *epoch), Some(9 + 2 * DEATHS_MAX as u64));
    let busy: usize = told.iter().map(|(_, busy)| busy.len()).sum();
    assert_eq!(busy, DEATHS_BUSY_MAX);
    assert!(fs::metadata(place.file()).unwrap().len() < 100_000);
}

/// A directory with the journal of `gpu-0`.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn open(&self, epoch: u64) -> Journal {
        Journal::open(self.0.path(), &name("gpu-0"), epoch).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("gpu-0.journal")
    }
}

fn told(journal: &Journal) -> Vec<(u64, Vec<Busy>)> {
    journal.deaths().into_iter().map(|death| (death.epoch, death.busy_with)).collect()
}

fn busy(number: u64) -> Busy {
    Busy { key: RequestDigest::of(&number.to_le_bytes()), alone: false }
}

fn name(worker: &str) -> WorkerName {
    worker.parse().unwrap()
}
