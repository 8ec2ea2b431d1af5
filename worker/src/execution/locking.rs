//! LOCKING: the stack's weights take the place of the model's own while the job runs.
//!
//! The job has the model for itself. However it ends, the guards that attached the weights put the
//! originals back. Hooks are virtual weights on top, as other prompts of the job do not have them.

use std::collections::BTreeMap;

use candle_core::Result;
use protocol::Component;

use super::{
    job::CheckedJob,
    merged_cache::Kept,
    pass::{Common, Passed, base, views},
    stage::{Stage, Tally, Watch, Watched},
};
use crate::model::{Attachment, Parameters as _};

/// Runs `job` on attached weights; without any to attach, on the model's own.
///
/// # Errors
/// When the device fails or `watch` does.
pub(super) fn encode(job: &CheckedJob<'_>, watch: Watch<'_>, tally: &Tally) -> Result<Passed> {
    if job.stack.changes_nothing() {
        let held = job.model.read();
        return Common { job, below: &base(&held), watch, tally }.run(|_| Kept::new());
    }
    let mut model = job.model.attach();
    attach(job, &mut model, (watch, tally))?;
    Common { job, below: &views(&model), watch, tally }.run(|_| Kept::new())
}

/// Puts the merged weights of the job's stack in place of the model's.
pub(super) fn attach(
    job: &CheckedJob<'_>,
    model: &mut BTreeMap<Component, Attachment<'_>>,
    (watch, tally): (Watch<'_>, &Tally),
) -> Result<()> {
    for (component, attachment) in model {
        let Some(patches) = job.stack.patches.get(component) else { continue };
        let originals = attachment.originals().clone();
        let stage = Stage {
            below: &originals,
            patches: Some(patches),
            rounding: job.rounding,
            kept: None,
            tally,
        };
        let stage = Watched { below: &stage, watch };
        for parameter in patches.keys() {
            let merged = stage.parameter(*parameter)?;
            let merged = match originals.stored(*parameter) {
                Some(held) => merged.to_dtype(job.kept_dtype(held.dtype()))?,
                None => merged,
            };
            attachment.replace(*parameter, merged)?;
        }
    }
    Ok(())
}
