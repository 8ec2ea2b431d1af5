//! The commands, one file each.

pub(crate) mod demo;
pub(crate) mod encode;
pub(crate) mod fixtures;
pub(crate) mod lora;
pub(crate) mod model;
pub(crate) mod status;

use luna_client::Client;

use crate::args::FarmArgs;

/// A client of the farm that the command line names.
pub(crate) async fn connect(farm: &FarmArgs) -> anyhow::Result<Client> {
    let client =
        Client::builder().endpoint(&farm.endpoint).timeout(farm.timeout.0).connect().await?;
    Ok(client)
}
