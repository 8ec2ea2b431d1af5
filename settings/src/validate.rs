//! Checks of values beyond their type; any `Fn(&T) -> Result<(), String>` serves as one.

use std::fmt::Display;
use std::ops::RangeInclusive;

/// Accepts every value of the type.
///
/// # Errors
/// None.
pub fn accept<T>(_: &T) -> Result<(), String> {
    Ok(())
}

/// Accepts values from the start to the end of `range`, both included.
pub fn within<T: PartialOrd + Display>(
    range: RangeInclusive<T>,
) -> impl Fn(&T) -> Result<(), String> {
    move |value| {
        if range.contains(value) {
            Ok(())
        } else {
            Err(format!("write a value from {} to {}", range.start(), range.end()))
        }
    }
}

/// Accepts `min` and everything above it.
pub fn at_least<T: PartialOrd + Display>(min: T) -> impl Fn(&T) -> Result<(), String> {
    move |value| if *value >= min { Ok(()) } else { Err(format!("write at least {min}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_included() {
        assert!(within(1..=3)(&1).is_ok() && within(1..=3)(&3).is_ok());
        assert_eq!(within(1..=3)(&4), Err("write a value from 1 to 3".to_owned()));
        assert!(at_least(0.5)(&0.5).is_ok());
        assert_eq!(at_least(0.5)(&f64::NAN), Err("write at least 0.5".to_owned()));
    }
}
