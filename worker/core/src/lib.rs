//! The worker's pure policy: adapter registry and scheduler.
//!
//! Drive it like this: feed an event to [`Scheduler`], then take commands with
//! [`Scheduler::poll_command`] until there are none, then sleep until the next event or
//! [`Scheduler::poll_timeout`]. Nothing here does I/O, reads a clock or knows a tensor.

mod fetch;
mod registry;
mod scheduler;

pub use fetch::{BadChunk, ChunkRequest, Fetches, Progress};
pub use registry::{OverBudget, Presence, Registry};
pub use scheduler::{Command, DispatchId, RunDispatch, Scheduler};
