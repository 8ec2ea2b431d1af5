//! What is wrong with the settings: every mistake names the key, the value, its source, the reason.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The code.
    Default,
    /// A TOML file.
    File(PathBuf),
    /// The environment variable of this name.
    Environment(String),
    /// A flag.
    CommandLine,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The dotted key, or nothing if a whole source cannot be read.
    pub key: Option<String>,
    /// The text of the value, if there is one.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: Origin,
    /// Why it is a mistake and, where that is known, what to write.
    pub reason: String,
}

/// Every mistake found, in the order in which the keys were read; at least one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SettingsErrors {
    pub(crate) mistakes: Vec<Mistake>,
}

impl SettingsErrors {
    /// Returns the mistakes, at least one.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }
}

impl fmt::Display for SettingsErrors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mistakes.len() {
            1 => write!(formatter, "1 mistake in the settings:")?,
            count => write!(formatter, "{count} mistakes in the settings:")?,
        }
        self.mistakes.iter().try_for_each(|mistake| write!(formatter, "\n- {mistake}"))
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.key, &self.value) {
            (Some(key), Some(value)) => {
                let value = shortened(value);
                write!(formatter, "`{key}` is {value:?} ({}): {}", self.origin, self.reason)
            }
            (Some(key), None) => write!(formatter, "`{key}` ({}): {}", self.origin, self.reason),
            (None, _) => write!(formatter, "{}: {}", self.origin, self.reason),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(formatter, "default"),
            Self::File(path) => write!(formatter, "file `{}`", path.display()),
            Self::Environment(name) => write!(formatter, "environment variable {name}"),
            Self::CommandLine => write!(formatter, "command line"),
        }
    }
}

/// Cuts a value that would drown the message.
fn shortened(value: &str) -> String {
    const CHARS_MAX: usize = 200;
    match value.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let mistake = Mistake {
            key: Some("a.b".to_owned()),
            value: Some("ü".repeat(500)),
            origin: Origin::Default,
            reason: "too long".to_owned(),
        };
        let expected = format!("`a.b` is \"{}…\" (default): too long", "ü".repeat(200));
        assert_eq!(mistake.to_string(), expected);
    }
}
