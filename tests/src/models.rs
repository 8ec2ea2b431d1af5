//! The seeded models that tests serve, written once and kept beside the build.

use std::path::{Path, PathBuf};

use fixtures::{Naming, Plan, Size};
use luna_client::{Component, Dtype, Family};

use crate::binary::scratch;

/// `tiny`: CLIP-L of a few layers, as a stand-alone file.
pub fn tiny_sd15() -> String {
    format!("tiny=sd15:{}", encoder(Size::Tiny, Component::ClipL, Dtype::Float32).display())
}

/// `tinyxl`: CLIP-L and bigG of a few layers, as two stand-alone files.
pub fn tiny_sdxl() -> String {
    spec("tinyxl", Size::Tiny, Family::Sdxl, Dtype::Float32)
}

/// A model of `family` at `size`, written in `dtype`.
pub fn spec(name: &str, size: Size, family: Family, dtype: Dtype) -> String {
    let files: Vec<_> = family
        .components()
        .iter()
        .map(|component| encoder(size, *component, dtype).display().to_string())
        .collect();
    format!("{name}={family}:{}", files.join(","))
}

/// The textual-inversion files of the tiny models.
pub fn tiny_embeddings() -> PathBuf {
    crate::golden::golden().join("embeddings_tiny")
}

/// A seeded kohya LoRA for CLIP-L of `size`, different for every seed.
pub fn seeded_lora(size: Size, seed: u64, rank: usize) -> PathBuf {
    let path = scratch().join(format!("lora-{size}-{seed}-{rank}.safetensors"));
    write(|plan| plan.add_seeded_lora(&path, size, Family::Sd15, seed, rank));
    path
}

/// A LoRA of the golden results' generator at full size.
pub fn full_lora(family: Family, name: &str) -> PathBuf {
    let path = scratch().join(format!("lora-full-{family}-{name}.safetensors"));
    write(|plan| plan.add_lora(&path, Size::Full, family, name).expect("the generator has it"));
    path
}

fn encoder(size: Size, component: Component, dtype: Dtype) -> PathBuf {
    let path = scratch().join(format!("{size}-{component}-{dtype}")).join("model.safetensors");
    write(|plan| plan.add_encoder(&path, size, component, dtype, Naming::Hf));
    path
}

/// Writes what is not there yet. Tests run at once: complete files appear by renaming.
fn write(add: impl FnOnce(&mut Plan)) {
    let mut plan = Plan::default();
    add(&mut plan);
    plan.write(&mut |_| {}).expect("the target directory is writable");
}

/// Copies a file, so that a test can damage it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).expect("the temporary directory is writable");
}
