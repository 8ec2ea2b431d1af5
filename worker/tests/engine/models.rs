//! Seeded models and adapters, made once per test run.

use std::{path::Path, sync::Arc};

use adapter::PatchSet;
use candle_core::Device;
use fixtures::{Naming, Size, to_safetensors, write_encoder, write_long_clip};
use luna_worker::{
    conditioning::PromptTokens,
    execution::StackEntry,
    model::{LoadedModel, ModelSpec},
    weights::load,
};
use protocol::{CHUNK_TOKENS, Chunk, Component, ComponentTokens, Dtype, Family};

/// A seeded model, loaded from stand-alone Hugging Face files in f32.
pub(crate) fn model(size: Size, family: Family, dtype: Dtype) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<String> = family
        .components()
        .iter()
        .map(|&component| encoder_file(folder.path(), size, component, Naming::Hf))
        .collect();
    load(&spec(family, &files), dtype, &Device::Cpu).unwrap()
}

/// A seeded model of `family` whose CLIP-L is a LongCLIP.
pub(crate) fn long_clip(family: Family) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long").join("model.safetensors");
    write_long_clip(&path, Size::Tiny, Dtype::Float32).unwrap();
    let mut files = vec![path.to_str().unwrap().to_owned()];
    if family == Family::Sdxl {
        files.push(encoder_file(folder.path(), Size::Tiny, Component::ClipG, Naming::Hf));
    }
    load(&spec(family, &files), Dtype::Float32, &Device::Cpu).unwrap()
}

/// Writes one encoder in a folder of its own, so that its `config.json` is about it alone.
pub(crate) fn encoder_file(
    folder: &Path,
    size: Size,
    component: Component,
    naming: Naming,
) -> String {
    let path = folder.join(component.as_str()).join("model.safetensors");
    write_encoder(&path, size, component, Dtype::Float32, naming).unwrap();
    path.to_str().unwrap().to_owned()
}

pub(crate) fn spec(family: Family, files: &[String]) -> ModelSpec {
    format!("test={family}:{}", files.join(",")).parse().unwrap()
}

/// A seeded LoRA as one entry of a stack.
pub(crate) fn entry(size: Size, family: Family, name: &str, strength: f64) -> StackEntry {
    let adapter = patches(size, family, name);
    StackEntry {
        id: adapter.id(),
        adapter: Arc::new(adapter),
        strength_patch: strength,
        strength_model: 1.0,
    }
}

pub(crate) fn patches(size: Size, family: Family, name: &str) -> PatchSet {
    let file = to_safetensors(&fixtures::lora(size, family, name).unwrap()).unwrap();
    adapter::read_lora(file.as_slice()).unwrap().0
}

/// A prompt of one chunk per component: start, `word`, end, padding.
pub(crate) fn word(family: Family, word: u32) -> PromptTokens {
    let tokens = |component| {
        let mut chunk: Chunk = prompt::empty_chunk(component, CHUNK_TOKENS);
        (chunk.ids[1], chunk.ids[2]) = (word, 49407);
        ComponentTokens { chunks: vec![chunk], ..ComponentTokens::default() }
    };
    family.components().iter().map(|&component| (component, tokens(component))).collect()
}
