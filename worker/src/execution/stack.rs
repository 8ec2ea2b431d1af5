//! A stack checked against a model: which patch goes to which parameter, before anything runs.

use std::collections::BTreeMap;

use adapter::{Patch, Slice, Target};
use protocol::{AdapterId, Component, ErrorCode, ModelName, request::Matching};

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
    /// Its text-encoder keys that the model does not have. Those of a component that the request does
    /// not encode are neither here nor counted as applied.
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
    /// Some of the adapter's text-encoder keys are not in the model, and the request is strict.
    #[error(
        "adapter {adapter} has {} text-encoder keys that model `{model}` does not have: {}; ask \
         with `matching` set to `lenient` to go without them",
        not_matched.len(),
        shown_names(not_matched)
    )]
    SomeNotMatched {
        /// The adapter.
        adapter: AdapterId,
        /// The model.
        model: ModelName,
        /// The keys, at least one.
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
            Self::NothingMatched { .. }
            | Self::SomeNotMatched { .. }
            | Self::AllFailed { .. }
            | Self::Shape { .. } => ErrorCode::LoraMismatch,
            Self::Strength { .. } => ErrorCode::InvalidRequest,
        }
    }
}

/// One patch of a stack, with the strengths of its entry.
#[derive(Debug, Clone, Copy)]
pub struct StackedPatch<'a> {
    /// The change; nothing where only `strength_model` acts.
    pub patch: Option<&'a Patch>,
    /// The part of the parameter that both strengths and the change act on; nothing for all of it.
    pub slice: Option<Slice>,
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
    /// What makes two stacks the same: the entries that change a weight, in order.
    pub key: Vec<EntryKey>,
}

/// What a stack is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The model.
    pub model: &'a LoadedModel,
    /// The components that the request encodes.
    pub taking_part: &'a [Component],
    /// What becomes of keys that the model does not have.
    pub matching: Matching,
}

/// What makes two entries of stacks the same: the adapter and the bits of the strengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryKey {
    adapter: AdapterId,
    strength_bits: [u64; 2],
}

impl From<&StackEntry> for EntryKey {
    fn from(entry: &StackEntry) -> Self {
        let strengths = [entry.strength_patch, entry.strength_model];
        Self { adapter: entry.id, strength_bits: strengths.map(f64::to_bits) }
    }
}

impl<'a> CheckedStack<'a> {
    /// Finds the parameter of every patch of `stack` in the model, and checks its shape.
    ///
    /// # Errors
    /// When an adapter has text-encoder keys and the model has none of them, or lacks one and the
    /// scope is strict; when a low-rank patch has another shape than its weight; when no patch of an
    /// adapter can be applied; or when a strength is not finite.
    pub fn check(scope: Scope<'_>, stack: &'a [StackEntry]) -> Result<Self, StackError> {
        let mut checked = Self::default();
        for entry in stack {
            let applied = checked.add(scope, entry)?;
            checked.applied.push(applied);
        }
        Ok(checked)
    }

    /// Whether no weight is another one with this stack.
    pub fn changes_nothing(&self) -> bool {
        self.patches.is_empty()
    }

    fn add(&mut self, scope: Scope<'_>, entry: &'a StackEntry) -> Result<Applied, StackError> {
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
        let (mut matched, mut tried, mut changes) = (0, 0, false);
        for (target, patch) in entry.adapter.patches() {
            let Some((parameter, shape)) = find(scope.model, target) else {
                done.not_matched.push(target.to_string());
                continue;
            };
            matched += 1;
            if !scope.taking_part.contains(&target.component()) {
                continue;
            }
            tried += 1;
            let fitted = fit(scope.model, entry, (target, patch), &shape)?;
            if let Some(misfit) = fitted.misfit {
                done.failed
                    .push(FailedPatch { key: target.to_string(), reason: misfit.to_string() });
            } else if fitted.stacked.is_some() {
                done.applied += 1;
            }
            if let Some(stacked) = fitted.stacked {
                changes = true;
                let component = self.patches.entry(target.component()).or_default();
                component.entry(parameter).or_default().push(stacked);
            }
        }
        if changes {
            self.key.push(EntryKey::from(entry));
        }
        check_matched(scope, &done, matched)?;
        if tried > 0 && done.failed.len() == tried {
            let (adapter, model, failed) = (entry.id, scope.model.name.clone(), done.failed);
            return Err(StackError::AllFailed { adapter, model, failed });
        }
        Ok(done)
    }
}

/// A patch held against its parameter.
struct Fitted<'a> {
    /// What there is to do; nothing where the weight stays as it is.
    stacked: Option<StackedPatch<'a>>,
    /// Why the patch is left out.
    misfit: Option<Misfit>,
}

/// Checks one patch against the `shape` of its parameter.
///
/// Where ComfyUI fails inside of a patch, `strength_model` has acted already; a slice beyond the
/// weight it meets before.
fn fit<'a>(
    model: &LoadedModel,
    entry: &'a StackEntry,
    (target, patch): (&Target, &'a Patch),
    shape: &[usize],
) -> Result<Fitted<'a>, StackError> {
    let mut stacked = StackedPatch::new(patch, target.slice(), entry);
    let misfit = match merge::shape_of(target.slice(), shape) {
        Err(misfit) => return Ok(Fitted { stacked: None, misfit: Some(misfit) }),
        Ok(shape) => merge::check(patch, &shape).err(),
    };
    let misfit = misfit.map(|misfit| refused(model, entry, target, (patch, misfit))).transpose()?;
    if misfit.is_some() {
        stacked.patch = None;
    }
    Ok(Fitted { stacked: stacked.changes_weight().then_some(stacked), misfit })
}

/// Refuses an adapter whose keys the model does not have: when it has none of them, and when it
/// lacks one and the request is strict.
fn check_matched(scope: Scope<'_>, done: &Applied, matched: usize) -> Result<(), StackError> {
    if done.not_matched.is_empty() {
        return Ok(());
    }
    let (adapter, model) = (done.adapter, scope.model.name.clone());
    let not_matched = done.not_matched.clone();
    match (matched, scope.matching) {
        (0, _) => Err(StackError::NothingMatched { adapter, model, not_matched }),
        (_, Matching::Strict) => Err(StackError::SomeNotMatched { adapter, model, not_matched }),
        (_, Matching::Lenient) => Ok(()),
    }
}

impl<'a> StackedPatch<'a> {
    /// `patch` with the strengths of `entry`, unless it has no effect of its own. A weight is
    /// replaced whatever the strength.
    fn new(patch: &'a Patch, slice: Option<Slice>, entry: &StackEntry) -> Self {
        let StackEntry { strength_patch, strength_model, .. } = *entry;
        let has_effect = matches!(patch, Patch::Set(_))
            || (strength_patch != 0.0 && !matches!(patch, Patch::Unchanged));
        Self { patch: has_effect.then_some(patch), slice, strength_patch, strength_model }
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
