//! How one event becomes one line.

mod json;
mod text;

pub(crate) use json::JsonFormat;
pub(crate) use text::TextFormat;

use std::fmt;

use tracing::Subscriber;
use tracing_subscriber::fmt::{FmtContext, FormatFields, FormattedFields};
use tracing_subscriber::registry::{LookupSpan, Scope};

/// Writes the spans around the event from the outside in: `request{id=7}:load{adapter=ab}`.
fn write_spans<S, N>(line: &mut dyn fmt::Write, context: &FmtContext<'_, S, N>) -> fmt::Result
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let spans = context.event_scope().into_iter().flat_map(Scope::from_root);
    for (index, span) in spans.enumerate() {
        let separator = if index == 0 { "" } else { ":" };
        write!(line, "{separator}{}", span.name())?;
        let extensions = span.extensions();
        if let Some(fields) = extensions.get::<FormattedFields<N>>().filter(|it| !it.is_empty()) {
            write!(line, "{{{fields}}}")?;
        }
    }
    Ok(())
}
