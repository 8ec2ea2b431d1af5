//! Golden cases of ComfyUI 0.3.64, tiny and true-size models, f32 and f16 storage.

use std::{collections::BTreeMap, sync::Arc};

use adapter::{Patch, PatchSet, Target};
use fixtures::Size;
use luna_worker::{
    execution::{EncodeJob, EncodePrompt, Encoding, ModeSettings, Modes, StackEntry},
    model::{LayerModule, LoadedModel, Module},
};
use protocol::{
    Dtype, ExecutionMode, Family, MergedWeights,
    request::{EncodeOptions, Matching},
};

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

/// Runs every case, `expected` of them, in every mode, and reports the worst, overall and for every
/// LoRA.
fn assert_all_match(size: Size, family: Family, dtype: Dtype, tolerance: f32, expected: usize) {
    let golden = Golden::read(size, family, dtype);
    let model = model(size, family, dtype);
    let execution =
        Modes::new(ModeSettings { merged_budget_bytes: 4 << 30, ..ModeSettings::default() });
    let mut too_far = Vec::new();
    for mode in [ExecutionMode::Locking, ExecutionMode::Functional] {
        let mut worst: BTreeMap<&str, f32> = BTreeMap::new();
        for case in &golden.cases {
            let job = job(&model, size, case, mode);
            let encoding = execution.encode(&model, &job).unwrap();
            assert_eq!(encoding.mode, mode);
            if mode == ExecutionMode::Functional && size == Size::Tiny {
                assert_stays_the_same(&execution, &model, (&job, &encoding));
            }
            let distance = golden.distance(case, &encoding.conditionings);
            let hook = case.hook.iter().map(|(name, _)| name);
            for name in case.stack.iter().map(|(name, _)| name).chain(hook) {
                let worst = worst.entry(name.as_str()).or_default();
                *worst = worst.max(distance);
            }
            let all = worst.entry("all cases").or_default();
            *all = all.max(distance);
            if distance > tolerance {
                too_far.push((mode, &case.id, distance));
            }
        }
        report(&format!("{size} {family} {dtype}, {mode}: {} cases", golden.cases.len()));
        for (name, distance) in worst {
            report(&format!("  {name:<20} {distance:.1e}"));
        }
    }
    assert_eq!(golden.cases.len(), expected);
    assert!(too_far.is_empty(), "more than {tolerance} away: {too_far:?}");
}

/// Runs `job` until its merged weights are kept, and once with them: the same to the last bit as the
/// `first` time.
fn assert_stays_the_same(
    execution: &Modes,
    model: &LoadedModel,
    (job, first): (&EncodeJob, &Encoding),
) {
    let [kept, taken] = [(); 2].map(|()| execution.encode(model, job).unwrap());
    assert_eq!(kept.conditionings, first.conditionings);
    assert_eq!(taken.conditionings, first.conditionings);
    let expected = first.merged_weights.map(|_| MergedWeights::Cached);
    assert_eq!(taken.merged_weights, expected);
}

fn job(model: &LoadedModel, size: Size, case: &Case, mode: ExecutionMode) -> EncodeJob {
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
    let options = EncodeOptions {
        clip_skip: case.skip,
        projected: case.node != "unprojected",
        mode: Some(mode),
        // ComfyUI goes without keys that the model does not have.
        matching: Matching::Lenient,
        ..EncodeOptions::default()
    };
    EncodeJob { prompts, options, ..EncodeJob::new([], stack.chain(scales).collect()) }
}

/// `CLIPAttentionMultiply`: patches that do nothing but scale the weight.
fn scale(model: &LoadedModel, part: LayerModule, factor: f64) -> StackEntry {
    let mut patches = BTreeMap::new();
    for (&component, encoder) in &model.components {
        for layer in 0..encoder.config().layers {
            let module = Module::Layer(layer, part);
            for parameter in [module.weight(), module.bias()] {
                let target = Target::new(component, &parameter.to_string()).unwrap();
                patches.insert(target, Patch::Unchanged);
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
