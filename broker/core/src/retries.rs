//! The budget for giving requests to another worker: one in ten, and a few every second.
//!
//! When workers die faster than that, trying again makes it worse: what they had is answered with
//! `overloaded` then, and the clients decide.

use std::time::{Duration, Instant};

/// Retries that every request earns.
const PER_REQUEST: f64 = 0.1;
/// Retries that every second earns.
const PER_SECOND: f64 = 3.0;
/// Retries that can be saved up: what several large workers have in hand.
const SAVED_MAX: f64 = 256.0;

/// A token bucket.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    tokens: f64,
    filled: Instant,
}

impl RetryBudget {
    /// A full budget.
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: SAVED_MAX, filled: now }
    }

    /// Notes that a request was given to its first worker.
    pub(crate) fn earn(&mut self) {
        self.tokens = (self.tokens + PER_REQUEST).min(SAVED_MAX);
    }

    /// Takes one retry; or says when there will be one.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let seconds = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + PER_SECOND * seconds).min(SAVED_MAX);
        self.filled = self.filled.max(now);
        if self.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.tokens) / PER_SECOND));
        }
        self.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn retries_are_a_tenth_of_traffic_and_three_a_second() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(now);
        let taken = |budget: &mut RetryBudget, now| {
            (0..1000).take_while(|_| budget.take(now).is_ok()).count()
        };
        assert_eq!(taken(&mut budget, now), 256);
        let wait = budget.take(now).unwrap_err();
        assert!(wait <= Duration::from_millis(334), "{wait:?}");
        assert_eq!(taken(&mut budget, now + wait + Duration::from_millis(1)), 1);
        assert_eq!(taken(&mut budget, now + wait + Duration::from_millis(1001)), 3);
        (0..1001).for_each(|_| budget.earn());
        assert_eq!(taken(&mut budget, now), 100, "time that went back earns nothing");
    }
}
