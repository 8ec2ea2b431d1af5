//! The command line of the broker.

use std::path::PathBuf;

use clap::Parser;

/// A Luna broker: takes requests of clients to workers, and keeps the LoRAs of the farm.
///
/// Settings come from flags, else from `LUNA_BROKER_*`, else from the table `[broker]` of the
/// configuration file, else from defaults. `--check-config` shows all of them.
#[derive(Debug, Default, Parser)]
#[command(name = "luna-broker", version)]
pub(crate) struct Flags {
    /// Configuration file (TOML)
    #[arg(long, env = "LUNA_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Check the settings, print them and exit
    #[arg(long)]
    pub(crate) check_config: bool,
    /// Where to listen for clients
    #[arg(long, value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// Where to listen for workers; else the next port, or the same path with `.workers`
    #[arg(long, value_name = "URL")]
    pub(crate) worker_endpoint: Option<String>,
    /// Directory for uploaded LoRAs and models
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// Megabytes of all uploaded files of models [default: 32768]
    #[arg(long, value_name = "MB")]
    pub(crate) model_store_mb: Option<String>,
    /// Workers that fetch a LoRA as soon as it is uploaded; 0 for none [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) fan_out: Option<String>,
    /// How long requests in hand may take when the broker is told to stop, for example 30s
    #[arg(long, value_name = "TIME")]
    pub(crate) grace: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) log_format: Option<String>,
    /// Stop when standard input closes, so that a supervisor that dies takes this process along
    #[arg(long)]
    pub(crate) exit_on_stdin_eof: bool,
}
