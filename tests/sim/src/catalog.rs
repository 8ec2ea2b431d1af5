//! The models and adapters of a simulated farm, and the answer that every request must get.
//!
//! An answer is a pure function of model, prompt and stack: a hash. What a worker answers is made
//! of the tensors that it really has, and the client compares it with what it asked for, so every
//! mix-up on the way shows.

use std::{collections::BTreeMap, sync::OnceLock};

use bytes::Bytes;
use protocol::{
    AdapterId, Component, Dtype, Family, ModelDigest, reply::ModelInfo, request::StackEntry,
};

use crate::random::{Random, mix};

/// Bytes of the one adapter that takes several chunks to fetch.
const LARGE_BYTES: usize = (2 << 20) + 4711;

/// Adapters that a farm may have.
const ADAPTERS: usize = 48;

/// What all farms have in common; it never changes.
#[derive(Debug)]
pub(crate) struct Catalog {
    /// Canonical bytes of adapters; the last one is large.
    pub(crate) adapters: Vec<Content>,
    /// `base` is served by every worker, `refiner` by some.
    pub(crate) models: Vec<ModelInfo>,
}

/// One adapter.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    pub(crate) id: AdapterId,
    pub(crate) bytes: Bytes,
}

impl Catalog {
    /// The catalog, made once for the whole process.
    pub(crate) fn get() -> &'static Self {
        static CATALOG: OnceLock<Catalog> = OnceLock::new();
        CATALOG.get_or_init(Self::new)
    }

    fn new() -> Self {
        let mut random = Random::new(0);
        let mut adapters: Vec<_> =
            (1..ADAPTERS).map(|_| Content::new(random.between(100, 2000), &mut random)).collect();
        adapters.push(Content::new(LARGE_BYTES, &mut random));
        Self { adapters, models: ["base", "refiner"].map(model).into() }
    }
}

impl Content {
    fn new(length: usize, random: &mut Random) -> Self {
        let words = std::iter::repeat_with(|| random.next().to_le_bytes());
        let bytes: Bytes = words.take(length / 8 + 1).flatten().take(length).collect();
        Self { id: AdapterId::of(&bytes), bytes }
    }
}

/// The answer to a prompt under a stack of adapters, named by what they really are.
pub(crate) fn answer<'a>(
    model: &ModelDigest,
    prompt: &str,
    stack: impl IntoIterator<Item = (&'a StackEntry, AdapterId)>,
) -> u64 {
    let mut hash = absorb(0, model.as_bytes());
    hash = absorb(hash, prompt.as_bytes());
    for (entry, tensors) in stack {
        hash = absorb(hash, tensors.as_bytes());
        hash = mix(hash ^ entry.strength_patch.to_bits());
        hash = mix(hash.rotate_left(7) ^ entry.strength_model.to_bits());
    }
    hash
}

fn absorb(hash: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(mix(hash ^ bytes.len() as u64), |hash, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(hash.rotate_left(5) ^ u64::from_le_bytes(word))
    })
}

fn model(name: &str) -> ModelInfo {
    ModelInfo {
        name: name.parse().expect("a plain word"),
        digest: ModelDigest::of(name.as_bytes()),
        family: Family::Sd15,
        weights_dtype: Dtype::Float16,
        bytes: 1 << 20,
        chunk_tokens: BTreeMap::from([(Component::ClipL, 77)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_asked_for_changes_the_answer() {
        let Catalog { adapters, models } = Catalog::get();
        let entry = |index: usize, strength_patch| StackEntry {
            adapter: adapters[index].id,
            strength_patch,
            strength_model: 1.0,
        };
        let of = |model: usize, prompt: &str, stack: &[StackEntry]| {
            let named = stack.iter().map(|entry| (entry, entry.adapter));
            answer(&models[model].digest, prompt, named)
        };
        let stack = [entry(0, 1.0), entry(1, 0.5)];
        let other = [
            of(1, "a cat", &stack),
            of(0, "a dog", &stack),
            of(0, "a cat", &stack[..1]),
            of(0, "a cat", &[entry(1, 0.5), entry(0, 1.0)]),
            of(0, "a cat", &[entry(0, 1.0), entry(1, 0.4)]),
        ];
        assert!(!other.contains(&of(0, "a cat", &stack)));
    }
}
