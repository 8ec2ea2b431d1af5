//! FUNCTIONAL: virtual weights for the stack of one job.
//!
//! Nothing shared changes, so any number of jobs may run at once; all that they wait for is a LOCKING
//! job on the same model. Merged weights of stacks that come again are kept in a [`MergedCache`].

use candle_core::Result;

use super::{
    job::CheckedJob,
    merged_cache::MergedCache,
    pass::{Common, Passed, base, stages, views},
    stage::{Tally, Watch},
};

/// Runs `job` on virtual weights.
///
/// # Errors
/// When the device fails or `watch` does.
pub(super) fn encode(
    job: &CheckedJob<'_>,
    cache: &MergedCache,
    watch: Watch<'_>,
    tally: &Tally,
) -> Result<Passed> {
    let held = job.model.read();
    let base = base(&held);
    let base = Common { job, below: &base, watch, tally };
    let stacked = stages(base, &job.stack, cache.keep(job, &held, &[&job.stack]));
    let stacked = views(&stacked);
    let common = Common { below: &stacked, ..base };
    common.run(|hooks| cache.keep(job, &held, &[&job.stack, hooks]))
}
