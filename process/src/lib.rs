//! What Luna's long-running processes have in common: when they stop, and how they say why.
//!
//! It knows nothing of what the processes do.

pub mod exit;
mod shutdown;

pub use shutdown::shutdown_reason;
