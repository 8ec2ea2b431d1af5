//! The core's notices as log lines.

use broker_core::Notice;
use tracing::{debug, info, warn};

/// Logs a notice at the level that the log policy of `telemetry` gives it.
pub(crate) fn log(notice: &Notice) {
    match notice {
        Notice::WorkerReady { worker, peer, slots, models } => {
            info!(%worker, %peer, slots, models, "worker ready");
        }
        Notice::WorkerDraining { worker, draining, reason } => {
            info!(%worker, draining, reason, "worker draining");
        }
        Notice::BrokerDraining { reason: Some(reason) } => info!(reason, "draining on order"),
        Notice::BrokerDraining { reason: None } => info!("taking requests again"),
        Notice::HandingOver { worker, adapters } => {
            info!(%worker, adapters, "others fetch what a draining worker alone has in memory");
        }
        Notice::WorkerLeft { worker, handed_over } => info!(%worker, handed_over, "worker left"),
        Notice::WorkerLost { worker, reason, in_flight } => {
            warn!(%worker, reason, in_flight, "worker lost");
        }
        Notice::DispatchLost { worker, dispatch } => {
            warn!(%worker, dispatch, "a request never arrived at the worker and goes out again");
        }
        Notice::WorkerGarbage { peer, reason } => {
            debug!(%peer, reason, "a worker's message cannot be understood");
        }
        Notice::BlobDropped { blob, reason } => info!(reason, "{blob} dropped from the blob store"),
        Notice::ModelRegistered { model, digest, worker } => {
            info!(%model, digest = digest.short(), first = %worker, "model registered");
        }
        Notice::ModelConflict { worker, model, found, registered } => {
            warn!(
                %worker, %model, found = found.short(), registered = registered.short(),
                "worker serves another model under a registered name and is not used for it"
            );
        }
        Notice::RegistrationFailed { worker, model, failure } => {
            warn!(%worker, %model, %failure, "worker cannot serve a registered model");
        }
        Notice::RegistrationsNotSaved { reason } => {
            warn!(reason, "what is registered is not kept for the next start");
        }
        Notice::BlobStore { trouble: Some(trouble) } => {
            warn!(trouble, "the blob store does not work");
        }
        Notice::BlobStore { trouble: None } => info!("the blob store works again"),
    }
}
