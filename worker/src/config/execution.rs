//! Settings about execution: how stacks are applied, and how many requests at once.

use clap::Args;
use protocol::{ExecutionMode, Fidelity};
use settings::{Reader, Settings, within};

use super::memory::MB_MAX;
use crate::execution::ModeSettings;

/// Megabytes for merged weights unless told otherwise: one hot stack on all of CLIP-L.
const MERGED_MB_DEFAULT: u64 = 512;

/// Flags about execution.
#[derive(Debug, Default, Args)]
pub(super) struct ExecutionFlags {
    /// Requests that are computed at once
    #[arg(long, value_name = "N")]
    lanes: Option<String>,
    /// How adapters are applied unless a request says: auto, locking or functional
    #[arg(long, value_name = "MODE")]
    execution_mode: Option<String>,
    /// How merged weights are rounded unless a request says: comfyui or exact
    #[arg(long, value_name = "FIDELITY")]
    fidelity: Option<String>,
    /// Memory for merged weights of stacks that come again; 0 keeps none
    #[arg(long, value_name = "MB")]
    merged_budget_mb: Option<String>,
}

/// How requests are executed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExecutionConfig {
    /// Requests that are computed at once.
    pub(crate) lanes: usize,
    /// What requests get that ask for nothing else.
    pub(crate) modes: ModeSettings,
}

impl ExecutionFlags {
    /// Puts what was given on the command line over the other sources.
    pub(super) fn set(&self, settings: Settings) -> Settings {
        settings
            .set_if("worker.lanes", self.lanes.as_ref())
            .set_if("worker.execution_mode", self.execution_mode.as_ref())
            .set_if("worker.fidelity", self.fidelity.as_ref())
            .set_if("worker.merged_budget_mb", self.merged_budget_mb.as_ref())
    }
}

impl ExecutionConfig {
    pub(super) fn read(reader: &mut Reader) -> Self {
        let lanes =
            reader.get("worker.lanes", "requests that are computed at once", 1, within(1..=64));
        let mode = reader.get(
            "worker.execution_mode",
            "how adapters are applied unless a request says",
            ExecutionMode::Auto,
            |mode| is_offered(*mode),
        );
        let fidelity = reader.get(
            "worker.fidelity",
            "how merged weights are rounded unless a request says",
            Fidelity::Comfyui,
            |fidelity| has_fidelity(*fidelity),
        );
        let merged_mb: u64 = reader.get(
            "worker.merged_budget_mb",
            "memory for merged weights of stacks that come again",
            MERGED_MB_DEFAULT,
            within(0..=MB_MAX),
        );
        let modes = ModeSettings { mode, fidelity, merged_budget_bytes: merged_mb << 20 };
        Self { lanes, modes }
    }
}

fn is_offered(mode: ExecutionMode) -> Result<(), String> {
    match mode {
        ExecutionMode::Auto | ExecutionMode::Locking | ExecutionMode::Functional => Ok(()),
        ExecutionMode::Batched => Err("write auto, locking or functional".to_owned()),
    }
}

fn has_fidelity(fidelity: Fidelity) -> Result<(), String> {
    match fidelity {
        Fidelity::Comfyui | Fidelity::Exact => Ok(()),
        Fidelity::Fast => Err("write comfyui or exact".to_owned()),
    }
}
