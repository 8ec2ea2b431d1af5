//! A broker with its sockets bound and its store open, ready to serve.

use std::{
    fs::File,
    io::{self, Read as _},
    time::Instant,
};

use broker_core::{BlobEvent, Broker, ClientPeer, WorkerPeer};
use tracing::info;
use transport::{BindError, Endpoint, QueueLimits, Router, RouterConfig};

use crate::{
    BrokerConfig,
    blob_store::{BlobStore, StoreError, StoreThread},
    event_loop::{EventLoop, Side},
};

/// Bytes of the largest message; no reply within the limits of the protocol is larger.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Bytes that the header of the broker adds to a client's message on its way to a worker.
const WORK_BYTES_MAX: usize = 1 << 10;

/// A broker that is bound and has not begun to serve.
#[derive(Debug)]
pub struct Server {
    event_loop: EventLoop,
    endpoint: Endpoint,
    worker_endpoint: Endpoint,
}

/// Why a broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The blob store cannot be opened.
    #[error("cannot open the blob store")]
    Store(#[from] StoreError),
    /// A socket cannot be bound.
    #[error("cannot listen for {whom}")]
    Bind {
        /// Clients or workers.
        whom: &'static str,
        /// Why not.
        source: BindError,
    },
    /// The system gives no thread or no random number.
    #[error("cannot start")]
    Io(#[from] io::Error),
}

impl Server {
    /// Opens the store and binds both sockets. Blocks for the few milliseconds that this takes.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind.
    pub fn bind(config: &BrokerConfig) -> Result<Self, StartError> {
        let (store, found) = BlobStore::open(&config.store)?;
        let (adapters, models) = (found.adapters.len(), found.registrations.len());
        let now = Instant::now();
        let mut broker = Broker::new(config.core.clone(), random()?, now);
        // Registrations first: they say which files of models have to stay.
        let registrations = found.registrations.into_iter().map(BlobEvent::FoundRegistration);
        let files = found.model_files.into_iter().map(BlobEvent::FoundModelFile);
        let adapters_found = found.adapters.into_iter().map(BlobEvent::Found);
        let parts = found.parts.into_iter().map(BlobEvent::FoundPart);
        for event in registrations.chain(files).chain(adapters_found).chain(parts) {
            broker.handle_blob(event, now);
        }
        let clients = bind("clients", &config.endpoint, router("luna-clients", 0))?;
        let workers =
            bind("workers", &config.worker_endpoint, router("luna-workers", WORK_BYTES_MAX))?;
        let store = StoreThread::spawn(store, config.core.limits().store_commands_max)?;
        let (endpoint, worker_endpoint) = (clients.endpoint().clone(), workers.endpoint().clone());
        info!(
            clients = %endpoint,
            workers = %worker_endpoint,
            store = %config.store.display(),
            adapters,
            models,
            "listening"
        );
        let event_loop = EventLoop::new(
            broker,
            Side::new(clients.split(), ClientPeer::new),
            Side::new(workers.split(), WorkerPeer::new),
            store,
            config.grace,
        );
        Ok(Self { event_loop, endpoint, worker_endpoint })
    }

    /// Where clients connect; port 0 has become the real one.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Where workers connect; port 0 has become the real one.
    pub fn worker_endpoint(&self) -> &Endpoint {
        &self.worker_endpoint
    }

    /// Serves until `shutdown` resolves with a reason and what was accepted is answered.
    ///
    /// # Errors
    /// When a socket or the store has failed for good.
    pub async fn serve(self, shutdown: impl Future<Output = String>) -> anyhow::Result<()> {
        self.event_loop.run(shutdown).await
    }
}

fn router(thread_name: &'static str, extra: usize) -> RouterConfig {
    let defaults = RouterConfig::default();
    RouterConfig {
        thread_name,
        message_bytes_max: MESSAGE_BYTES_MAX + extra,
        // A client that asks for much at once has several large replies under way.
        peer_queue: QueueLimits { bytes_max: 4 * MESSAGE_BYTES_MAX, ..defaults.peer_queue },
        ..defaults
    }
}

fn bind(
    whom: &'static str,
    endpoint: &Endpoint,
    config: RouterConfig,
) -> Result<Router, StartError> {
    Router::bind(endpoint, config).map_err(|source| StartError::Bind { whom, source })
}

/// A random number for this process.
fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests;
