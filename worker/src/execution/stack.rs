//! A stack checked against a model: which patch goes to which parameter, before anything runs.

use std::collections::BTreeMap;

use adapter::{Patch, Target};
use protocol::{AdapterId, Component, ErrorCode, ModelName};

use super::{
    StackEntry,
    merge::{self, Misfit},
};
use crate::model::{LoadedModel, Parameter};

/// Largest number of parameters in an error message.
const SHOWN_MAX: usize = 3;

/// What was done with one entry of a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The adapter.
    pub adapter: AdapterId,
    /// Weights that it changes; 0 when its strengths change nothing.
    pub applied: u32,
    /// Its text-encoder keys that the model does not have.
    pub not_matched: Vec<String>,
    /// Its patches that cannot be applied to the weights they name, which stay as they were.
    pub failed: Vec<FailedPatch>,
}

/// A patch that leaves the weight it names as it was, because it does not fit it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}`: {reason}")]
pub struct FailedPatch {
    /// The weight.
    pub key: String,
    /// What does not fit.
    pub reason: String,
}

/// An adapter that does not fit the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StackError {
    /// None of the adapter's text-encoder keys is in the model.
    #[error(
        "adapter {adapter} does not fit model `{model}`: it has none of {}",
        shown_names(not_matched)
    )]
    NothingMatched {
        /// The adapter.
        adapter: AdapterId,
        /// The model.
        model: ModelName,
        /// The adapter's keys.
        not_matched: Vec<String>,
    },
    /// None of the patches that name a weight of the model can be applied to it.
    #[error("adapter {adapter} does not fit model `{model}`: {}", shown(failed))]
    AllFailed {
        /// The adapter.
        adapter: AdapterId,
        /// The model.
        model: ModelName,
        /// The patches, at least one.
        failed: Vec<FailedPatch>,
    },
    /// A low-rank patch has another shape than its weight.
    #[error(
        "adapter {adapter} does not fit model `{model}`: `{target}` is {expected:?}, the patch is \
         {found:?}"
    )]
    Shape {
        /// The adapter.
        adapter: AdapterId,
        /// The model.
        model: ModelName,
        /// The weight.
        target: Box<str>,
        /// The weight's shape.
        expected: Box<[usize]>,
        /// The patch's shape.
        found: Box<[usize]>,
    },
    /// A strength is infinite or undefined.
    #[error("adapter {adapter} has strength `{strength}`: expected a finite number")]
    Strength {
        /// The adapter.
        adapter: AdapterId,
        /// The strength as text.
        strength: String,
    },
}

impl StackError {
    /// The code that travels on the wire.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NothingMatched { .. } | Self::AllFailed { .. } | Self::Shape { .. } => {
                ErrorCode::LoraMismatch
            }
            Self::Strength { .. } => ErrorCode::InvalidRequest,
        }
    }
}

/// One patch of a stack, with the strengths of its entry.
#[derive(Debug, Clone, Copy)]
pub struct StackedPatch<'a> {
    /// The change; nothing where only `strength_model` acts.
    pub patch: Option<&'a Patch>,
    /// Factor on the change.
    pub strength_patch: f64,
    /// Factor on the weight before the change.
    pub strength_model: f64,
}

/// The patches of one component by the parameter that they change.
pub type ParameterPatches<'a> = BTreeMap<Parameter, Vec<StackedPatch<'a>>>;

/// The patches of a stack by the parameter that they change, each in the stack's order. Patches
/// that change nothing are left out.
#[derive(Debug, Default)]
pub struct CheckedStack<'a> {
    /// By component.
    pub patches: BTreeMap<Component, ParameterPatches<'a>>,
    /// One for every entry of the stack, in order.
    pub applied: Vec<Applied>,
}

impl<'a> CheckedStack<'a> {
    /// Finds the parameter of every patch of `stack` in `model`, and checks its shape.
    ///
    /// # Errors
    /// When an adapter has text-encoder keys and the model has none of them, when a low-rank patch
    /// has another shape than its weight, when no patch of an adapter can be applied, or when a
    /// strength is not finite.
    pub fn check(model: &LoadedModel, stack: &'a [StackEntry]) -> Result<Self, StackError> {
        let mut checked = Self::default();
        for entry in stack {
            let applied = checked.add(model, entry)?;
            checked.applied.push(applied);
        }
        Ok(checked)
    }

