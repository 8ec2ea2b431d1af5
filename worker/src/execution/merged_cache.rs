//! Merged weights of stacks that came before, kept for those that come again.
//!
//! A component's weights under one stack are kept together or not at all; a hook stack's are kept
//! under the pair of it and the stack below. Which are kept is decided by `index`; the weights are
//! filled in by the pass that needs them first. The lock around the index is held for the decision
//! alone, the lock of one weight while it is built, so that two lanes do not build it twice.

mod index;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Result, Tensor};
use protocol::{Component, Dtype, MergedWeights, ModelDigest};

use self::index::Index;
use super::{
    job::CheckedJob,
    merge::changes_rows_alone,
    stack::{CheckedStack, EntryKey, ParameterPatches},
};
use crate::model::{Held, Module, Parameter, Readings};

/// Merged weights within a budget, shared by all lanes.
#[derive(Debug)]
pub(super) struct MergedCache {
    budget_bytes: u64,
    shared: Mutex<Shared>,
}

/// What the cache of merged weights has done since the worker started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MergedStatistics {
    /// Jobs all of whose merged weights were there.
    pub cached: u64,
    /// Jobs that built merged weights.
    pub built: u64,
    /// Stacks whose weights were dropped for others, counted once for every component.
    pub evicted: u64,
    /// Stacks whose weights are kept now, counted once for every component.
    pub stacks: u64,
    /// Bytes that kept weights take, or will take once all of them are filled in.
    pub bytes: u64,
}

/// The kept weights of one stack.
pub(super) type Kept = BTreeMap<Component, Arc<KeptWeights>>;

/// One slot for every weight of a component that a stack changes.
#[derive(Debug)]
pub(super) struct KeptWeights {
    slots: BTreeMap<Parameter, Slot>,
    bytes: u64,
}

/// Room for one merged weight.
#[derive(Debug)]
pub(super) struct Slot {
    dtype: DType,
    tensor: Mutex<Option<Tensor>>,
}

#[derive(Debug, Default)]
struct Shared {
    index: Index<Key, Arc<KeptWeights>>,
    cached: u64,
    built: u64,
}

/// Everything that merged weights depend on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    model: ModelDigest,
    component: Component,
    rounding: Dtype,
    stacks: Arc<[Vec<EntryKey>]>,
}

impl MergedCache {
    /// A cache that keeps up to `budget_bytes`; with 0, nothing.
    pub(super) fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, shared: Mutex::default() }
    }

    /// The kept weights of the last of `stacks`, which is applied on top of the others; nothing for
    /// a stack that is not, or not yet, kept. `held` is what the components hold.
    pub(super) fn keep(
        &self,
        job: &CheckedJob<'_>,
        held: &Readings<'_>,
        stacks: &[&CheckedStack<'_>],
    ) -> Kept {
        let changed = stacks.last().filter(|stack| !stack.changes_nothing());
        let Some(changed) = changed.filter(|_| self.budget_bytes > 0) else { return Kept::new() };
        let keys: Arc<[Vec<EntryKey>]> = stacks.iter().map(|stack| stack.key.clone()).collect();
        let wanted = changed.patches.iter().filter_map(|(component, patches)| {
            let key = Key {
                model: job.model.digest,
                component: *component,
                rounding: job.rounding,
                stacks: Arc::clone(&keys),
            };
            let empty = KeptWeights::empty(job, held.get(component)?, patches);
            Some((key, empty.bytes, Arc::new(empty)))
        });
        let wanted: Vec<_> = wanted.collect();
        let components: Vec<Component> = wanted.iter().map(|(key, ..)| key.component).collect();
        let found = self.lock().index.open(wanted, self.budget_bytes);
        components.into_iter().zip(found).filter_map(|(c, kept)| Some((c, kept?))).collect()
    }

    /// Notes what became of a job that changes weights.
    pub(super) fn count(&self, merged: MergedWeights) {
        let mut shared = self.lock();
        match merged {
            MergedWeights::Cached => shared.cached += 1,
            MergedWeights::Built => shared.built += 1,
        }
    }

    /// What was done so far, and what is kept now.
    pub(super) fn statistics(&self) -> MergedStatistics {
        let shared = self.lock();
        MergedStatistics {
            cached: shared.cached,
            built: shared.built,
            evicted: shared.index.evicted(),
            stacks: shared.index.len(),
            bytes: shared.index.bytes(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Nothing under the lock can be left half done.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeptWeights {
    /// Room for every weight of `held` that `patches` change, but for an embedding of which rows
    /// alone are built.
    fn empty(job: &CheckedJob<'_>, held: &Held, patches: &ParameterPatches<'_>) -> Self {
        let by_rows = |parameter: Parameter, patches: &[_]| {
            parameter == Module::TokenEmbedding.weight() && changes_rows_alone(patches)
        };
        let mut bytes = 0;
        let slots = patches.iter().filter_map(|(parameter, patches)| {
            let tensor = held.stored(*parameter).filter(|_| !by_rows(*parameter, patches))?;
            let dtype = job.kept_dtype(tensor.dtype());
            bytes += (tensor.elem_count() * dtype.size_in_bytes()) as u64;
            Some((*parameter, Slot { dtype, tensor: Mutex::default() }))
        });
        let slots = slots.collect();
        Self { slots, bytes }
    }

    /// The room for `parameter`, if it is kept.
    pub(super) fn slot(&self, parameter: Parameter) -> Option<&Slot> {
        self.slots.get(&parameter)
    }
}

impl Slot {
    /// The weight in f32, and whether it was there already. Another lane that needs it meanwhile
    /// waits for `build`.
    ///
    /// # Errors
    /// Those of `build`; then the next one tries again.
    pub(super) fn get_or_build(
        &self,
        build: impl FnOnce() -> Result<Tensor>,
    ) -> Result<(Tensor, bool)> {
        // A panic in `build` leaves the slot empty.
        let mut slot = self.tensor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = &*slot {
            return Ok((tensor.to_dtype(DType::F32)?, true));
        }
        let merged = build()?;
        *slot = Some(merged.to_dtype(self.dtype)?);
        Ok((merged, false))
    }
}
