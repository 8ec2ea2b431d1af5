//! Running the passes of a job: for every hook stack, the weights below with the hooks on top.

use std::collections::BTreeMap;

use candle_core::Result;
use protocol::Component;

use super::{
    job::{CheckedJob, Pass},
    merged_cache::Kept,
    stack::{Applied, CheckedStack},
    stage::{Stage, Tally, Watch, Watched},
};
use crate::{
    conditioning::{self, Conditioning, PromptTokens, Views},
    model::{Parameters, Readings},
};

/// What passes have in common.
#[derive(Clone, Copy)]
pub(super) struct Common<'a> {
    pub(super) job: &'a CheckedJob<'a>,
    /// The weights that prompts without hooks see.
    pub(super) below: &'a Views<'a>,
    pub(super) watch: Watch<'a>,
    pub(super) tally: &'a Tally,
}

/// Results in the order of the job's prompts.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) conditionings: Vec<Conditioning>,
    pub(super) hook_stacks: Vec<Vec<Applied>>,
}

impl Common<'_> {
    /// Runs every pass; `keep` finds the kept weights of a hook stack.
    pub(super) fn run(self, keep: impl Fn(&CheckedStack<'_>) -> Kept) -> Result<Passed> {
        let mut results = BTreeMap::new();
        for Pass { hooks, prompts } in &self.job.passes {
            let hooked = stages(self, hooks, keep(hooks));
            let watched: BTreeMap<Component, Watched<'_>> = hooked
                .iter()
                .map(|(component, below)| (*component, Watched { below, watch: self.watch }))
                .collect();
            let tokens: Vec<&PromptTokens> =
                prompts.iter().map(|(_, prompt)| &prompt.tokens).collect();
            let plan = &self.job.plan;
            let conditionings =
                conditioning::encode(self.job.model, &tokens, plan, &views(&watched))?;
            for ((index, _), conditioning) in prompts.iter().zip(conditionings) {
                results.insert(*index, (conditioning, hooks.applied.clone()));
            }
        }
        let (conditionings, hook_stacks) = results.into_values().unzip();
        Ok(Passed { conditionings, hook_stacks })
    }
}

/// Every component seen through one more stack.
pub(super) fn stages<'a>(
    common: Common<'a>,
    stack: &'a CheckedStack<'a>,
    mut kept: Kept,
) -> BTreeMap<Component, Stage<'a>> {
    let below = common.below.iter();
    below
        .map(|(component, below)| {
            let stage = Stage {
                below: *below,
                patches: stack.patches.get(component),
                rounding: common.job.rounding,
                kept: kept.remove(component),
                tally: common.tally,
            };
            (*component, stage)
        })
        .collect()
}

/// The model's own weights, as what the forward pass takes.
pub(super) fn base<'a>(held: &'a Readings<'_>) -> Views<'a> {
    held.iter().map(|(component, held)| (*component, &**held as &dyn Parameters)).collect()
}

/// Whatever shows weights, as what the forward pass takes.
pub(super) fn views<P: Parameters>(parameters: &BTreeMap<Component, P>) -> Views<'_> {
    let parameters = parameters.iter();
    parameters.map(|(component, view)| (*component, view as &dyn Parameters)).collect()
}
