//! An encoder seen through one stack, and through an eye on the clock.

use std::{cell::Cell, sync::Arc};

use candle_core::{Result, Tensor};
use protocol::{Dtype, MergedWeights};

use super::{
    merge::{Weight, merged, merged_rows},
    merged_cache::KeptWeights,
    stack::{ParameterPatches, StackedPatch},
};
use crate::model::{Module, Parameter, Parameters};

/// Called before every use of a weight; its error ends the pass.
pub(super) type Watch<'a> = &'a dyn Fn() -> Result<()>;

/// The weights below with patches on top, rounded after the last one.
///
/// A patched weight is built when the forward pass reaches it, and dropped after its use unless it is
/// kept; weights without patches are used where they are, and of a patched token embedding only the
/// rows that prompts read are built, if the patches allow it.
pub(super) struct Stage<'a> {
    pub(super) below: &'a dyn Parameters,
    pub(super) patches: Option<&'a ParameterPatches<'a>>,
    pub(super) rounding: Dtype,
    pub(super) kept: Option<Arc<KeptWeights>>,
    pub(super) tally: &'a Tally,
}

/// How many merged weights a job took from the cache, and how many it built.
#[derive(Debug, Default)]
pub(super) struct Tally {
    cached: Cell<u64>,
    built: Cell<u64>,
}

impl Tally {
    /// What the receipt says of a job that changes weights. Rows of an embedding count as built only
    /// where nothing was cached: they are never kept.
    pub(super) fn merged_weights(&self) -> MergedWeights {
        if self.built.get() == 0 && self.cached.get() > 0 {
            MergedWeights::Cached
        } else {
            MergedWeights::Built
        }
    }

    fn count(counter: &Cell<u64>) {
        counter.set(counter.get() + 1);
    }
}

impl Stage<'_> {
    fn patches(&self, parameter: Parameter) -> Option<&[StackedPatch<'_>]> {
        self.patches?.get(&parameter).map(Vec::as_slice)
    }

    fn merged(&self, parameter: Parameter, patches: &[StackedPatch<'_>]) -> Result<Tensor> {
        let below = self.below.parameter(parameter)?;
        let original = || self.original().parameter(parameter);
        merged(Weight { patched: &below, original: &original }, patches, self.rounding)
    }
}

impl Parameters for Stage<'_> {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        let Some(patches) = self.patches(parameter) else {
            return self.below.parameter(parameter);
        };
        let build = || self.merged(parameter, patches);
        let Some(slot) = self.kept.as_ref().and_then(|kept| kept.slot(parameter)) else {
            Tally::count(&self.tally.built);
            return build();
        };
        let (tensor, was_kept) = slot.get_or_build(build)?;
        Tally::count(if was_kept { &self.tally.cached } else { &self.tally.built });
        Ok(tensor)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let table = Module::TokenEmbedding.weight();
        let Some(patches) = self.patches(table) else { return self.below.embed(ids) };
        let embeddings = self.below.embed(ids)?;
        let original = || self.original().embed(ids);
        let weight = Weight { patched: &embeddings, original: &original };
        match merged_rows(weight, patches, &ids.to_vec1::<u32>()?, self.rounding)? {
            Some(merged) => Ok(merged),
            None => self.parameter(table)?.index_select(ids, 0),
        }
    }

    fn original(&self) -> &dyn Parameters {
        self.below.original()
    }
}

/// The weights below, each looked at only after [`Watch`] has agreed.
pub(super) struct Watched<'a> {
    pub(super) below: &'a dyn Parameters,
    pub(super) watch: Watch<'a>,
}

impl Parameters for Watched<'_> {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        (self.watch)()?;
        self.below.parameter(parameter)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        (self.watch)()?;
        self.below.embed(ids)
    }

    fn linear(&self, module: Module, input: &Tensor) -> Result<Tensor> {
        (self.watch)()?;
        self.below.linear(module, input)
    }

    fn norm(&self, module: Module, input: &Tensor) -> Result<Tensor> {
        (self.watch)()?;
        self.below.norm(module, input)
    }

    fn original(&self) -> &dyn Parameters {
        self.below.original()
    }
}
