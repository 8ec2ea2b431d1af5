//! What was done to processes, and when.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::plan::Target;

/// Something that was done to a process, or that it did by itself.
#[derive(Debug, Clone)]
pub(crate) struct Incident {
    pub(crate) at: Instant,
    /// The same moment as logs write it.
    pub(crate) time_of_day: Duration,
    pub(crate) target: Target,
    pub(crate) what: What,
}

/// What happened to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// It is about to be started.
    Started,
    /// It is about to be killed.
    Killed,
    /// It is about to be stopped by SIGSTOP.
    Paused,
    /// It goes on after SIGCONT.
    Resumed,
    /// It is about to be told to end by SIGTERM.
    Terminating,
    /// It has ended with success after SIGTERM.
    Terminated,
    /// It ended when nobody had told it to, or not with success.
    Failed(String),
}

/// All incidents, in order.
#[derive(Debug, Default)]
pub(crate) struct Timeline(Mutex<Vec<Incident>>);

impl Timeline {
    /// Notes that something happens now.
    pub(crate) fn record(&self, target: Target, what: What) {
        let (at, time_of_day) = (Instant::now(), time_of_day());
        self.lock().push(Incident { at, time_of_day, target, what });
    }

    /// Everything so far.
    pub(crate) fn incidents(&self) -> Vec<Incident> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Incident>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time since midnight, in UTC.
fn time_of_day() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.expect("the clock is set to after 1970");
    Duration::new(now.as_secs() % DAY.as_secs(), now.subsec_nanos())
}

/// Seconds of the days that UTC knows.
pub(crate) const DAY: Duration = Duration::from_hours(24);
