//! What there is to set: one entry per key that was read.

use std::fmt::Write;

use crate::mistake::Origin;

/// One key, as `--print-config` and the reference show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Dotted: `broker.port`.
    pub key: String,
    /// The environment variable that sets it.
    pub variable: String,
    /// One line on what it does, its unit included.
    pub help: String,
    /// The text of the default; nothing if there is none.
    pub default: Option<String>,
    /// The text of the value in force; nothing if there is none.
    pub value: Option<String>,
    /// Where that came from.
    pub origin: Origin,
}

/// Writes `entries` as a TOML file that sets nothing: every key commented out with its default.
pub(crate) fn reference(entries: &[Entry]) -> String {
    render(entries, |text, entry, name| {
        let default = entry.default.as_deref().map_or("…".to_owned(), toml_value);
        let _ = writeln!(text, "# {} ({})\n# {name} = {default}", entry.help, entry.variable);
    })
}

/// Writes `entries` as a TOML file that sets every key to the value in force.
pub(crate) fn effective(entries: &[Entry]) -> String {
    render(entries, |text, entry, name| {
        let _ = match &entry.value {
            Some(value) => writeln!(text, "{name} = {} # {}", toml_value(value), entry.origin),
            None => writeln!(text, "# {name} is not set"),
        };
    })
}

fn render(entries: &[Entry], write_entry: impl Fn(&mut String, &Entry, &str)) -> String {
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by_key(|entry| split(&entry.key).0);
    let mut text = String::new();
    let mut current = None;
    for entry in entries {
        let (section, name) = split(&entry.key);
        if current != Some(section) {
            let separator = if current.is_some() { "\n" } else { "" };
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "{separator}[{section}]");
            current = Some(section);
        }
        write_entry(&mut text, entry, name);
    }
    text
}

fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}

/// Numbers and truth values stand bare, all else in quotes.
fn toml_value(text: &str) -> String {
    let is_bare = text.parse::<i64>().is_ok()
        || text.parse::<bool>().is_ok()
        || text.parse::<f64>().is_ok_and(f64::is_finite);
    if is_bare { text.to_owned() } else { format!("{text:?}") }
}
