//! A simulator: the real broker, worker and client cores in virtual time, with faults.
//!
//! Nothing here is a model of the farm's logic. The cores are those of the programs, and they speak
//! to each other in the bytes of the wire. What is simulated is the world around them: time, network,
//! disks, executors, and processes that die, stop and come back. `broker`, `worker` and `client` are
//! the shells around the cores; each is the one place that knows how its core is driven.
//!
//! One run is one seed on one thread. Everything that is left to chance comes from one generator, and
//! events are ordered by time and then by the order in which they were planned, so that the same seed
//! gives the same run, event by event.
//!
//! A run has 8 s of storm, in which the faults of the seed happen, and 10 s of calm. Requests come
//! until 5 s of the calm are over.
//!
//! # Faults
//!
//! `kill -9` and restart of broker, workers and clients; hosts that lose power; `SIGSTOP`; partitions
//! of a worker, a client or the broker, in both directions or in one; connections that are reset with
//! everything under way; delays up to 400 ms; swizzle-clogging; a disk of the broker that is slow or
//! full; rotten copies on workers' disks; requests that kill the worker that runs them; requests and
//! answers that come twice. Every process has a clock of its own.
//!
//! # Invariants
//!
//! | | what | how it is checked |
//! |---|---|---|
//! | I1 | one outcome for every request, by its deadline | at every outcome of a client; the broker never answers more often than it was asked on a connection |
//! | I2 | an answer is that of its request | an answer is a hash of model, prompt, strengths and the tensors that were really used; runs without weights; uploads that become something else |
//! | I3 | nothing starts after it expired | by the worker's own clock, whenever a lane begins |
//! | I4 | a poison request takes at most three workers with it | at every such death and whenever a request is given out, by what is asked for: whoever sends it, however often, and whatever else fails. A broker that has restarted knows of earlier deaths when the workers are back |
//! | I5 | nothing is over its limit, and what is taken is given back | slots and lanes at every dispatch; broker and workers idle at the end |
//! | I6 | when faults end, everything goes on | 4 s into the calm every outcome is an answer; at its end nothing is open, every upload is done and no worker is missing. Where only brokers and connections break, no request is ever refused for good |
//! | I7 | the broker knows what workers hold | every second of the calm, for what has not changed for two heartbeats |
//! | I8 | no innocent is quarantined | whenever a request is refused because workers died of it: it kills workers, or a fault has just taken a worker, its connection or the broker |
//! | I9 | nobody gets what is meant for another | ids of replies at every client; there are no tenants yet |
//! | I11 | the same seed gives the same run | hashes of two runs |
//!
//! Not checked: I10, the share of retries.
//!
//! [`Mutant`]s are bugs on purpose in the wiring between the cores; a test shows that each is found.

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
