//! Logs of every Luna process: `tracing` events as text for people or JSON for machines.
//!
//! Logs go to stderr, so that stdout stays free for answers. `LUNA_LOG` filters them with the
//! directives of [`tracing_subscriber::EnvFilter`] (`debug`, `info,luna_transport=trace`, …);
//! `LUNA_LOG_FORMAT` is `text` or `json`. Metrics are not here.
//!
//! # Policy
//!
//! | level | for | example |
//! |---|---|---|
//! | ERROR | something that was promised failed | a model cannot be loaded |
//! | WARN | somebody should look, today | a peer that does not read was disconnected |
//! | INFO | a state changed | bound, connected, worker ready, draining, closed |
//! | DEBUG | why a state did or did not change | an attempt to connect failed |
//! | TRACE | one request, one message | a request was routed |
//!
//! What happens per request is TRACE, so that the log of a busy farm stays readable and cheap.
//! **Text of prompts never appears above TRACE**: it belongs to the artist, and logs travel.
//! Values go into fields, not into the message: `info!(%endpoint, "bound")`.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use luna_telemetry::LogConfig;
//!
//! luna_telemetry::init(&LogConfig::from_vars("luna-broker", std::env::vars_os())?)?;
//! tracing::info!(version = "0.1.0", "started");
//! # Ok(())
//! # }
//! ```

mod config;
mod format;
mod panic;

pub use config::{FILTER_VARIABLE, FORMAT_VARIABLE, InvalidLogConfig, LogConfig, LogFormat};

use std::io::{IsTerminal, stderr};

use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Registry, fmt};

use format::{JsonFormat, TextFormat};

/// Why logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter is no list of directives.
    #[error("log filter `{filter}`: write directives such as `info` or `info,luna_broker=debug`")]
    InvalidFilter {
        /// The filter as given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The process already has a global subscriber.
    #[error("logging is started already")]
    AlreadyStarted(#[from] TryInitError),
}

/// Starts logging for the whole process and logs every panic from now on. Call it once, first.
///
/// # Errors
/// [`InitError`]; nothing is started then.
pub fn init(config: &LogConfig) -> Result<(), InitError> {
    let use_colour = stderr().is_terminal() && !config.is_colour_refused;
    subscriber(config, stderr, use_colour)?.try_init()?;
    panic::install_hook();
    Ok(())
}

/// Builds what `init` installs, around any writer.
fn subscriber<W>(
    config: &LogConfig,
    writer: W,
    use_colour: bool,
) -> Result<Box<dyn Subscriber + Send + Sync>, InitError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&config.filter);
    let filter = filter.map_err(|source| {
        let filter = config.filter.clone();
        InitError::InvalidFilter { filter, source }
    })?;
    let registry = Registry::default().with(filter);
    let layer = fmt::layer().with_writer(writer);
    Ok(match config.format {
        LogFormat::Text => {
            Box::new(registry.with(layer.with_ansi(use_colour).event_format(TextFormat)))
        }
        LogFormat::Json => {
            let format = JsonFormat::new(&config.name);
            Box::new(registry.with(layer.with_ansi(false).event_format(format)))
        }
    })
}

#[cfg(test)]
mod tests;
