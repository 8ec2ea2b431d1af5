//! FUNCTIONAL: virtual weights for the stack of one job.
//!
//! A patched weight is built when the forward pass reaches it and dropped after its use, so a job
//! costs the memory of one weight; weights without patches are used where they are. Nothing shared
//! changes, so there is no lock, and as many jobs may run at once as memory allows.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{
    EncodeError, EncodeJob, Encoding, Execution, checked_plan,
    merge::merged,
    stack::{CheckedStack, StackedPatch},
};
use crate::{
    conditioning::{self, Views},
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
        let CheckedStack { patches, applied } = CheckedStack::check(model, &job.stack)?;
        let views: BTreeMap<_, _> = patches
            .into_iter()
            .filter_map(|(component, patches)| {
                Some((component, Patched { model: model.components.get(&component)?, patches }))
            })
            .collect();
        let views: Views<'_> = model
            .components
            .iter()
            .map(|(component, base)| match views.get(component) {
                Some(patched) => (*component, patched as &dyn Parameters),
                None => (*component, base as &dyn Parameters),
            })
            .collect();
        let conditionings = conditioning::encode(model, &job.prompts, &plan, &views)?;
        Ok(Encoding { conditionings, stack: applied })
    }
}

/// An encoder seen through a stack.
struct Patched<'a> {
    model: &'a TextModel,
    patches: BTreeMap<Parameter, Vec<StackedPatch<'a>>>,
}

impl Parameters for Patched<'_> {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        let weight = self.model.parameter(parameter)?;
        match self.patches.get(&parameter) {
            Some(patches) => merged(&weight, patches, self.model.dtype()),
            None => Ok(weight),
        }
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let table = Module::TokenEmbedding.weight();
        if self.patches.contains_key(&table) {
            return self.parameter(table)?.index_select(ids, 0);
        }
        self.model.embed(ids)
    }
}
