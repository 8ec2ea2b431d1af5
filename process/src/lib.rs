//! What Luna's long-running processes have in common: when they stop, how they say why, and how many
//! files they may open.
//!
//! It knows nothing of what the processes do.

pub mod exit;
mod file_limit;
mod shutdown;

pub use file_limit::raise_file_limit;
pub use shutdown::shutdown_reason;
