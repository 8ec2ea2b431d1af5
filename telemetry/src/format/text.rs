//! `18:28:54.123Z  INFO transport  bound endpoint=tcp://127.0.0.1:19283`

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::write_spans;

/// Short aligned lines: time of day in UTC, level, crate, spans, message and fields.
pub(crate) struct TextFormat;

impl<S, N> FormatEvent<S, N> for TextFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let (dim, plain) = if line.has_ansi_escapes() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
        let colour = if line.has_ansi_escapes() { colour(*metadata.level()) } else { "" };
        let crate_name = crate_name(metadata.target());
        write!(line, "{dim}{}{plain} ", TimeOfDay::now())?;
        write!(line, "{colour}{:>5}{plain} ", metadata.level().as_str())?;
        write!(line, "{dim}{crate_name:<10}{plain} ")?;
        let mut spans = String::new();
        write_spans(&mut spans, context)?;
        if !spans.is_empty() {
            write!(line, "{dim}{spans}:{plain} ")?;
        }
        context.format_fields(line.by_ref(), event)?;
        writeln!(line)
    }
}

/// The time of day in UTC, to the millisecond.
struct TimeOfDay {
    ms: u128,
}

impl TimeOfDay {
    fn now() -> Self {
        const DAY_MS: u128 = 24 * 60 * 60 * 1_000;
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { ms: since_epoch.as_millis() % DAY_MS }
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.ms / 1_000;
        let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
        let (seconds, ms) = (seconds % 60, self.ms % 1_000);
        write!(formatter, "{hours:02}:{minutes:02}:{seconds:02}.{ms:03}Z")
    }
}

/// Shortens a target such as `luna_transport::router::task` to `transport`.
fn crate_name(target: &str) -> &str {
    let first = target.split("::").next().unwrap_or(target);
    first.strip_prefix("luna_").unwrap_or(first)
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG => "\x1b[34m",
        Level::TRACE => "\x1b[35m",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_has_milliseconds() {
        assert_eq!(TimeOfDay { ms: 0 }.to_string(), "00:00:00.000Z");
        assert_eq!(TimeOfDay { ms: 86_399_999 }.to_string(), "23:59:59.999Z");
    }

    #[test]
    fn a_target_is_shortened_to_its_crate() {
        assert_eq!(crate_name("luna_transport::router::task"), "transport");
        assert_eq!(crate_name("luna"), "luna");
        assert_eq!(crate_name("tokio::net"), "tokio");
    }
}
