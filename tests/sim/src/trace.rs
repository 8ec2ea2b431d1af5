//! What happened, as a hash that is always made and as lines that are made when somebody reads them.
//!
//! A run that fails is run again with lines: the same seed gives the same run, so nothing needs to
//! be written down in the millions of requests that do not fail.

use crate::{random::mix, time::Time};

/// Everything that happened in a run, in order.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    lines: Option<Vec<Line>>,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// The request concerned, if it is one.
    pub(crate) request: Option<String>,
    /// For people.
    pub(crate) text: String,
}

impl Trace {
    /// An empty trace; lines are kept only when they are wanted.
    pub(crate) fn new(keeps_lines: bool) -> Self {
        Self { hash: 0, lines: keeps_lines.then(Vec::new) }
    }

    /// Takes in an event by the numbers that tell it from others. `line` gives the request concerned
    /// and the words.
    pub(crate) fn note(
        &mut self,
        now: Time,
        event: [u64; 3],
        line: impl FnOnce() -> (Option<String>, String),
    ) {
        for value in [now.micros()].into_iter().chain(event) {
            self.hash = mix(self.hash.rotate_left(5) ^ value);
        }
        if let Some(lines) = &mut self.lines {
            let (request, text) = line();
            lines.push(Line { request, text: format!("{now}  {text}") });
        }
    }

    /// Tells two runs apart: equal runs have equal hashes.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// The lines, if they were kept.
    pub(crate) fn into_lines(self) -> Vec<Line> {
        self.lines.unwrap_or_default()
    }
}
