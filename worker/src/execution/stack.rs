//! A stack checked against a model: which patch goes to which parameter, before anything runs.

use std::collections::BTreeMap;

use adapter::{Patch, Target};
use protocol::{AdapterId, Component, ErrorCode, ModelName};

use super::StackEntry;
use crate::model::{LoadedModel, Parameter};

/// Largest number of parameter names in an error message.
const NAMES_SHOWN_MAX: usize = 3;

/// What was done with one entry of a stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The adapter.
    pub adapter: AdapterId,
    /// Weights that it changes; 0 when its strengths change nothing.
    pub applied: u32,
    /// Its text-encoder keys that the model does not have.
    pub not_matched: Vec<String>,
}

/// An adapter that does not fit the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StackError {
    /// None of the adapter's text-encoder keys is in the model.
    #[error(
        "adapter {adapter} does not fit model `{model}`: it has none of {}",
        shown(not_matched)
    )]
    NothingMatched {
        /// The adapter.
        adapter: AdapterId,
        /// The model.
        model: ModelName,
        /// The adapter's keys.
        not_matched: Vec<String>,
    },
    /// A patch has another shape than its weight.
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
            Self::NothingMatched { .. } | Self::Shape { .. } => ErrorCode::LoraMismatch,
            Self::Strength { .. } => ErrorCode::InvalidRequest,
        }
    }
}

/// One patch of a stack, with the strengths of its entry.
#[derive(Debug, Clone, Copy)]
pub struct StackedPatch<'a> {
    /// The change.
    pub patch: &'a Patch,
    /// Factor on the change.
    pub strength_patch: f64,
    /// Factor on the weight before the change.
    pub strength_model: f64,
}

/// The patches of a stack by the parameter that they change, each in the stack's order. Patches
/// that change nothing are left out.
#[derive(Debug, Default)]
pub struct CheckedStack<'a> {
    /// By component, then by parameter.
    pub patches: BTreeMap<Component, BTreeMap<Parameter, Vec<StackedPatch<'a>>>>,
    /// One for every entry of the stack, in order.
    pub applied: Vec<Applied>,
}

impl<'a> CheckedStack<'a> {
    /// Finds the parameter of every patch of `stack` in `model`, and checks its shape.
    ///
    /// # Errors
    /// When an adapter has text-encoder keys and the model has none of them, when a patch has
    /// another shape than its weight, or when a strength is not finite.
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
        let mut not_matched = entry.adapter.unmatched().to_vec();
        let (mut matched, mut applied) = (0usize, 0u32);
        for (target, patch) in entry.adapter.patches() {
            let Some((parameter, shape)) = find(model, target) else {
                not_matched.push(target.to_string());
                continue;
            };
            check_shape(model, entry, (target, shape), patch)?;
            matched += 1;
            let stacked = StackedPatch {
                patch,
                strength_patch: entry.strength_patch,
                strength_model: entry.strength_model,
            };
            if stacked.changes_weight() {
                applied += 1;
                let component = self.patches.entry(target.component()).or_default();
                component.entry(parameter).or_default().push(stacked);
            }
        }
        if matched == 0 && !not_matched.is_empty() {
            let (adapter, model) = (entry.id, model.name.clone());
            return Err(StackError::NothingMatched { adapter, model, not_matched });
        }
        Ok(Applied { adapter: entry.id, applied, not_matched })
    }
}

impl StackedPatch<'_> {
    /// Whether the weight is another one afterwards.
    #[expect(clippy::float_cmp, reason = "only exactly 0 and exactly 1 change nothing")]
    fn changes_weight(&self) -> bool {
        match self.patch {
            Patch::LowRank(_) => self.strength_patch != 0.0 || self.strength_model != 1.0,
        }
    }
}

/// The parameter that `target` names, and its shape, if the model has it.
fn find(model: &LoadedModel, target: &Target) -> Option<(Parameter, Vec<usize>)> {
    let parameter = target.parameter().parse::<Parameter>().ok()?;
    let shape = model.components.get(&target.component())?.config().shape(parameter)?;
    Some((parameter, shape))
}

fn check_shape(
    model: &LoadedModel,
    entry: &StackEntry,
    (target, expected): (&Target, Vec<usize>),
    patch: &Patch,
) -> Result<(), StackError> {
    let found = match patch {
        Patch::LowRank(patch) => patch.shape().to_vec(),
    };
    if found == expected {
        return Ok(());
    }
    Err(StackError::Shape {
        adapter: entry.id,
        model: model.name.clone(),
        target: target.to_string().into(),
        expected: expected.into(),
        found: found.into(),
    })
}

/// The first few names, and how many more there are.
fn shown(names: &[String]) -> String {
    let first: Vec<String> =
        names.iter().take(NAMES_SHOWN_MAX).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}
