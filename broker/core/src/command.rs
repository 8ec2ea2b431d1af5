//! What the broker wants done, as data.

use bytes::Bytes;
use protocol::{Failure, ModelDigest, ModelName, WorkerName};

use crate::{
    blob::{BlobCommand, BlobName},
    peer::{ClientPeer, WorkerPeer},
};

/// One thing to do; the shell does them in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Send a message to a client; it is dropped when the client has left.
    SendClient {
        /// The connection.
        to: ClientPeer,
        /// The whole message, delimiter included where the request had one.
        frames: Vec<Bytes>,
    },
    /// Send a message to a worker; it is dropped when the worker has left.
    SendWorker {
        /// The connection.
        to: WorkerPeer,
        /// The whole message.
        frames: Vec<Bytes>,
    },
    /// Have the blob store do something; it answers with one event for the ticket.
    Blob(BlobCommand),
    /// Tell the operator.
    Notice(Notice),
}

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A worker announced itself.
    WorkerReady {
        /// Its name.
        worker: WorkerName,
        /// Its connection.
        peer: WorkerPeer,
        /// Requests it takes at once.
        slots: usize,
        /// How many models it serves.
        models: usize,
    },
    /// A worker takes no new requests from now on, or takes them again.
    WorkerDraining {
        /// Its name.
        worker: WorkerName,
        /// Whether it drains.
        draining: bool,
        /// Why, if that was said.
        reason: Option<String>,
    },
    /// The broker takes nothing new because an operator said so, or takes requests again.
    BrokerDraining {
        /// Why it drains, if it does.
        reason: Option<String>,
    },
    /// Others fetch what a draining worker alone has in memory.
    HandingOver {
        /// The draining worker.
        worker: WorkerName,
        /// How many adapters.
        adapters: usize,
    },
    /// A worker said goodbye.
    WorkerLeft {
        /// Its name.
        worker: WorkerName,
        /// Requests that go to others.
        handed_over: usize,
    },
    /// A worker is gone without a goodbye.
    WorkerLost {
        /// Its name.
        worker: WorkerName,
        /// How that was noticed.
        reason: &'static str,
        /// Requests that it had.
        in_flight: usize,
    },
    /// A worker does not hold what it was given; the request goes out again.
    DispatchLost {
        /// The worker's name.
        worker: WorkerName,
        /// The dispatch that got lost.
        dispatch: u64,
    },
    /// A worker sent something that cannot be understood.
    WorkerGarbage {
        /// Its connection.
        peer: WorkerPeer,
        /// What is wrong with it.
        reason: String,
    },
    /// The blob store let go of an adapter or of a model's file.
    BlobDropped {
        /// What is gone.
        blob: BlobName,
        /// Why.
        reason: String,
    },
    /// The blob store works again, or why it does not.
    BlobStore {
        /// What is wrong, when something is.
        trouble: Option<String>,
    },
    /// A name stands for a model from now on.
    ModelRegistered {
        /// The name.
        model: ModelName,
        /// The model.
        digest: ModelDigest,
        /// The first worker that serves it.
        worker: WorkerName,
    },
    /// A worker serves another model under a registered name, and is not used for it.
    ModelConflict {
        /// The worker.
        worker: WorkerName,
        /// The name.
        model: ModelName,
        /// The worker's model.
        found: ModelDigest,
        /// The registered model.
        registered: ModelDigest,
    },
    /// A worker cannot serve a registered model; it is not asked again until it restarts.
    RegistrationFailed {
        /// The worker.
        worker: WorkerName,
        /// The model.
        model: ModelName,
        /// Why not.
        failure: Failure,
    },
    /// What is registered is not kept for the next start.
    RegistrationsNotSaved {
        /// Why not.
        reason: String,
    },
}
