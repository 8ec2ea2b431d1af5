//! A job checked against its model: whatever can be refused is refused before anything runs.

use candle_core::DType;
use protocol::{Component, Dtype, Fidelity};

use super::{
    EncodeError, EncodeJob, EncodePrompt,
    stack::{CheckedStack, EntryKey, Scope},
};
use crate::{
    conditioning::{
        InvalidTokens,
        plan::{self, Plan},
        rows,
    },
    model::LoadedModel,
};

/// A job that fits its model.
#[derive(Debug)]
pub(super) struct CheckedJob<'a> {
    pub(super) model: &'a LoadedModel,
    pub(super) plan: Plan,
    pub(super) stack: CheckedStack<'a>,
    pub(super) passes: Vec<Pass<'a>>,
    /// What merged weights are rounded to after every stack.
    pub(super) rounding: Dtype,
}

/// Prompts with the same hook stack, which go through the encoders together.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub(super) hooks: CheckedStack<'a>,
    /// With their places in the job.
    pub(super) prompts: Vec<(usize, &'a EncodePrompt)>,
}

impl<'a> CheckedJob<'a> {
    /// Checks tokens, options and every stack of `job`.
    pub(super) fn check(
        model: &'a LoadedModel,
        job: &'a EncodeJob,
        fidelity: Fidelity,
    ) -> Result<Self, EncodeError> {
        let taking_part = taking_part(model, job)?;
        let plan = plan::plan(&job.options, model, &taking_part)?;
        let scope = Scope { model, taking_part: &taking_part, matching: job.options.matching };
        let stack = CheckedStack::check(scope, &job.stack)?;
        let passes = passes(scope, &job.prompts)?;
        let rounding = match fidelity {
            Fidelity::Comfyui | Fidelity::Fast => model.dtype,
            Fidelity::Exact => Dtype::Float32,
        };
        Ok(Self { model, plan, stack, passes, rounding })
    }

    /// The element type in which a merged weight is kept, where the model holds its own in `held`:
    /// the same when it was rounded to what the model holds, and f32 otherwise.
    pub(super) fn kept_dtype(&self, held: DType) -> DType {
        if self.rounding == self.model.dtype { held } else { DType::F32 }
    }

    /// Whether every prompt sees the model's own weights.
    pub(super) fn changes_nothing(&self) -> bool {
        self.stack.changes_nothing() && self.passes.iter().all(|pass| pass.hooks.changes_nothing())
    }
}

/// The components that all prompts have tokens for, after a check of the tokens.
fn taking_part(model: &LoadedModel, job: &EncodeJob) -> Result<Vec<Component>, EncodeError> {
    let family = model.family;
    let Some(first) = job.prompts.first() else { return Ok(Vec::new()) };
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
    Ok(taking_part)
}

/// The prompts by hook stack, in the order in which hook stacks appear.
fn passes<'a>(scope: Scope<'_>, prompts: &'a [EncodePrompt]) -> Result<Vec<Pass<'a>>, EncodeError> {
    let mut passes: Vec<Pass<'_>> = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let keys = |prompt: &'a EncodePrompt| prompt.hook_stack.iter().map(EntryKey::from);
        let same = |pass: &&mut Pass<'a>| keys(pass.prompts[0].1).eq(keys(prompt));
        if let Some(pass) = passes.iter_mut().find(same) {
            pass.prompts.push((index, prompt));
        } else {
            let hooks = CheckedStack::check(scope, &prompt.hook_stack)?;
            passes.push(Pass { hooks, prompts: vec![(index, prompt)] });
        }
    }
    Ok(passes)
}
