//! The one source of chance: a seeded generator that gives the same numbers everywhere.
//!
//! `SplitMix64` (Steele, Lea and Flood, 2014). It is small, fast and good enough to choose faults and
//! delays; nothing here is meant to be secret.

use crate::time::Span;

/// A generator of numbers that look random.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The generator that belongs to `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x9e37_79b9_7f4a_7c15))
    }

    /// A generator of its own for one purpose, so that what one part of the simulation draws does
    /// not shift what another part gets.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`; 0 when `end` is 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let wide = u128::from(self.next()) * (end as u128);
        usize::try_from(wide >> 64).expect("less than `end`")
    }

    /// A number from `first` to `last`, both included.
    pub(crate) fn between(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last + 1 - first)
    }

    /// A time from `first` to `last`.
    pub(crate) fn span(&mut self, first: Span, last: Span) -> Span {
        let range = usize::try_from(last.micros() - first.micros()).expect("64-bit machines");
        Span::from_micros(first.micros() + self.below(range + 1) as u64)
    }

    /// A time whose logarithm is evenly spread between those of `first` and `last`.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "times of minutes in microseconds are exact in a double"
    )]
    pub(crate) fn log_span(&mut self, first: Span, last: Span) -> Span {
        let (low, high) = ((first.micros() as f64).ln(), (last.micros() as f64).ln());
        Span::from_micros((low + (high - low) * self.unit()).exp() as u64)
    }

    /// An exponentially distributed time: the pause between independent events.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "times of minutes in microseconds are exact in a double"
    )]
    pub(crate) fn exponential(&mut self, mean: Span) -> Span {
        Span::from_micros((-(1.0 - self.unit()).ln() * mean.micros() as f64) as u64)
    }

    /// True in `share` of all cases.
    pub(crate) fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// One of `items`, which must not be empty.
    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// An index below `count` of which small ones are more frequent, as by Zipf's law.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts of thousands are exact in a double"
    )]
    pub(crate) fn zipf(&mut self, count: usize) -> usize {
        let index = ((count as f64 + 1.0).ln() * self.unit()).exp() as usize;
        index.clamp(1, count.max(1)) - 1
    }

    /// A number in `[0, 1)`.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The finaliser of `SplitMix64`: every bit of the input changes about half of the output.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_again() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            [random.next(), random.next(), random.fork().next()]
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        let mut random = Random::new(1);
        let (first, last) = (Span::from_millis(2), Span::from_millis(9));
        for _ in 0..1000 {
            assert!((3..=5).contains(&random.between(3, 5)));
            assert!(random.zipf(10) < 10);
            assert!((first..=last).contains(&random.span(first, last)));
            assert!((first..=last).contains(&random.log_span(first, last)));
        }
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn small_indices_are_frequent_by_zipf() {
        let mut random = Random::new(1);
        let first = (0..1000).filter(|_| random.zipf(100) == 0).count();
        assert!((100..200).contains(&first), "{first}");
    }
}