    fn add(&mut self, model: &LoadedModel, entry: &'a StackEntry) -> Result<Applied, StackError> {
        for strength in [entry.strength_patch, entry.strength_model] {
            if !strength.is_finite() {
                let (adapter, strength) = (entry.id, strength.to_string());
                return Err(StackError::Strength { adapter, strength });
            }
        }
        let mut done = Applied {
            adapter: entry.id,
            applied: 0,
            not_matched: entry.adapter.unmatched().to_vec(),
            failed: Vec::new(),
        };
        let mut matched = 0;
        for (target, patch) in entry.adapter.patches() {
            let Some((parameter, shape)) = find(model, target) else {
                done.not_matched.push(target.to_string());
                continue;
            };
            matched += 1;
            let mut stacked = StackedPatch::new(patch, entry);
            if let Err(misfit) = merge::check(patch, &shape) {
                let misfit = refused(model, entry, target, (patch, misfit))?;
                done.failed
                    .push(FailedPatch { key: target.to_string(), reason: misfit.to_string() });
                stacked.patch = None;
            } else if stacked.changes_weight() {
                done.applied += 1;
            }
            if stacked.changes_weight() {
                let component = self.patches.entry(target.component()).or_default();
                component.entry(parameter).or_default().push(stacked);
            }
        }
        let (adapter, model) = (entry.id, &model.name);
        if matched == 0 && !done.not_matched.is_empty() {
            let (model, not_matched) = (model.clone(), done.not_matched);
            return Err(StackError::NothingMatched { adapter, model, not_matched });
        }
        if matched > 0 && done.failed.len() == matched {
            let (model, failed) = (model.clone(), done.failed);
            return Err(StackError::AllFailed { adapter, model, failed });
        }
        Ok(done)
    }
}

impl<'a> StackedPatch<'a> {
    /// `patch` with the strengths of `entry`, unless the strength leaves nothing of it. A weight
    /// is replaced whatever the strength.
    fn new(patch: &'a Patch, entry: &StackEntry) -> Self {
        let StackEntry { strength_patch, strength_model, .. } = *entry;
        let has_effect = strength_patch != 0.0 || matches!(patch, Patch::Set(_));
        Self { patch: has_effect.then_some(patch), strength_patch, strength_model }
    }

    /// Whether the weight is another one afterwards.
    #[expect(clippy::float_cmp, reason = "only exactly 1 changes nothing")]
    fn changes_weight(&self) -> bool {
        self.patch.is_some() || self.strength_model != 1.0
    }
}

/// The parameter that `target` names, and its shape, if the model has it.
fn find(model: &LoadedModel, target: &Target) -> Option<(Parameter, Vec<usize>)> {
    let parameter = target.parameter().parse::<Parameter>().ok()?;
    let shape = model.components.get(&target.component())?.config().shape(parameter)?;
    Some((parameter, shape))
}

/// Low-rank patches of another shape fail the request, as a LoRA for another model would be the
/// reason; other misfits are for the report.
fn refused(
    model: &LoadedModel,
    entry: &StackEntry,
    target: &Target,
    (patch, misfit): (&Patch, Misfit),
) -> Result<Misfit, StackError> {
    match (patch, misfit) {
        (Patch::LowRank(_), Misfit::Shape { weight, patch }) => Err(StackError::Shape {
            adapter: entry.id,
            model: model.name.clone(),
            target: target.to_string().into(),
            expected: weight.into(),
            found: patch.into(),
        }),
        (_, misfit) => Ok(misfit),
    }
}

/// The first few names, and how many more there are.
fn shown_names(names: &[String]) -> String {
    shown(&names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>())
}

/// The first few, and how many more there are.
fn shown<T: ToString>(all: &[T]) -> String {
    let first: Vec<String> = all.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    match all.len().saturating_sub(SHOWN_MAX) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}
