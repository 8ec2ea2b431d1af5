//! One line of a process's JSON log, as far as chaos reads it.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::timeline::DAY;

/// A line that was understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LogLine {
    /// Since midnight, in UTC.
    pub(crate) time_of_day: Duration,
    pub(crate) level: String,
    pub(crate) message: String,
    /// The field `worker`, where there is one.
    pub(crate) worker: Option<String>,
}

/// The line as it is written.
#[derive(Deserialize)]
struct Written {
    timestamp: String,
    level: String,
    fields: serde_json::Map<String, Value>,
}

impl LogLine {
    /// Reads a line; nothing if it is none of the log's own, for example of a panic.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let Written { timestamp, level, fields } = serde_json::from_str(line).ok()?;
        let field = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        let message = field("message").unwrap_or_default();
        let time_of_day = parse_time_of_day(&timestamp)?;
        Some(Self { time_of_day, level, message, worker: field("worker") })
    }
}

/// The time from `earlier` to `later`, which is less than half a day away, midnight or not;
/// nothing when `later` is earlier.
pub(crate) fn elapsed(earlier: Duration, later: Duration) -> Option<Duration> {
    let forward = (later + DAY).checked_sub(earlier)?;
    let forward = if forward >= DAY { forward.checked_sub(DAY)? } else { forward };
    (forward < DAY / 2).then_some(forward)
}

/// `…T12:34:56.789Z` as time since midnight.
fn parse_time_of_day(timestamp: &str) -> Option<Duration> {
    let (_, time) = timestamp.strip_suffix('Z')?.split_once('T')?;
    let mut parts = time.splitn(3, ':');
    let (hours, minutes) = (parts.next()?.parse::<u64>().ok()?, parts.next()?.parse::<u64>().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    let seconds = Duration::try_from_secs_f64(seconds).ok()?;
    Some(Duration::from_secs(hours.checked_mul(3600)? + minutes.checked_mul(60)?) + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_time_a_message_and_perhaps_a_worker() {
        let line = r#"{"fields":{"in_flight":2,"message":"worker lost","reason":"gone","worker":"cpu-1"},
            "level":"WARN","process":"luna-broker","target":"x","timestamp":"2026-11-24T01:02:03.5Z"}"#;
        let expected = LogLine {
            time_of_day: Duration::from_millis(3_723_500),
            level: "WARN".to_owned(),
            message: "worker lost".to_owned(),
            worker: Some("cpu-1".to_owned()),
        };
        assert_eq!(LogLine::parse(line), Some(expected));
        assert_eq!(LogLine::parse("thread 'main' panicked at"), None);
    }

    #[test]
    fn midnight_is_no_obstacle() {
        let seconds = Duration::from_secs;
        assert_eq!(elapsed(seconds(10), seconds(12)), Some(seconds(2)));
        assert_eq!(elapsed(seconds(24 * 3600 - 1), seconds(1)), Some(seconds(2)));
        assert_eq!(elapsed(seconds(12), seconds(10)), None);
    }
}
