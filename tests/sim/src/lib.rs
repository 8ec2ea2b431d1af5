//! A simulator: the real broker, worker and client cores in virtual time, with faults.
//!
//! Nothing here is a model of the farm's logic. The cores are those of the programs, and they speak
//! to each other in the bytes of the wire. What is simulated is the world around them: time, network,
//! disk, executor, and processes that die, stop and come back.
//!
//! One run is one seed on one thread. Everything that is left to chance comes from one generator, and
//! events are ordered by time and then by the order in which they were planned, so that the same seed
//! gives the same run, event by event.

mod blob_store;
mod broker;
mod catalog;
mod client;
mod dealer;
mod env;
mod event;
mod executor;
mod faults;
mod ledger;
mod mutant;
mod network;
mod plan;
mod random;
mod runner;
mod time;
mod trace;
mod upload;
mod wire;
mod worker;
mod world;

pub use ledger::{Counts, Violation};
pub use mutant::Mutant;
pub use runner::{Campaign, Summary, explain, run_seed};
pub use world::Report;
