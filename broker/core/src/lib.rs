//! The broker as a pure state machine.
//!
//! [`Broker`] takes what happened (messages of clients and workers, results of the blob store, the
//! time) and says what to do (messages to send, blobs to read and write) as [`Command`]s. The
//! process around it owns the sockets, the disk and the clock.
//!
//! ```text
//! clients ── handle_client ──▶ ┌────────┐ ── SendClient ──▶ clients
//! workers ── handle_worker ──▶ │ Broker │ ── SendWorker ──▶ workers
//! store ──── handle_blob ────▶ │        │ ── Blob ────────▶ store
//! clock ──── handle_timeout ─▶ └────────┘ ── poll_timeout ▶ clock
//! ```
//!
//! **Invariants.** A request that was accepted is queued, in flight or answered, and it is answered
//! once. Residency is a belief: a stale row costs a load, never a wrong embedding. The payload of a
//! request and of a reply is forwarded unread. Nothing here does I/O, reads a clock or draws random
//! numbers, so replaying the same events gives the same commands.

mod answers;
mod blob;
mod blobs;
mod broker;
mod command;
mod config;
pub mod cost;
mod deaths;
mod drains;
mod encode;
mod heat;
mod in_flight;
mod isolation;
mod jobs;
mod kept_parts;
mod lru;
mod model_files;
mod outliers;
mod peer;
mod prefetches;
mod queue;
mod raw_map;
mod registrations;
mod requests;
mod residency;
mod retries;
pub mod routing;
mod status;
mod strikes;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod uploads;
mod warms;
mod workers;

pub use blob::{
    BlobCommand, BlobEvent, BlobName, BlobOp, BlobOutcome, KeptPart, PartName, StoredBlob,
    StoredModelFile, Ticket,
};
pub use broker::Broker;
pub use command::{Command, Notice};
pub use config::{Config, InvalidConfig, Limits};
pub use outliers::Health;
pub use peer::{ClientPeer, WorkerPeer};
pub use registrations::{ModelSpec, Registration};
