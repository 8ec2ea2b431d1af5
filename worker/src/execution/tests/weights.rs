//! The weights that a job sees: which are its own, and how far they are from plain f64 arithmetic.

use std::{collections::BTreeMap, sync::Arc};

use adapter::{Array, Diff, Patch, PatchSet, Target};
use candle_core::Tensor;
use half::f16;
use protocol::{Component, Dtype, ExecutionMode, Family, Fidelity, MergedWeights};

use super::{BUDGET_BYTES, CheckedJob, EncodeJob, StackEntry, keeping, with_stack};
use crate::{
    execution::{
        locking,
        merged_cache::MergedCache,
        modes::{ModeSettings, Modes},
        pass::{Common, base, stages},
        stage::Tally,
    },
    model::{LayerModule, LoadedModel, Module, Parameter, Parameters as _},
    testing::{entry, model, prompt},
};

const FAMILY: Family = Family::Sd15;
const LAYER: usize = 2;

/// Every weight of one component as a job sees it.
type Seen = BTreeMap<Parameter, Tensor>;

#[test]
fn a_stack_on_one_layer_allocates_the_weights_of_that_layer_alone() {
    let model = model(FAMILY, Dtype::Float16);
    let job = with_stack(FAMILY, vec![on_layer(&model)]);
    let checked = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();
    for seen in [seen_virtually(&checked), seen_attached(&checked)] {
        let held = &model.read()[&Component::ClipL];
        let is_own = |(parameter, tensor): &(&Parameter, &Tensor)| {
            // A tensor shares its memory with the model's if it is the same by id; the embedding,
            // held in f16, is widened at every use.
            let held = held.stored(**parameter).unwrap();
            held.dtype() == tensor.dtype() && held.id() != tensor.id()
        };
        let own: Vec<_> = seen.iter().filter(is_own).collect();
        assert!(own.iter().all(|(parameter, _)| is_of_layer(**parameter)));
        let bytes: usize = own.iter().map(|(_, tensor)| tensor.elem_count() * 4).sum();
        assert_eq!(bytes, layer_bytes(&model));
    }

    let execution = Modes::new(keeping());
    let run = || execution.encode(&model, &job).unwrap().merged_weights;
    let runs = [run(), run(), run(), run()];
    let (built, cached) = (Some(MergedWeights::Built), Some(MergedWeights::Cached));
    assert_eq!(runs, [built, built, cached, cached], "kept from the second use on");
    let statistics = execution.merged_statistics();
    assert_eq!(statistics.bytes, layer_bytes(&model) as u64);
    assert_eq!((statistics.built, statistics.cached, statistics.stacks), (2, 2, 1));
}

#[test]
fn exact_weights_are_those_of_f64_arithmetic_and_comfyuis_are_those_rounded() {
    let model = model(FAMILY, Dtype::Float16);
    let (first, second) = (entry(FAMILY, "kohya", 0.7), entry(FAMILY, "kohya_f16", -0.4));
    let job = with_stack(FAMILY, vec![first.clone(), second.clone()]);
    let exact = CheckedJob::check(&model, &job, Fidelity::Exact).unwrap();
    let rounded = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();
    let expected = reference(&model, &[first, second]);
    assert_eq!(expected.len(), 4 * 6, "every linear");
    for see in [seen_virtually, seen_attached] {
        let (exact, rounded) = (see(&exact), see(&rounded));
        for (parameter, expected) in &expected {
            let (exact, rounded) = (elements(&exact[parameter]), elements(&rounded[parameter]));
            for ((exact, rounded), expected) in exact.iter().zip(&rounded).zip(expected) {
                let distance = (f64::from(*exact) - expected).abs();
                assert!(distance <= 1e-6 * expected.abs().max(1.0), "{parameter}: {distance}");
                assert_eq!(f16::from_f32(*exact).to_bits(), f16::from_f32(*rounded).to_bits());
                assert_eq!(rounded.to_bits(), f16::from_f32(*rounded).to_f32().to_bits());
            }
        }
    }
}

