//! Golden cases of ComfyUI 0.3.64, tiny and true-size models, f32 and f16 storage.

use std::{collections::BTreeMap, sync::Arc};

use adapter::{Array, Diff, Patch, PatchSet, Target};
use fixtures::Size;
use luna_worker::{
    execution::{EncodeJob, EncodePrompt, Encoding, Execution, Functional, StackEntry},
    model::{LayerModule, LoadedModel, Module},
};
use protocol::{Dtype, Family, request::EncodeOptions};

use crate::{
    cases::{Case, Golden},
    models::{entry, model},
};

#[test]
fn tiny_sd15_in_f32_matches() {
    assert_all_match(Size::Tiny, Family::Sd15, Dtype::Float32, 2e-5, 61);
}

#[test]
fn tiny_sd15_in_f16_matches() {
    assert_all_match(Size::Tiny, Family::Sd15, Dtype::Float16, 1e-3, 27);
}

#[test]
fn tiny_sdxl_in_f32_matches() {
    assert_all_match(Size::Tiny, Family::Sdxl, Dtype::Float32, 2e-5, 67);
}

#[test]
fn tiny_sdxl_in_f16_matches() {
    assert_all_match(Size::Tiny, Family::Sdxl, Dtype::Float16, 1e-3, 29);
}

#[test]
fn full_sd15_in_f32_matches() {
    assert_all_match(Size::Full, Family::Sd15, Dtype::Float32, 1e-4, 8);
}

#[test]
fn full_sd15_in_f16_matches() {
    assert_all_match(Size::Full, Family::Sd15, Dtype::Float16, 3e-4, 8);
}

#[test]
fn full_sdxl_in_f32_matches() {
    assert_all_match(Size::Full, Family::Sdxl, Dtype::Float32, 1e-4, 6);
}

/// Runs every case, `expected` of them, and reports the worst, overall and for every LoRA.
fn assert_all_match(size: Size, family: Family, dtype: Dtype, tolerance: f32, expected: usize) {
    let golden = Golden::read(size, family, dtype);
    let model = model(size, family, dtype);
    let mut worst: BTreeMap<&str, f32> = BTreeMap::new();
    let mut too_far = Vec::new();
    for case in &golden.cases {
        let encoding = encode(&model, size, case);
        let distance = golden.distance(case, &encoding.conditionings);
        let hook = case.hook.iter().map(|(name, _)| name);
        for name in case.stack.iter().map(|(name, _)| name).chain(hook) {
            let worst = worst.entry(name.as_str()).or_default();
            *worst = worst.max(distance);
        }
        let all = worst.entry("all cases").or_default();
        *all = all.max(distance);
        if distance > tolerance {
            too_far.push((&case.id, distance));
        }
    }
    report(&format!("{size} {family} {dtype}: {} cases, worst {worst:?}", golden.cases.len()));
    assert_eq!(golden.cases.len(), expected);
    assert!(too_far.is_empty(), "more than {tolerance} away: {too_far:?}");
}

fn encode(model: &LoadedModel, size: Size, case: &Case) -> Encoding {
    let entries = case.stack.iter();
    let stack = entries.map(|(name, by)| entry(size, model.family, name, *by));
    let scales = case.factors.iter().map(|(part, factor)| scale(model, *part, *factor));
    let prompt = EncodePrompt::from(case.tokens.clone());
    let prompts = match &case.hook {
        None => vec![prompt],
        Some((name, strengths)) => {
            let hook = |by: &f64| vec![entry(size, model.family, name, *by)];
            let hooked = |by| EncodePrompt { hook_stack: hook(by), ..prompt.clone() };
            strengths.iter().map(hooked).collect()
        }
    };
    let job = EncodeJob {
        prompts,
        stack: stack.chain(scales).collect(),
        options: EncodeOptions {
            clip_skip: case.skip,
            projected: case.node != "unprojected",
            ..EncodeOptions::default()
        },
    };
    Functional.encode(model, &job).unwrap()
}

/// `CLIPAttentionMultiply`: patches that do nothing but scale the weight.
fn scale(model: &LoadedModel, part: LayerModule, factor: f64) -> StackEntry {
    let mut patches = BTreeMap::new();
    for (&component, encoder) in &model.components {
        let config = encoder.config();
        for layer in 0..config.layers {
            let module = Module::Layer(layer, part);
            for parameter in [module.weight(), module.bias()] {
                let shape = config.shape(parameter).unwrap();
                let zeros = vec![0; 4 * shape.iter().product::<usize>()];
                let value = Array::new(Dtype::Float32, &shape, zeros).unwrap();
                let target = Target::new(component, &parameter.to_string()).unwrap();
                patches.insert(target, Patch::Diff(Diff::new(value)));
            }
        }
    }
    let adapter = PatchSet::new(patches, []).unwrap();
    let (id, adapter) = (adapter.id(), Arc::new(adapter));
    StackEntry { id, adapter, strength_patch: 0.0, strength_model: factor }
}

#[expect(clippy::print_stderr, reason = "the distances are worth reading when a test passes, too")]
fn report(line: &str) {
    eprintln!("{line}");
}
