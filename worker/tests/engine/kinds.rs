//! Patches that only ComfyUI's nodes make, slices, and what this version does not run.

use std::{collections::BTreeMap, sync::Arc};

use adapter::{Array, Diff, ModelAsLora, Patch, PatchSet, Target};
use fixtures::Size;
use luna_worker::{
    conditioning::Conditioning,
    execution::{EncodeError, EncodeJob, Encoding, ModeSettings, Modes, StackEntry},
    model::{LoadedModel, Parameter},
};
use protocol::{Component, Dtype, ErrorCode, ExecutionMode, Family, Fidelity};

use crate::models::{entry, model, word};

const FC1: &str = "text_model.encoder.layers.0.mlp.fc1.weight";
const TABLE: &str = "text_model.embeddings.token_embedding.weight";
const MODES: [ExecutionMode; 2] = [ExecutionMode::Locking, ExecutionMode::Functional];

#[test]
fn a_model_as_lora_goes_from_the_models_own_weight_even_as_a_hook_on_a_stack() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    for name in [FC1, TABLE] {
        let own = own_weight(&model, name);
        let other: Vec<f32> =
            own.iter().zip(0u8..=250).map(|(x, i)| x + f32::from(i) / 500.0).collect();
        let other = [other.as_slice(), &own[251..]].concat();
        let way: Vec<f32> = other.iter().zip(&own).map(|(other, own)| other - own).collect();
        let shape = shape(&model, name);
        let as_lora = on(name, Patch::ModelAsLora(ModelAsLora::new(array(&shape, &other))));
        let as_diff = on(name, Patch::Diff(Diff::new(array(&shape, &way))));
        let whole = on(name, Patch::ModelAsLora(ModelAsLora::new(array(&shape, &own))));
        let stack = vec![entry(Size::Tiny, Family::Sd15, "kohya", 0.8), as_diff.clone()];
        for mode in MODES {
            let hooked = |hook: &StackEntry| {
                let mut job = EncodeJob::new([word(Family::Sd15, 100)], stack.clone());
                job.prompts[0].hook_stack = vec![hook.clone()];
                run(&model, job, mode).unwrap().conditionings.remove(0)
            };
            assert_close(&hooked(&as_lora), &hooked(&as_diff));
            let none = EncodeJob::new([word(Family::Sd15, 100)], stack.clone());
            let none = run(&model, none, mode).unwrap().conditionings.remove(0);
            assert_eq!(hooked(&whole), none, "the way to itself is none");
        }
    }
}

#[test]
fn slices_of_a_weight_together_are_the_whole() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float16);
    let values: Vec<f32> = (0u16..128 * 32).map(|i| f32::from(i % 7) / 8.0 - 0.3).collect();
    let rows = |range: std::ops::Range<usize>| {
        let value = array(&[range.len(), 32], &values[range.start * 32..range.end * 32]);
        Patch::Diff(Diff::new(value))
    };
    let whole = on(FC1, rows(0..128));
    let sliced = |slices: &[(usize, usize)]| {
        let patches = slices.iter().map(|&(start, end)| {
            let name = format!("clip_l.transformer.{FC1}[0:{start}:{}]", end - start);
            (name.parse::<Target>().unwrap(), rows(start..end))
        });
        stacked(PatchSet::new(patches.collect(), []).unwrap())
    };
    for mode in MODES {
        let encode = |entry: StackEntry| {
            let entry = StackEntry { strength_model: 0.5, ..entry };
            run(&model, EncodeJob::new([word(Family::Sd15, 100)], vec![entry]), mode).unwrap()
        };
        let (all, parts) = (encode(whole.clone()), encode(sliced(&[(0, 40), (40, 128)])));
        assert_eq!(all.conditionings, parts.conditionings);
        let part = encode(sliced(&[(0, 40)]));
        assert_ne!(part.conditionings, all.conditionings);
        assert_eq!(part.stack[0].applied, 1);
    }
}

