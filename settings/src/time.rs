//! Times as people write them in settings: `500ms`, `30s`, `2m`.

use std::{fmt, str::FromStr, time::Duration};

/// A time with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub Duration);

/// A text that is not a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a time: write `500ms`, `30s` or `2m`")]
pub struct InvalidTime;

impl FromStr for Time {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
        let number: u64 = text[..text.len() - unit.len()].parse().map_err(|_| InvalidTime)?;
        let scale = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            _ => return Err(InvalidTime),
        };
        // A week is more than anything here may last, and far from overflowing an instant.
        let ms = number.saturating_mul(scale).min(7 * 24 * 3_600_000);
        Ok(Self(Duration::from_millis(ms)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        if ms.is_multiple_of(1_000) { write!(f, "{}s", ms / 1_000) } else { write!(f, "{ms}ms") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("2m", 120_000), ("0s", 0)] {
            assert_eq!(text.parse(), Ok(Time(Duration::from_millis(ms))));
        }
        for text in ["", "30", "s", "-1s", "1.5s", "1 s", "1h"] {
            assert_eq!(text.parse::<Time>(), Err(InvalidTime), "{text:?}");
        }
    }

    #[test]
    fn a_time_is_shown_as_it_is_read() {
        for text in ["500ms", "30s", "120s"] {
            assert_eq!(text.parse::<Time>().unwrap().to_string(), text);
        }
    }
}
