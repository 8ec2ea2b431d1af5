//! `{"timestamp":"…","level":"INFO","process":"luna-broker","target":"…","fields":{…}}`

use std::fmt;

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::write_spans;

/// One JSON object per line. `timestamp` is RFC 3339 in UTC; `fields` holds `message` and the
/// event's fields with their types; `spans` is there only inside a span.
pub(crate) struct JsonFormat {
    process: String,
}

impl JsonFormat {
    pub(crate) fn new(process: &str) -> Self {
        Self { process: process.to_owned() }
    }
}

impl<S, N> FormatEvent<S, N> for JsonFormat
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
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut object = json!({
            "timestamp": timestamp,
            "level": event.metadata().level().as_str(),
            "process": self.process,
            "target": event.metadata().target(),
            "fields": fields.0,
        });
        let mut spans = String::new();
        write_spans(&mut spans, context)?;
        if !spans.is_empty() {
            object["spans"] = Value::from(spans);
        }
        writeln!(line, "{object}")
    }
}

/// The fields of one event; whatever JSON has no type for becomes text.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn insert(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinity.
        if value.is_finite() {
            self.insert(field, value);
        } else {
            self.insert(field, value.to_string());
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.insert(field, value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}"));
    }
}
