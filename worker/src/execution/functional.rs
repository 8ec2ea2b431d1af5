//! FUNCTIONAL: virtual weights for the stack of one job.
//!
//! A patched weight is built when the forward pass reaches it and dropped after its use, so a job
//! costs the memory of one weight; weights without patches are used where they are, and of a patched
//! token embedding only the rows that prompts read are built, if the patches allow it. Nothing shared
//! changes, so there is no lock, and as many jobs may run at once as memory allows.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};
use protocol::{AdapterId, Component};

use super::{
    EncodeError, EncodeJob, EncodePrompt, Encoding, Execution, StackEntry, checked_plan,
    merge::{merged, merged_rows},
    stack::{CheckedStack, ParameterPatches},
};
use crate::{
    conditioning::{self, PromptTokens, Views},
    model::{LoadedModel, Module, Parameter, Parameters, TextModel},
};

/// The FUNCTIONAL execution mode.
#[derive(Debug, Clone, Copy, Default)]
pub struct Functional;

impl Execution for Functional {
    fn encode(
        &self,
        model: &LoadedModel,
        job: &EncodeJob,
    ) -> std::result::Result<Encoding, EncodeError> {
        let plan = checked_plan(model, job)?;
        let stack = CheckedStack::check(model, &job.stack)?;
        let passes = passes(model, &job.prompts)?;
        let mut results: BTreeMap<usize, _> = BTreeMap::new();
        for Pass { hooks, prompts } in &passes {
            let patched = patched(model, [&stack, hooks]);
            let views: Views<'_> = patched
                .iter()
                .map(|(component, patched)| (*component, patched as &dyn Parameters))
                .collect();
            let tokens: Vec<&PromptTokens> =
                prompts.iter().map(|(_, prompt)| &prompt.tokens).collect();
            let conditionings = conditioning::encode(model, &tokens, &plan, &views)?;
            for ((index, _), conditioning) in prompts.iter().zip(conditionings) {
                results.insert(*index, (conditioning, hooks.applied.clone()));
            }
        }
        let (conditionings, hook_stacks) = results.into_values().unzip();
        Ok(Encoding { conditionings, stack: stack.applied, hook_stacks })
    }
}

/// Prompts with the same hook stack, which go through the encoders together.
struct Pass<'a> {
    hooks: CheckedStack<'a>,
    /// With their places in the job.
    prompts: Vec<(usize, &'a EncodePrompt)>,
}

/// The passes of a job, every hook stack checked before any of them runs.
fn passes<'a>(
    model: &LoadedModel,
    prompts: &'a [EncodePrompt],
) -> std::result::Result<Vec<Pass<'a>>, EncodeError> {
    let mut passes: Vec<Pass<'_>> = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let same = |pass: &&mut Pass<'_>| {
            let (_, first) = pass.prompts[0];
            first.hook_stack.iter().map(key).eq(prompt.hook_stack.iter().map(key))
        };
        if let Some(pass) = passes.iter_mut().find(same) {
            pass.prompts.push((index, prompt));
        } else {
            let hooks = CheckedStack::check(model, &prompt.hook_stack)?;
            passes.push(Pass { hooks, prompts: vec![(index, prompt)] });
        }
    }
    Ok(passes)
}

/// What makes two entries the same.
fn key(entry: &StackEntry) -> (AdapterId, [u64; 2]) {
    (entry.id, [entry.strength_patch, entry.strength_model].map(f64::to_bits))
}

/// The encoders of `model` seen through `stacks`, one on top of the other.
fn patched<'a>(
    model: &'a LoadedModel,
    stacks: [&'a CheckedStack<'a>; 2],
) -> BTreeMap<Component, Patched<'a>> {
    let components = model.components.iter();
    components
        .map(|(component, encoder)| {
            let stages = stacks.iter().filter_map(|stack| stack.patches.get(component));
            (*component, Patched { model: encoder, stages: stages.collect() })
        })
        .collect()
}

/// An encoder seen through stacks: weights are rounded after every one of them.
struct Patched<'a> {
    model: &'a TextModel,
    stages: Vec<&'a ParameterPatches<'a>>,
}

impl Parameters for Patched<'_> {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        let mut weight = self.model.parameter(parameter)?;
        for patches in self.stages.iter().filter_map(|stage| stage.get(&parameter)) {
            weight = merged(&weight, patches, self.model.dtype())?;
        }
        Ok(weight)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let table = Module::TokenEmbedding.weight();
        let mut embeddings = self.model.embed(ids)?;
        for patches in self.stages.iter().filter_map(|stage| stage.get(&table)) {
            let rows = ids.to_vec1::<u32>()?;
            match merged_rows(&embeddings, patches, &rows, self.model.dtype())? {
                Some(merged) => embeddings = merged,
                None => return self.parameter(table)?.index_select(ids, 0),
            }
        }
        Ok(embeddings)
    }
}