#[test]
fn a_slice_beyond_its_weight_fails_and_does_not_scale_it_either() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let beyond: Target = format!("clip_l.transformer.{FC1}[0:100:29]").parse().unwrap();
    let fitting: Target = "clip_l.transformer.text_model.final_layer_norm.bias".parse().unwrap();
    let with = |patches: Vec<(&Target, Patch)>| {
        let patches = patches.into_iter().map(|(target, patch)| (target.clone(), patch));
        let entry = stacked(PatchSet::new(patches.collect(), []).unwrap());
        let stack = vec![StackEntry { strength_model: 0.5, ..entry }];
        run(&model, EncodeJob::new([word(Family::Sd15, 100)], stack), ExecutionMode::Locking)
    };
    let both = with(vec![(&beyond, Patch::Unchanged), (&fitting, Patch::Unchanged)]).unwrap();
    let alone = with(vec![(&fitting, Patch::Unchanged)]).unwrap();
    assert_eq!(both.conditionings, alone.conditionings);
    let [failed] = both.stack[0].failed.as_slice() else { panic!("one patch cannot be applied") };
    assert_eq!(failed.key, beyond.to_string());
    assert_eq!(failed.reason, "the weight is [128, 32], which has no slice [0:100:29]");
    assert_eq!(both.stack[0].applied, 1);
    assert_eq!(
        with(vec![(&beyond, Patch::Unchanged)]).unwrap_err().code(),
        ErrorCode::LoraMismatch
    );
}

#[test]
fn what_this_version_does_not_run_is_unsupported_whoever_asks_for_it() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let job = EncodeJob::new([word(Family::Sd15, 100)], vec![]);
    let code = |settings, job: &EncodeJob| {
        Modes::new(settings).encode(&model, job).map_err(|error| error.code()).err()
    };
    let batched = ModeSettings { mode: ExecutionMode::Batched, ..ModeSettings::default() };
    let fast = ModeSettings { fidelity: Fidelity::Fast, ..ModeSettings::default() };
    for settings in [batched, fast] {
        assert_eq!(code(settings, &job), Some(ErrorCode::Unsupported));
        let mut asking = job.clone();
        asking.options.mode = Some(settings.mode);
        asking.options.fidelity = Some(settings.fidelity);
        assert_eq!(code(ModeSettings::default(), &asking), Some(ErrorCode::Unsupported));
        // A request that asks for something else than the worker's setting gets it.
        asking.options.mode = Some(ExecutionMode::Locking);
        asking.options.fidelity = Some(Fidelity::Exact);
        assert_eq!(code(settings, &asking), None);
    }
}

fn run(
    model: &LoadedModel,
    mut job: EncodeJob,
    mode: ExecutionMode,
) -> Result<Encoding, EncodeError> {
    job.options.mode = Some(mode);
    Modes::new(ModeSettings::default()).encode(model, &job)
}

fn on(parameter: &str, patch: Patch) -> StackEntry {
    let target = Target::new(Component::ClipL, parameter).unwrap();
    stacked(PatchSet::new(BTreeMap::from([(target, patch)]), []).unwrap())
}

fn stacked(adapter: PatchSet) -> StackEntry {
    let id = adapter.id();
    StackEntry { id, adapter: Arc::new(adapter), strength_patch: 1.0, strength_model: 1.0 }
}

fn array(shape: &[usize], elements: &[f32]) -> Array {
    let bytes = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
    Array::new(Dtype::Float32, shape, bytes).unwrap()
}

fn own_weight(model: &LoadedModel, name: &str) -> Vec<f32> {
    let parameter: Parameter = name.parse().unwrap();
    let held = &model.read()[&Component::ClipL];
    held.stored(parameter).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn shape(model: &LoadedModel, name: &str) -> Vec<usize> {
    model.components[&Component::ClipL].config().shape(name.parse().unwrap()).unwrap()
}

fn assert_close(left: &Conditioning, right: &Conditioning) {
    let distances = left.cond.elements.iter().zip(&right.cond.elements);
    let distance = distances.map(|(left, right)| (left - right).abs()).fold(0.0, f32::max);
    assert!(distance < 1e-5, "{distance}");
}