#[test]
fn fidelities_differ_where_weights_are_rounded_and_agree_where_they_are_not() {
    let encoded = |storage, mode, fidelity| {
        let mut job = with_stack(FAMILY, vec![entry(FAMILY, "kohya", 0.7)]);
        job.prompts[0].hook_stack = vec![entry(FAMILY, "loha", 0.5)];
        (job.options.mode, job.options.fidelity) = (Some(mode), Some(fidelity));
        let execution = Modes::new(ModeSettings::default());
        let encoding = execution.encode(&model(FAMILY, storage), &job).unwrap();
        assert_eq!((encoding.mode, encoding.fidelity), (mode, fidelity));
        encoding.conditionings
    };
    let (comfyui, exact) = (Fidelity::Comfyui, Fidelity::Exact);
    for mode in [ExecutionMode::Locking, ExecutionMode::Functional] {
        let [f16, f32] = [Dtype::Float16, Dtype::Float32];
        assert_ne!(encoded(f16, mode, comfyui), encoded(f16, mode, exact));
        assert_eq!(encoded(f32, mode, comfyui), encoded(f32, mode, exact));
    }
}

#[test]
fn an_embedding_that_is_attached_or_kept_stays_in_the_type_that_it_is_held_in() {
    let model = model(FAMILY, Dtype::Float16);
    let held = model.read()[&Component::ClipL].stored(TABLE).unwrap().dtype();
    // Column slices of a table cannot be merged row by row.
    let name = format!("clip_l.transformer.{TABLE}[1:8:8]");
    let value = Array::new(Dtype::Float32, &[49408, 8], vec![0x3c; 4 * 8 * 49408]).unwrap();
    let patches =
        BTreeMap::from([(name.parse::<Target>().unwrap(), Patch::Diff(Diff::new(value)))]);
    let stack = vec![stacked(PatchSet::new(patches, []).unwrap())];
    let job = with_stack(FAMILY, stack);
    let checked = CheckedJob::check(&model, &job, Fidelity::Comfyui).unwrap();

    let mut attached = model.attach();
    locking::attach(&checked, &mut attached, (&|| Ok(()), &Tally::default())).unwrap();
    let stored = attached[&Component::ClipL].attached().stored(TABLE).unwrap();
    assert_eq!(stored.dtype(), held);
    assert_ne!(stored.id(), attached[&Component::ClipL].originals().stored(TABLE).unwrap().id());
    drop(attached);

    let execution = Modes::new(keeping());
    let answers = [(); 3].map(|()| execution.encode(&model, &job).unwrap());
    assert_eq!(answers[2].merged_weights, Some(MergedWeights::Cached));
    assert_eq!(answers[2].conditionings, answers[0].conditionings);
    let table = 49408 * 32;
    assert_eq!(execution.merged_statistics().bytes, (table * held.size_in_bytes()) as u64);
}

#[test]
fn what_exceeds_the_budget_is_built_every_time_and_pushes_nothing_out() {
    let model = model(FAMILY, Dtype::Float16);
    let small = with_stack(FAMILY, vec![on_layer(&model)]);
    let large = with_stack(FAMILY, vec![entry(FAMILY, "kohya", 1.0)]);
    let merged_budget_bytes = layer_bytes(&model) as u64;
    let execution = Modes::new(ModeSettings { merged_budget_bytes, ..ModeSettings::default() });
    let run = |job: &EncodeJob| execution.encode(&model, job).unwrap().merged_weights;
    for _ in 0..3 {
        run(&small);
    }
    for _ in 0..3 {
        assert_eq!(run(&large), Some(MergedWeights::Built));
    }
    assert_eq!(run(&small), Some(MergedWeights::Cached));
    assert_eq!(run(&EncodeJob::new([prompt(FAMILY, 5)], vec![])), None);
    let statistics = execution.merged_statistics();
    assert_eq!((statistics.evicted, statistics.bytes), (0, merged_budget_bytes));
}

#[test]
fn kept_weights_are_told_apart_by_model_strength_fidelity_and_stack_below() {
    let execution = Modes::new(keeping());
    let models = [Dtype::Float16, Dtype::Float32].map(|dtype| model(FAMILY, dtype));
    let mut jobs = Vec::new();
    for strength in [0.5, 0.500_000_1] {
        for below in [vec![], vec![entry(FAMILY, "loha", 0.3)]] {
            for fidelity in [Fidelity::Comfyui, Fidelity::Exact] {
                let mut job = with_stack(FAMILY, below.clone());
                job.prompts[0].hook_stack = vec![entry(FAMILY, "kohya", strength)];
                job.options.fidelity = Some(fidelity);
                jobs.push(job);
            }
        }
    }
    let fresh = || Modes::new(ModeSettings::default());
    for _ in 0..3 {
        for model in &models {
            for job in &jobs {
                let kept = execution.encode(model, job).unwrap().conditionings;
                assert_eq!(kept, fresh().encode(model, job).unwrap().conditionings);
            }
        }
    }
    // All of the third round, and of the second where f32 is stored: there both fidelities are one.
    assert_eq!(execution.merged_statistics().cached, 2 * 8 + 8);
}

