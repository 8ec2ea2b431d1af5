//! Seeded models and adapters for unit tests.

use std::sync::Arc;

use candle_core::{DType, Device};
use fixtures::{Naming, Size, to_safetensors, write_encoder};
use protocol::{CHUNK_TOKENS, Chunk, ComponentTokens, Dtype, Family};

use crate::{conditioning::PromptTokens, execution::StackEntry, model::LoadedModel, weights::load};

/// A tiny model, its weights stored as `dtype`.
pub(crate) fn model(family: Family, dtype: Dtype) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    let files = family.components().iter().map(|&component| {
        let path = folder.path().join(component.as_str()).join("model.safetensors");
        write_encoder(&path, Size::Tiny, component, Dtype::Float32, Naming::Hf).unwrap();
        path.to_str().unwrap().to_owned()
    });
    let files = files.collect::<Vec<_>>().join(",");
    load(&format!("tiny={family}:{files}").parse().unwrap(), dtype, &Device::Cpu).unwrap()
}

/// A seeded adapter as an entry of a stack.
pub(crate) fn entry(family: Family, name: &str, strength_patch: f64) -> StackEntry {
    let file = to_safetensors(&fixtures::lora(Size::Tiny, family, name).unwrap()).unwrap();
    let adapter = adapter::read_lora(file.as_slice()).unwrap().0;
    StackEntry { id: adapter.id(), adapter: Arc::new(adapter), strength_patch, strength_model: 1.0 }
}

/// A prompt of one chunk for every component.
pub(crate) fn prompt(family: Family, word: u32) -> PromptTokens {
    let tokens = |component| {
        let mut chunk: Chunk = prompt::empty_chunk(component, CHUNK_TOKENS);
        (chunk.ids[1], chunk.ids[2]) = (word, 49407);
        ComponentTokens { chunks: vec![chunk], ..ComponentTokens::default() }
    };
    family.components().iter().map(|&component| (component, tokens(component))).collect()
}

/// A hash of every byte of every weight that readers of `model` see now.
pub(crate) fn hash_of_weights(model: &LoadedModel) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for held in model.read().values() {
        for (parameter, tensor) in held.iter() {
            hasher.update(parameter.to_string().as_bytes());
            // Every element type that weights are held in goes into f32 without loss.
            let elements = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            for element in elements.to_vec1::<f32>().unwrap() {
                hasher.update(&element.to_le_bytes());
            }
        }
    }
    hasher.finalize()
}
