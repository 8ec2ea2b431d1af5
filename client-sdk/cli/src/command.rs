//! The commands, one file each.

pub(crate) mod bench;
pub(crate) mod demo;
pub(crate) mod drain;
pub(crate) mod encode;
pub(crate) mod explain;
pub(crate) mod fixtures;
pub(crate) mod lora;
pub(crate) mod model;
pub(crate) mod status;
pub(crate) mod warm;

use std::time::Duration;

use luna_client::Client;

use crate::args::FarmArgs;

/// Longest time to look for a farm; the user's timeout where that is shorter.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(3);

/// A client of the farm that the command line names.
pub(crate) async fn connect(farm: &FarmArgs) -> Result<Client, luna_client::Error> {
    Client::builder()
        .endpoint(&farm.endpoint)
        .timeout(farm.timeout.0)
        .connect_timeout(farm.timeout.0.min(CONNECT_TIMEOUT_MAX))
        .connect()
        .await
}
