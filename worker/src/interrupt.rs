//! A flag that stops work under way: set by the loop, looked at by a lane between two weights.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Shared between the one who may stop a job and the job.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks the job to stop; it does so at the next weight that it needs.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the job is to stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
