//! Executing a job: a model, prompts, and a stack of adapters that applies to this job alone.
//!
//! An [`Execution`] is one way to apply a stack. All of them check the stack first
//! ([`stack::CheckedStack`]), all give the same conditioning within the documented tolerances, and
//! none changes what another job sees.

pub mod functional;
mod merge;
pub mod stack;

use std::sync::Arc;

use adapter::PatchSet;
use protocol::{AdapterId, Component, ErrorCode, Family, request::EncodeOptions};

use crate::{
    conditioning::{Conditioning, InvalidOptions, InvalidTokens, PromptTokens, plan, rows},
    model::LoadedModel,
};

pub use functional::Functional;
pub use stack::{Applied, FailedPatch, StackError};

/// One way to apply a stack of adapters to a shared model.
pub trait Execution: Send + Sync {
    /// Encodes every prompt of `job` with its stack.
    ///
    /// # Errors
    /// When the job does not fit the model, or the device fails.
    fn encode(&self, model: &LoadedModel, job: &EncodeJob) -> Result<Encoding, EncodeError>;
}

/// What to encode.
#[derive(Debug, Clone)]
pub struct EncodeJob {
    /// One result for each. All have tokens for the same components: those of the model, or some.
    pub prompts: Vec<EncodePrompt>,
    /// Adapters in order of application, the same for all prompts.
    pub stack: Vec<StackEntry>,
    /// Which hidden state, pooled output and weighting.
    pub options: EncodeOptions,
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
            Self::Device(_) => ErrorCode::Internal,
        }
    }
}

/// Checks the tokens and options of `job` against `model`.
fn checked_plan(model: &LoadedModel, job: &EncodeJob) -> Result<plan::Plan, EncodeError> {
    let family = model.family;
    let Some(first) = job.prompts.first() else {
        return Ok(plan::plan(&job.options, model, &[])?);
    };
    let taking_part: Vec<Component> = first.tokens.keys().copied().collect();
    if taking_part.is_empty() {
        return Err(EncodeError::NoComponents { family });
    }
    for (prompt, EncodePrompt { tokens, .. }) in job.prompts.iter().enumerate() {
        if !tokens.keys().eq(&taking_part) {
            return Err(EncodeError::UnequalPrompts { prompt });
        }
        for (&component, tokens) in tokens {
            let Some(encoder) = model.components.get(&component) else {
                return Err(EncodeError::Component { component, family });
            };
            rows::check(tokens, encoder.config()).map_err(|problem| InvalidTokens {
                prompt,
                component,
                problem,
            })?;
        }
    }
    Ok(plan::plan(&job.options, model, &taking_part)?)
}
