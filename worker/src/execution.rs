//! Executing a job: a model, prompts, and a stack of adapters that applies to this job alone.
//!
//! [`Modes`] runs a job in the mode and with the fidelity that it or the worker asks for. A mode is
//! one way to apply a stack; all of them work on a `CheckedJob`, give the same
//! conditioning within the documented tolerances, and none changes what another job sees:
//!
//! * `functional` builds the patched weights beside the model, and keeps those of hot stacks;
//! * `locking` puts them in the model's place under its lock, and the originals back at the end.
//!
//! In both, hook stacks are further patches on top, seen by their own prompts alone.

mod functional;
mod job;
mod locking;
mod merge;
mod merged_cache;
mod modes;
mod pass;
pub mod stack;
mod stage;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use adapter::PatchSet;
use protocol::{
    AdapterId, Component, ErrorCode, ExecutionMode, Family, Fidelity, MergedWeights,
    request::EncodeOptions,
};

use crate::{
    conditioning::{Conditioning, InvalidOptions, InvalidTokens, PromptTokens},
    interrupt::Interrupt,
};

pub use merged_cache::MergedStatistics;
pub use modes::{ModeSettings, Modes, Unsupported, check_supported};
pub use stack::{Applied, FailedPatch, StackError};

/// What to encode.
#[derive(Debug, Clone)]
pub struct EncodeJob {
    /// One result for each. All have tokens for the same components: those of the model, or some.
    pub prompts: Vec<EncodePrompt>,
    /// Adapters in order of application, the same for all prompts.
    pub stack: Vec<StackEntry>,
    /// Which hidden state, pooled output and weighting; mode, fidelity and matching.
    pub options: EncodeOptions,
    /// Set when nobody wants the result any more; looked at before every use of a weight.
    pub interrupt: Interrupt,
}

impl EncodeJob {
    /// A job without hook stacks, with ComfyUI's options.
    pub fn new(prompts: impl IntoIterator<Item = PromptTokens>, stack: Vec<StackEntry>) -> Self {
        Self {
            prompts: prompts.into_iter().map(EncodePrompt::from).collect(),
            stack,
            options: EncodeOptions::default(),
            interrupt: Interrupt::default(),
        }
    }
}

/// One prompt of a job.
#[derive(Debug, Clone)]
pub struct EncodePrompt {
    /// What to encode.
    pub tokens: PromptTokens,
    /// Adapters on top of the job's stack for this prompt alone: they change the weights as the
    /// stack left them, rounded, and the result is rounded again.
    pub hook_stack: Vec<StackEntry>,
}

impl From<PromptTokens> for EncodePrompt {
    /// A prompt without a hook stack.
    fn from(tokens: PromptTokens) -> Self {
        Self { tokens, hook_stack: Vec::new() }
    }
}

/// An adapter and how strongly it applies.
#[derive(Debug, Clone)]
pub struct StackEntry {
    /// The adapter's name.
    pub id: AdapterId,
    /// Its patches.
    pub adapter: Arc<PatchSet>,
    /// Factor on the adapter's change of a weight.
    pub strength_patch: f64,
    /// Factor on the weight before the change.
    pub strength_model: f64,
}

/// What a job gave.
#[derive(Debug, Clone)]
pub struct Encoding {
    /// One for every prompt, in order.
    pub conditionings: Vec<Conditioning>,
    /// One for every entry of the stack, in order.
    pub stack: Vec<Applied>,
    /// For every prompt, one for every entry of its hook stack.
    pub hook_stacks: Vec<Vec<Applied>>,
    /// The mode that ran.
    pub mode: ExecutionMode,
    /// How merged weights were rounded.
    pub fidelity: Fidelity,
    /// Whether all merged weights were there already; nothing when no weight was changed.
    pub merged_weights: Option<MergedWeights>,
}

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A prompt does not have the components of the others.
    #[error("prompt {prompt} has tokens for other components than prompt 0: send the same for all")]
    UnequalPrompts {
        /// Index of the prompt.
        prompt: usize,
    },
    /// A prompt has no tokens at all.
    #[error("prompt 0 has tokens for no component: send those of family `{family}`")]
    NoComponents {
        /// The model's family.
        family: Family,
    },
    /// A prompt has tokens for a component that the model does not have.
    #[error("prompt 0 has tokens for `{component}`, which family `{family}` does not have")]
    Component {
        /// The component.
        component: Component,
        /// The model's family.
        family: Family,
    },
    /// Tokens that an encoder cannot take.
    #[error(transparent)]
    Tokens(#[from] InvalidTokens),
    /// Options that the model cannot honour.
    #[error(transparent)]
    Options(#[from] InvalidOptions),
    /// An adapter that does not fit the model.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// A mode or fidelity that this version does not have.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The job's [`Interrupt`] was set.
    #[error("the request was interrupted while it was encoded")]
    Interrupted,
    /// The device failed, for example for want of memory.
    #[error("the device failed while encoding")]
    Device(#[from] candle_core::Error),
}

impl EncodeError {
    /// The code that travels on the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::UnequalPrompts { .. }
            | Self::NoComponents { .. }
            | Self::Component { .. }
            | Self::Tokens(_)
            | Self::Options(_) => ErrorCode::InvalidRequest,
            Self::Stack(error) => error.code(),
            Self::Unsupported(_) => ErrorCode::Unsupported,
            Self::Interrupted => ErrorCode::Cancelled,
            Self::Device(_) => ErrorCode::Internal,
        }
    }
}
