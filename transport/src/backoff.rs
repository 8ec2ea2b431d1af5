//! Full-jitter exponential back-off: how long to wait before the next attempt.
//!
//! Pure: randomness comes in, no clock is read. The formula is AWS's "full jitter": uniform in
//! `[0, min(max, min · 2^attempt)]`, which spreads a farm's reconnects after a broker restart.

use std::time::Duration;

use rand::{Rng, RngExt};

/// The delays between attempts that keep failing.
#[derive(Clone, Debug)]
pub struct Backoff<R> {
    min: Duration,
    max: Duration,
    /// The largest delay that the next attempt may draw.
    ceiling: Duration,
    rng: R,
}

/// Bounds between which no delay can be drawn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "back-off from `{min:?}` to `{max:?}`: write a minimum above zero and no more than the maximum"
)]
pub struct InvalidBackoff {
    min: Duration,
    max: Duration,
}

impl<R: Rng> Backoff<R> {
    /// Makes a back-off whose first delay is at most `min` and whose longest is at most `max`.
    ///
    /// # Errors
    /// [`InvalidBackoff`] if `min` is zero or more than `max`.
    pub fn try_new(min: Duration, max: Duration, rng: R) -> Result<Self, InvalidBackoff> {
        if min.is_zero() || min > max {
            return Err(InvalidBackoff { min, max });
        }
        Ok(Self { min, max, ceiling: min, rng })
    }

    /// Draws the delay before the next attempt and doubles the range of the one after.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.rng.random_range(Duration::ZERO..=self.ceiling);
        self.ceiling = self.ceiling.saturating_mul(2).min(self.max);
        delay
    }

    /// Starts over: an attempt succeeded.
    pub fn reset(&mut self) {
        self.ceiling = self.min;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    const MIN: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_secs(1);

    #[test]
    fn delays_stay_under_a_ceiling_that_doubles_up_to_the_maximum() {
        for seed in 0..200 {
            let mut backoff = backoff(seed);
            let mut ceiling = MIN;
            for _ in 0..20 {
                assert!(backoff.next_delay() <= ceiling);
                ceiling = (ceiling * 2).min(MAX);
            }
        }
    }

    #[test]
    fn delays_use_the_whole_range() {
        let mut backoff = backoff(7);
        for _ in 0..10 {
            backoff.next_delay();
        }
        let delays: Vec<Duration> = (0..500).map(|_| backoff.next_delay()).collect();
        assert!(delays.iter().any(|delay| *delay < MAX / 10));
        assert!(delays.iter().any(|delay| *delay > MAX * 9 / 10));
    }

    #[test]
    fn a_reset_starts_over() {
        let mut backoff = backoff(1);
        for _ in 0..10 {
            backoff.next_delay();
        }
        backoff.reset();
        assert!(backoff.next_delay() <= MIN);
    }

    #[test]
    fn bounds_without_a_delay_between_them_are_refused() {
        for (min, max) in [(Duration::ZERO, MAX), (MAX, MIN)] {
            let error = Backoff::try_new(min, max, SmallRng::seed_from_u64(0)).unwrap_err();
            assert!(error.to_string().contains(&format!("`{min:?}` to `{max:?}`")));
        }
    }

    fn backoff(seed: u64) -> Backoff<SmallRng> {
        Backoff::try_new(MIN, MAX, SmallRng::seed_from_u64(seed)).unwrap()
    }
}
