//! Latencies: a histogram, and the few numbers of it that people read.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is told apart from longer ones.
const LONGEST: Duration = Duration::from_mins(10);

/// Latencies to three significant digits, from a nanosecond to ten minutes.
#[derive(Debug, Clone)]
pub(crate) struct Latencies(Histogram<u64>);

/// What people read of many latencies, in microseconds; all 0 when there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct LatencySummary {
    /// How many there are.
    pub count: u64,
    /// The median.
    pub p50_us: f64,
    /// 99 of 100 are not longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        let longest = nanoseconds(LONGEST);
        Self(Histogram::new_with_max(longest, 3).expect("the bounds are those of a histogram"))
    }
}

impl Latencies {
    /// Counts one more; what is over ten minutes counts as ten minutes.
    pub(crate) fn record(&mut self, latency: Duration) {
        self.0.saturating_record(nanoseconds(latency));
    }

    /// Counts what another histogram has counted.
    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("all histograms have the same bounds");
    }

    /// How many were counted.
    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    /// The numbers that people read.
    pub(crate) fn summary(&self) -> LatencySummary {
        if self.0.is_empty() {
            return LatencySummary::default();
        }
        let at = |quantile| microseconds(self.0.value_at_quantile(quantile));
        LatencySummary {
            count: self.count(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: microseconds(self.0.max()),
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn microseconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_everything_that_was_recorded() {
        let (mut all, mut slow) = (Latencies::default(), Latencies::default());
        for us in 1..=98 {
            all.record(Duration::from_micros(us));
        }
        slow.record(Duration::from_millis(50));
        slow.record(Duration::from_millis(70));
        all.add(&slow);

        let summary = all.summary();
        assert_eq!(summary.count, 100);
        let is_near = |value: f64, expected: f64| (value / expected - 1.0).abs() < 2e-3;
        assert!(is_near(summary.p50_us, 50.0), "{summary:?}");
        assert!(is_near(summary.p99_us, 50_000.0), "{summary:?}");
        assert!(is_near(summary.max_us, 70_000.0), "{summary:?}");
    }

    #[test]
    fn nothing_recorded_is_all_zero_and_nothing_is_too_long() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.summary(), LatencySummary::default());
        latencies.record(Duration::MAX);
        assert_eq!(latencies.summary().count, 1);
    }
}
