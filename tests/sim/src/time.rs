//! Virtual time: microseconds since the start of a run, and the clocks of the processes.

use std::{
    fmt,
    ops::{Add, Sub},
    time::{Duration, Instant},
};

/// A moment of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(u64);

/// A length of time, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(u64);

/// The monotonic clock of one process, which started at a moment of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    zero: Instant,
}

impl Time {
    /// The start of a run.
    pub(crate) const ZERO: Self = Self(0);

    /// Microseconds since the start.
    pub(crate) const fn micros(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to this moment; zero when it is later.
    pub(crate) const fn since(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

impl Span {
    /// No time.
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    pub(crate) const fn from_millis(millis: u64) -> Self {
        Self(millis * 1000)
    }

    pub(crate) const fn from_secs(secs: u64) -> Self {
        Self(secs * 1_000_000)
    }

    pub(crate) const fn micros(self) -> u64 {
        self.0
    }

    pub(crate) const fn times(self, factor: u64) -> Self {
        Self(self.0 * factor)
    }

    pub(crate) const fn duration(self) -> Duration {
        Duration::from_micros(self.0)
    }
}

impl Clock {
    /// A clock that showed `started` plus `offset` when the run began.
    pub(crate) fn new(started: Instant, offset: Span) -> Self {
        Self { zero: started + offset.duration() }
    }

    /// What the clock shows at `time`.
    pub(crate) fn show(&self, time: Time) -> Instant {
        self.zero + Duration::from_micros(time.0)
    }

    /// The first moment at which the clock shows `instant` or more.
    pub(crate) fn when(&self, instant: Instant) -> Time {
        let nanos = instant.saturating_duration_since(self.zero).as_nanos();
        Time(u64::try_from(nanos.div_ceil(1000)).unwrap_or(u64::MAX))
    }
}

impl Add<Span> for Time {
    type Output = Self;

    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub<Span> for Time {
    type Output = Self;

    fn sub(self, span: Span) -> Self {
        Self(self.0.saturating_sub(span.0))
    }
}

impl Add for Span {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>3}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.0 / 1000, self.0 % 1000)
    }
}