const TABLE: Parameter = Module::TokenEmbedding.weight();

/// Differences on every parameter of one layer.
fn on_layer(model: &LoadedModel) -> StackEntry {
    let config = model.components[&Component::ClipL].config();
    let parameters = config.parameters().into_iter().filter(|parameter| is_of_layer(*parameter));
    let patches = parameters.map(|parameter| {
        let shape = config.shape(parameter).unwrap();
        let bytes = 0.25f32.to_le_bytes().repeat(shape.iter().product());
        let value = Array::new(Dtype::Float32, &shape, bytes).unwrap();
        let target = Target::new(Component::ClipL, &parameter.to_string()).unwrap();
        (target, Patch::Diff(Diff::new(value)))
    });
    stacked(PatchSet::new(patches.collect(), []).unwrap())
}

fn stacked(adapter: PatchSet) -> StackEntry {
    let id = adapter.id();
    StackEntry { id, adapter: Arc::new(adapter), strength_patch: 1.0, strength_model: 1.0 }
}

fn is_of_layer(parameter: Parameter) -> bool {
    matches!(parameter.module, Module::Layer(LAYER, _))
}

/// Bytes of one layer as held.
fn layer_bytes(model: &LoadedModel) -> usize {
    let config = model.components[&Component::ClipL].config();
    let parameters = LayerModule::ALL.iter().flat_map(|module| {
        let module = Module::Layer(LAYER, *module);
        [module.weight(), module.bias()]
    });
    4 * parameters.map(|p| config.shape(p).unwrap().iter().product::<usize>()).sum::<usize>()
}

/// The weights that FUNCTIONAL shows.
fn seen_virtually(job: &CheckedJob<'_>) -> Seen {
    let held = job.model.read();
    let base = base(&held);
    let (watch, tally) = (&|| Ok(()), Tally::default());
    let common = Common { job, below: &base, watch, tally: &tally };
    let cache = MergedCache::new(BUDGET_BYTES);
    let stages = stages(common, &job.stack, cache.keep(job, &held, &[&job.stack]));
    let parameters = job.model.components[&Component::ClipL].config().parameters().into_iter();
    parameters.map(|p| (p, stages[&Component::ClipL].parameter(p).unwrap())).collect()
}

/// The weights that LOCKING attaches.
fn seen_attached(job: &CheckedJob<'_>) -> Seen {
    let mut model = job.model.attach();
    locking::attach(job, &mut model, (&|| Ok(()), &Tally::default())).unwrap();
    let parameters = job.model.components[&Component::ClipL].config().parameters().into_iter();
    parameters.map(|p| (p, model[&Component::ClipL].parameter(p).unwrap())).collect()
}

/// `W + Σ strength · scale · up · down` in f64 for every weight that low-rank `entries` change.
fn reference(model: &LoadedModel, entries: &[StackEntry]) -> BTreeMap<Parameter, Vec<f64>> {
    let held = &model.read()[&Component::ClipL];
    let mut weights: BTreeMap<Parameter, Vec<f64>> = BTreeMap::new();
    for entry in entries {
        for (target, patch) in entry.adapter.patches() {
            let Patch::LowRank(patch) = patch else { panic!("a low-rank patch") };
            let parameter: Parameter = target.parameter().parse().unwrap();
            let weight = weights.entry(parameter).or_insert_with(|| {
                let elements = elements(held.stored(parameter).unwrap());
                elements.into_iter().map(f64::from).collect()
            });
            let (up, down) = (patch.up().to_f32(), patch.down().to_f32());
            let (rank, cols) = (patch.down().rows(), patch.down().cols());
            for (index, element) in weight.iter_mut().enumerate() {
                let (row, col) = (index / cols, index % cols);
                let product = |inner: usize| {
                    f64::from(up[row * rank + inner]) * f64::from(down[inner * cols + col])
                };
                let delta: f64 = (0..rank).map(product).sum();
                *element += entry.strength_patch * patch.scale() * delta;
            }
        }
    }
    weights
}

fn elements(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
