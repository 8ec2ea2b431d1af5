//! What no mode may do to a model, and what the weights are that a job sees.

mod isolation;
mod weights;

use protocol::Family;

use super::{EncodeJob, StackEntry, job::CheckedJob, modes::ModeSettings};
use crate::testing::{entry, prompt};

/// Enough for everything that a test keeps.
const BUDGET_BYTES: u64 = 1 << 30;

/// A prompt with a stack of two, and the same prompt with a hook stack on top.
fn job(family: Family) -> EncodeJob {
    let stack = vec![entry(family, "kohya", 0.8), entry(family, "loha", -0.5)];
    let mut job = EncodeJob::new([1125, 2368].map(|word| prompt(family, word)), stack);
    job.prompts[1].hook_stack = vec![entry(family, "lokr", 0.6)];
    job
}

fn with_stack(family: Family, stack: Vec<StackEntry>) -> EncodeJob {
    EncodeJob::new([prompt(family, 2368)], stack)
}

fn keeping() -> ModeSettings {
    ModeSettings { merged_budget_bytes: BUDGET_BYTES, ..ModeSettings::default() }
}
