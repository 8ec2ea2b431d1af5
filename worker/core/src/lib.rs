//! The worker's pure policy: adapters in tiers, models on demand, and a scheduler with lanes.
//!
//! Drive it like this: feed an event to [`Scheduler`], then take commands with
//! [`Scheduler::poll_command`] until there are none, then sleep until the next event or
//! [`Scheduler::poll_timeout`]. [`Fetches`] is driven alike, with
//! [`Fetches::poll_request`]. Nothing here does I/O, reads a clock or knows a tensor.

mod command;
mod fetch;
mod lanes;
mod models;
mod prefetches;
mod registry;
mod scheduler;
#[cfg(test)]
mod spelling;

pub use command::{Command, DispatchId, Place, RunDispatch};
pub use fetch::{Arrived, BadChunk, ChunkRequest, Fetches, Progress};
pub use models::{ModelOverBudget, Models};
pub use registry::{Counters, Origin, Registry, Tiers};
pub use scheduler::{Config, Needs, Scheduler};
