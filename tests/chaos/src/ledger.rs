//! The account of all requests: each one that was started is closed in exactly one way.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use luna_client::{Error, ErrorCode, Unclaimed};
use serde::Serialize;

/// The account, shared by all clients.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Book>>);

/// What is in the account.
#[derive(Debug, Clone, Default)]
pub(crate) struct Book {
    pub(crate) counts: Counts,
    /// How innocent requests failed: those with enough time that nobody gave up.
    pub(crate) innocent_errors: BTreeMap<String, Failures>,
    /// How requests failed that had too little time on purpose.
    pub(crate) hurried_errors: BTreeMap<String, Failures>,
    /// How uploads failed.
    pub(crate) upload_errors: BTreeMap<String, Failures>,
    /// The first of them.
    pub(crate) wrong: Vec<String>,
    /// The first of them.
    pub(crate) lost: Vec<String>,
    /// When each client was answered.
    pub(crate) answered: Vec<(usize, Instant)>,
    /// Times of answers to innocent requests.
    pub(crate) latencies: Vec<Duration>,
}

/// How many requests were closed in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) answers: u64,
    pub(crate) errors: u64,
    /// Given up by the client that went on.
    pub(crate) cancelled: u64,
    /// Given up by a client that went.
    pub(crate) abandoned: u64,
    pub(crate) wrong: u64,
    pub(crate) lost: u64,
    /// Replies to requests that were answered already.
    pub(crate) repeated: u64,
    /// Replies to requests that were given up.
    pub(crate) unclaimed: u64,
    pub(crate) uploads: u64,
}

/// Failures of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Failures {
    pub(crate) count: u64,
    /// The message of the first.
    pub(crate) first: String,
}

/// A request that is under way. Dropping it counts the request as abandoned.
#[derive(Debug)]
pub(crate) struct Ticket {
    ledger: Ledger,
    client: usize,
    started: Instant,
    is_open: bool,
}

impl Ledger {
    /// Opens a request of `client`.
    pub(crate) fn open(&self, client: usize) -> Ticket {
        self.book().counts.requests += 1;
        Ticket { ledger: self.clone(), client, started: Instant::now(), is_open: true }
    }

    /// Counts an upload and how it failed.
    pub(crate) fn upload(&self, failure: Option<&Error>) {
        let mut book = self.book();
        book.counts.uploads += 1;
        if let Some(error) = failure {
            note(&mut book.upload_errors, error);
        }
    }

    /// Adds what a client was sent without having an open request for it.
    pub(crate) fn unclaimed(&self, replies: Unclaimed) {
        let mut book = self.book();
        book.counts.repeated += replies.repeated;
        book.counts.unclaimed += replies.other;
    }

    /// A copy of everything so far.
    pub(crate) fn snapshot(&self) -> Book {
        self.book().clone()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// The right answer came.
    pub(crate) fn answered(self) {
        let (client, time) = (self.client, self.started.elapsed());
        self.close(|book| {
            book.counts.answers += 1;
            book.answered.push((client, Instant::now()));
            book.latencies.push(time);
        });
    }

    /// An answer came that is not the solo answer.
    pub(crate) fn wrong(self, how: String) {
        self.close(|book| {
            book.counts.wrong += 1;
            tell(&mut book.wrong, how);
        });
    }

    /// A typed error came. `is_innocent` when the request had enough time.
    pub(crate) fn failed(self, error: &Error, is_innocent: bool) {
        self.close(|book| {
            book.counts.errors += 1;
            let errors =
                if is_innocent { &mut book.innocent_errors } else { &mut book.hurried_errors };
            note(errors, error);
        });
    }

    /// Nothing came by the deadline and some more.
    pub(crate) fn lost(self, what: String) {
        self.close(|book| {
            book.counts.lost += 1;
            tell(&mut book.lost, what);
        });
    }

    /// The client gave the request up.
    pub(crate) fn cancelled(self) {
        self.close(|book| book.counts.cancelled += 1);
    }

    fn close(mut self, how: impl FnOnce(&mut Book)) {
        self.is_open = false;
        how(&mut self.ledger.book());
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_open {
            self.ledger.book().counts.abandoned += 1;
        }
    }
}

impl Counts {
    /// Whether every request was closed in exactly one way.
    pub(crate) fn is_balanced(&self) -> bool {
        let Self { answers, errors, cancelled, abandoned, wrong, lost, .. } = *self;
        self.requests == answers + errors + cancelled + abandoned + wrong + lost
    }
}

fn tell(told: &mut Vec<String>, what: String) {
    if told.len() < TOLD_MAX {
        told.push(what);
    }
}

fn note(errors: &mut BTreeMap<String, Failures>, error: &Error) {
    let failures = errors.entry(name(error)).or_default();
    if failures.count == 0 {
        failures.first = error.to_string();
    }
    failures.count += 1;
}

/// The code, or the SDK's own kind; a farm that is full is told from a broker that leaves.
fn name(error: &Error) -> String {
    match error.code() {
        Some(ErrorCode::Overloaded) if error.to_string().contains("draining") => {
            "overloaded (draining)".to_owned()
        }
        Some(code) => format!("{code}"),
        None => format!("{:?}", error.kind()).to_lowercase(),
    }
}

/// Of what is wrong in one way; all are counted.
const TOLD_MAX: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_closed_once() {
        let ledger = Ledger::default();
        ledger.open(0).answered();
        ledger.open(0).cancelled();
        ledger.open(1).wrong("another one".to_owned());
        ledger.open(1).lost("never".to_owned());
        drop(ledger.open(1));
        let open = ledger.open(2);
        assert!(!ledger.snapshot().counts.is_balanced());
        drop(open);
        let Book { counts, wrong, lost, answered, .. } = ledger.snapshot();
        assert!(counts.is_balanced());
        let expected = Counts {
            requests: 6,
            answers: 1,
            cancelled: 1,
            wrong: 1,
            lost: 1,
            abandoned: 2,
            ..counts
        };
        assert_eq!(counts, expected);
        assert_eq!((wrong.len(), lost.len(), answered.len()), (1, 1, 1));
    }
}
