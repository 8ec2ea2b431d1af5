//! The mode and the fidelity of a job: its own, or else the worker's.

use protocol::{ExecutionMode, Fidelity, request::EncodeOptions};

use super::{
    EncodeError, EncodeJob, Encoding, functional,
    job::CheckedJob,
    locking,
    merged_cache::{MergedCache, MergedStatistics},
    stage::Tally,
};
use crate::model::LoadedModel;

/// What a worker does for jobs that ask for nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeSettings {
    /// How stacks are applied.
    pub mode: ExecutionMode,
    /// How merged weights are rounded.
    pub fidelity: Fidelity,
    /// Memory for merged weights of stacks that come again; 0 keeps none.
    pub merged_budget_bytes: u64,
}

impl Default for ModeSettings {
    /// The worker chooses, merges as ComfyUI does, and keeps no merged weights.
    fn default() -> Self {
        Self { mode: ExecutionMode::Auto, fidelity: Fidelity::Comfyui, merged_budget_bytes: 0 }
    }
}

/// All execution modes of a worker, for any number of lanes at once.
#[derive(Debug)]
pub struct Modes {
    settings: ModeSettings,
    cache: MergedCache,
}

/// What this version cannot run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// The mode.
    #[error("this version does not run mode `{0}`: ask for `functional`, `locking` or `auto`")]
    Mode(ExecutionMode),
    /// The fidelity.
    #[error("this version does not have fidelity `{0}`: ask for `comfyui` or `exact`")]
    Fidelity(Fidelity),
}

/// How a job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runner {
    Functional,
    Locking,
}

impl Modes {
    /// All modes, with these settings.
    pub fn new(settings: ModeSettings) -> Self {
        Self { settings, cache: MergedCache::new(settings.merged_budget_bytes) }
    }

    /// Encodes every prompt of `job` with its stack.
    ///
    /// # Errors
    /// When the job does not fit the model, asks for what this version does not have or was
    /// interrupted, or when the device fails.
    pub fn encode(&self, model: &LoadedModel, job: &EncodeJob) -> Result<Encoding, EncodeError> {
        let mode = job.options.mode.unwrap_or(self.settings.mode);
        let fidelity = job.options.fidelity.unwrap_or(self.settings.fidelity);
        let runner = runner(mode)?;
        check_fidelity(fidelity)?;
        let checked = CheckedJob::check(model, job, fidelity)?;
        let tally = Tally::default();
        let watch = || {
            if job.interrupt.is_set() {
                candle_core::bail!("interrupted");
            }
            Ok(())
        };
        let passed = match runner {
            Runner::Functional => functional::encode(&checked, &self.cache, &watch, &tally),
            Runner::Locking => locking::encode(&checked, &watch, &tally),
        };
        // Whatever else went wrong as well, nobody waits for it any more.
        let passed = passed.map_err(|error| {
            if job.interrupt.is_set() { EncodeError::Interrupted } else { error.into() }
        })?;
        let merged_weights = (!checked.changes_nothing()).then(|| tally.merged_weights());
        if let (Runner::Functional, Some(merged)) = (runner, merged_weights) {
            self.cache.count(merged);
        }
        Ok(Encoding {
            conditionings: passed.conditionings,
            stack: checked.stack.applied,
            hook_stacks: passed.hook_stacks,
            mode: runner.mode(),
            fidelity,
            merged_weights,
        })
    }

    /// What the cache of merged weights has done so far.
    pub fn merged_statistics(&self) -> MergedStatistics {
        self.cache.statistics()
    }
}

impl Runner {
    const fn mode(self) -> ExecutionMode {
        match self {
            Self::Functional => ExecutionMode::Functional,
            Self::Locking => ExecutionMode::Locking,
        }
    }
}

/// Refuses options that no worker of this version can honour.
///
/// # Errors
/// The first of them.
pub fn check_supported(options: &EncodeOptions) -> Result<(), Unsupported> {
    options.mode.map_or(Ok(()), |mode| runner(mode).map(drop))?;
    options.fidelity.map_or(Ok(()), check_fidelity)
}

fn runner(mode: ExecutionMode) -> Result<Runner, Unsupported> {
    match mode {
        ExecutionMode::Auto | ExecutionMode::Functional => Ok(Runner::Functional),
        ExecutionMode::Locking => Ok(Runner::Locking),
        ExecutionMode::Batched => Err(Unsupported::Mode(mode)),
    }
}

fn check_fidelity(fidelity: Fidelity) -> Result<(), Unsupported> {
    match fidelity {
        Fidelity::Comfyui | Fidelity::Exact => Ok(()),
        Fidelity::Fast => Err(Unsupported::Fidelity(fidelity)),
    }
}
