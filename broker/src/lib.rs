//! The broker process: sockets, blob store and event loop around the pure core.
//!
//! What the broker *decides* is in `broker-core`; here are the two ROUTERs, the disk, the clock
//! and the signals. [`main_with_args`] is the whole process, for the `luna-broker` executable and
//! for `luna broker`; [`Server`] is the part of it that serves, for programs that embed a broker.

mod blob_store;
mod config;
mod event_loop;
mod flags;
mod notice;
mod peers;
mod run;
mod server;

pub use blob_store::{DiskError, StoreError};
pub use config::{BrokerConfig, NoWorkerEndpoint, worker_endpoint_of};
pub use run::main_with_args;
pub use server::{Server, StartError};
