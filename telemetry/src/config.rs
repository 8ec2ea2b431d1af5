//! What is logged and how, from the environment.

use std::ffi::OsString;
use std::str::FromStr;

/// The environment variable that holds the filter.
pub const FILTER_VARIABLE: &str = "LUNA_LOG";

/// The environment variable that holds the format.
pub const FORMAT_VARIABLE: &str = "LUNA_LOG_FORMAT";

/// How one process logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// The name of the process, such as `luna-worker@0`; the field `process` of JSON logs.
    pub name: String,
    /// Text unless told otherwise.
    pub format: LogFormat,
    /// Directives of `EnvFilter`; `info` unless told otherwise.
    pub filter: String,
    /// Whether colour is unwanted even on a terminal (`NO_COLOR` is set).
    pub is_colour_refused: bool,
}

/// For whom the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// A short aligned line per event, with colour on a terminal.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// A setting of the log that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log format `{value}`: write `text` or `json`")]
pub struct InvalidLogConfig {
    value: String,
}

impl LogConfig {
    /// Logs text at INFO.
    pub fn new(name: impl Into<String>) -> Self {
        let format = LogFormat::default();
        Self { name: name.into(), format, filter: "info".to_owned(), is_colour_refused: false }
    }

    /// Reads `LUNA_LOG`, `LUNA_LOG_FORMAT` and `NO_COLOR` from `vars`; empty ones count as absent.
    ///
    /// # Errors
    /// [`InvalidLogConfig`] if the format is unknown. The filter is checked by [`crate::init`].
    pub fn from_vars(
        name: impl Into<String>,
        vars: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, InvalidLogConfig> {
        let mut config = Self::new(name);
        for (key, value) in vars.into_iter().filter(|(_, value)| !value.is_empty()) {
            if key == FILTER_VARIABLE {
                config.filter = value.to_string_lossy().into_owned();
            } else if key == FORMAT_VARIABLE {
                config.format = value.to_string_lossy().parse()?;
            } else if key == "NO_COLOR" {
                config.is_colour_refused = true;
            }
        }
        Ok(config)
    }
}

impl std::fmt::Display for LogFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = InvalidLogConfig;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(InvalidLogConfig { value: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_the_defaults() {
        let vars = [("LUNA_LOG", "debug"), ("LUNA_LOG_FORMAT", "json"), ("NO_COLOR", "1")];
        let config = from_vars(&vars).unwrap();
        assert_eq!(config.filter, "debug");
        assert_eq!(config.format, LogFormat::Json);
        assert!(config.is_colour_refused);
    }

    #[test]
    fn empty_and_foreign_variables_are_ignored() {
        let vars = [("LUNA_LOG", ""), ("LUNA_LOG_FORMAT", ""), ("NO_COLOR", ""), ("LOG", "trace")];
        assert_eq!(from_vars(&vars), Ok(LogConfig::new("luna")));
    }

    #[test]
    fn an_unknown_format_is_named() {
        let error = from_vars(&[("LUNA_LOG_FORMAT", "xml")]).unwrap_err();
        assert_eq!(error.to_string(), "log format `xml`: write `text` or `json`");
    }

    fn from_vars(vars: &[(&str, &str)]) -> Result<LogConfig, InvalidLogConfig> {
        LogConfig::from_vars("luna", vars.iter().map(|(key, value)| (key.into(), value.into())))
    }
}
