//! Stacks: what one changes, what one must not change, and what is refused.

use std::{collections::BTreeMap, sync::Arc};

use adapter::{Array, Boft, Diff, LowRank, Matrix, Patch, PatchSet, Target};
use fixtures::Size;
use luna_worker::{
    execution::{
        Applied, EncodeError, EncodeJob, EncodePrompt, Encoding, ModeSettings, Modes, StackEntry,
        StackError,
    },
    model::LoadedModel,
};
use protocol::{Chunk, Component, Dtype, ErrorCode, Family, request::Matching};

use crate::models::{entry, model, word};

const FC1: &str = "text_model.encoder.layers.0.mlp.fc1.weight";

#[test]
fn a_stack_applies_to_its_own_job_alone() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float16);
    let base = encode(&model, &[cat()], &[]).unwrap().conditionings;
    let entry = entry(Size::Tiny, Family::Sdxl, "kohya", 1.0);
    let patched = encode(&model, &[cat()], &[entry]).unwrap().conditionings;

    assert_ne!(patched, base);
    assert_eq!(encode(&model, &[cat()], &[]).unwrap().conditionings, base);
}

#[test]
fn an_entry_that_changes_nothing_gives_the_base_answer() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float16);
    let base = encode(&model, &[cat()], &[]).unwrap().conditionings;
    let entry = entry(Size::Tiny, Family::Sdxl, "kohya", 0.0);
    let neutral = encode(&model, &[cat()], &[entry]).unwrap();

    assert_eq!(neutral.conditionings, base);
    assert_eq!(neutral.stack[0].applied, 0);
}

#[test]
fn prompts_of_one_job_are_encoded_as_if_alone() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float32);
    let mut long = word(Family::Sdxl, 1125);
    for tokens in long.values_mut() {
        let weights = (0..77).map(|i| if i == 1 { 1.3 } else { 1.0 }).collect();
        let weighted = Chunk { weights, ..tokens.chunks[0].clone() };
        tokens.chunks = vec![weighted; 20];
    }
    let prompts = [cat(), long, word(Family::Sdxl, 320)];
    let stack = [entry(Size::Tiny, Family::Sdxl, "kohya", 0.8)];

    let together = encode(&model, &prompts, &stack).unwrap().conditionings;
    for (prompt, together) in prompts.into_iter().zip(together) {
        let alone = encode(&model, &[prompt], &stack).unwrap().conditionings.remove(0);
        assert_eq!(together.cond.shape, alone.cond.shape);
        assert_close(&together.cond.elements, &alone.cond.elements);
        assert_close(&together.pooled.elements, &alone.pooled.elements);
    }
}

#[test]
fn the_components_of_a_model_can_be_encoded_one_by_one() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float32);
    let joined = encode(&model, &[cat()], &[]).unwrap().conditionings.remove(0);
    let only = |component| {
        let mut prompt = cat();
        prompt.retain(|other, _| *other == component);
        encode(&model, &[prompt], &[]).unwrap().conditionings.remove(0)
    };
    let (l, g) = (only(Component::ClipL), only(Component::ClipG));

    assert_eq!((l.cond.shape, g.cond.shape.clone()), (vec![1, 77, 32], vec![1, 77, 48]));
    assert_close(&joined.cond.elements[..32], &l.cond.elements[..32]);
    assert_close(&joined.cond.elements[32..80], &g.cond.elements[..48]);
    assert_close(&joined.pooled.elements, &g.pooled.elements);
    assert_eq!(l.pooled.shape, [1, 32]);
}

#[test]
fn the_report_lists_what_was_applied_and_what_the_model_does_not_have() {
    let sd15 = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let stack = [entry(Size::Tiny, Family::Sdxl, "kohya", 1.0)];
    let prompts = [word(Family::Sd15, 2368)];
    let [applied] = encode_leniently(&sd15, &prompts, &stack).unwrap().stack.try_into().unwrap();

    assert_eq!(applied.adapter, stack[0].id);
    assert_eq!(applied.applied, 4 * 6, "every linear of clip_l");
    assert_eq!(applied.not_matched.len(), 5 * 6, "every linear of clip_g");
    assert!(applied.not_matched.iter().all(|key| key.starts_with("clip_g.transformer.")));

    let refused = encode(&sd15, &prompts, &stack).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::LoraMismatch);
    let message = refused.to_string();
    assert!(message.contains("has 30 text-encoder keys"), "{message}");
    assert_eq!(message.matches("`clip_g.transformer.").count(), 3, "{message}");
    assert!(message.contains("27 more") && message.contains("`lenient`"), "{message}");
}

#[test]
fn a_key_that_nothing_reads_is_an_error_unless_the_request_is_lenient() {
    let sd15 = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let target = Target::new(Component::ClipL, FC1).unwrap();
    let unknown = "lora_te_text_model_encoder_layers_0_mlp_fc9".to_owned();
    let patches = PatchSet::new(BTreeMap::from([(target, diff(&[128, 32]))]), [unknown.clone()]);
    let entry = stacked(patches.unwrap());
    let prompts = [word(Family::Sd15, 2368)];

    let refused = encode(&sd15, &prompts, std::slice::from_ref(&entry)).unwrap_err();
    assert_eq!(refused.code(), ErrorCode::LoraMismatch);
    assert!(refused.to_string().contains(&unknown), "{refused}");
    let applied = &encode_leniently(&sd15, &prompts, &[entry]).unwrap().stack[0];
    assert_eq!((applied.applied, &applied.not_matched), (1, &vec![unknown]));
}

#[test]
fn patches_of_a_component_that_is_not_encoded_are_neither_applied_nor_unmatched() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float32);
    let stack = [entry(Size::Tiny, Family::Sdxl, "kohya", 1.0)];
    let mut only_g = cat();
    only_g.remove(&Component::ClipL);
    let applied = encode(&model, &[only_g.clone()], &stack).unwrap().stack.remove(0);
    assert_eq!((applied.applied, applied.not_matched.len()), (5 * 6, 0));

    // What is there for the other component alone is no error, and changes nothing.
    let other = patched(Component::ClipL, vec![(FC1, diff(&[128, 32]))]);
    let encoding = encode(&model, &[only_g], &[other]).unwrap();
    assert_eq!((encoding.stack[0].applied, encoding.merged_weights), (0, None));
}

#[test]
fn an_adapter_that_fits_nowhere_is_an_error() {
    let sd15 = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let beyond = "text_model.encoder.layers.4.mlp.fc1.weight";
    for stack in [
        low_rank(Component::ClipG, FC1, [128, 32]),
        low_rank(Component::ClipL, beyond, [128, 32]),
        low_rank(Component::ClipL, "text_projection.weight", [32, 32]),
    ] {
        let target = stack.adapter.patches().keys().next().unwrap().to_string();
        let error = encode(&sd15, &[word(Family::Sd15, 2368)], &[stack]).unwrap_err();
        assert_eq!(error.code(), ErrorCode::LoraMismatch);
        assert!(error.to_string().contains(&target), "{error}");
    }
}

#[test]
fn an_adapter_without_text_encoder_keys_changes_nothing_and_is_no_error() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let empty = stacked(PatchSet::default());
    let encoding = encode(&model, &[word(Family::Sd15, 2368)], &[empty]).unwrap();
    assert_eq!((encoding.stack[0].applied, encoding.stack[0].not_matched.len()), (0, 0));
}

#[test]
fn a_patch_of_another_shape_is_an_error_that_names_both_shapes() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let entry = low_rank(Component::ClipL, FC1, [3072, 768]);
    let error = encode(&model, &[word(Family::Sd15, 2368)], &[entry]).unwrap_err();

    assert_eq!(error.code(), ErrorCode::LoraMismatch);
    let message = error.to_string();
    for part in [FC1, "[128, 32]", "[3072, 768]"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_strength_that_is_no_number_is_refused() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    for strength in [f64::NAN, f64::INFINITY] {
        let entry = entry(Size::Tiny, Family::Sd15, "kohya", strength);
        let error = encode(&model, &[word(Family::Sd15, 2368)], &[entry]).unwrap_err();
        assert!(matches!(error, EncodeError::Stack(StackError::Strength { .. })), "{error}");
    }
}

#[test]
fn strength_model_scales_the_weight_before_the_patch() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let base = encode(&model, &[word(Family::Sd15, 2368)], &[]).unwrap().conditionings;
    let with = |strength_patch, strength_model| {
        let entry = StackEntry {
            strength_patch,
            strength_model,
            ..entry(Size::Tiny, Family::Sd15, "kohya", 0.0)
        };
        encode(&model, &[word(Family::Sd15, 2368)], &[entry.clone(), entry]).unwrap().conditionings
    };
    assert_ne!(with(0.0, 0.5), base);
    // Twice -1 restores every patched weight exactly.
    assert_eq!(with(0.0, -1.0), base);
}

#[test]
fn patches_that_cannot_be_applied_are_reported_and_leave_their_weights() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    // The second of the two layers of this file has no alpha, which BOFT needs.
    let boft = entry(Size::Tiny, Family::Sd15, "boft", 0.8);
    let report = &encode(&model, &[word(Family::Sd15, 2368)], &[boft]).unwrap().stack[0];
    let [failed] = report.failed.as_slice() else { panic!("one patch cannot be applied") };
    assert_eq!(report.applied, 1);
    let key = "clip_l.transformer.text_model.encoder.layers.1.self_attn.v_proj.weight";
    assert_eq!(failed.key, key);
    assert!(failed.reason.contains("without alpha"), "{failed}");

    // One difference of another size beside one that fits gives what the fitting one gives alone.
    let norm = "text_model.final_layer_norm.bias";
    let misfit = (norm, diff(&[31]));
    let with = |patches: Vec<(&str, Patch)>| {
        let prompts = [word(Family::Sd15, 2368)];
        encode(&model, &prompts, &[patched(Component::ClipL, patches)]).unwrap()
    };
    let both = with(vec![misfit, (FC1, diff(&[128, 32]))]);
    let alone = with(vec![(FC1, diff(&[128, 32]))]);
    assert_eq!(both.conditionings, alone.conditionings);
    assert_eq!((both.stack[0].applied, both.stack[0].failed.len()), (1, 1));
    assert!(both.stack[0].failed[0].reason.contains("[32], the patch is [31]"));
}

#[test]
fn an_adapter_none_of_whose_patches_can_be_applied_is_an_error() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let norm = "text_model.final_layer_norm.bias";
    let blocks = Array::new(Dtype::Float32, &[2, 32, 4, 4], vec![0; 4 * 1024]).unwrap();
    let boft = Patch::Boft(Boft::new(blocks, None, None).unwrap());
    for (parameter, patch, reason) in [
        (norm, diff(&[31]), "the weight is [32], the patch is [31]"),
        (FC1, diff(&[32, 128]), "the weight is [128, 32], the patch is [32, 128]"),
        (FC1, boft, "without alpha"),
    ] {
        let entry = patched(Component::ClipL, vec![(parameter, patch)]);
        let error = encode(&model, &[word(Family::Sd15, 2368)], &[entry]).unwrap_err();
        assert_eq!(error.code(), ErrorCode::LoraMismatch);
        let message = error.to_string();
        assert!(message.contains(parameter) && message.contains(reason), "{message}");
    }
}

#[test]
fn every_parameter_of_a_model_can_be_patched() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float32);
    let base = encode(&model, &[cat()], &[]).unwrap().conditionings.remove(0);
    let config = model.components[&Component::ClipG].config();
    for parameter in config.parameters() {
        let shape = config.shape(parameter).unwrap();
        let entry = patched(Component::ClipG, vec![(&parameter.to_string(), diff(&shape))]);
        let encoding = encode(&model, &[cat()], &[entry]).unwrap();
        assert_eq!(encoding.stack[0].applied, 1);
        // What is added to all keys alike, attention does not see.
        if !parameter.to_string().ends_with("k_proj.bias") {
            assert_ne!(encoding.conditionings[0], base, "{parameter} was not patched");
        }
    }
}

#[test]
fn a_weight_that_is_set_forgets_what_came_before_whatever_the_strength() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let set = |strength| entry(Size::Tiny, Family::Sd15, "set", strength);
    let kohya = entry(Size::Tiny, Family::Sd15, "kohya", 1.0);
    let with = |stack: &[StackEntry]| {
        encode(&model, &[word(Family::Sd15, 2368)], stack).unwrap().conditionings
    };
    assert_eq!(with(&[set(0.0)]), with(&[set(1.0)]));
    assert_ne!(with(&[set(0.0)]), with(&[]));
    assert_ne!(with(&[kohya.clone(), set(1.0)]), with(&[set(1.0), kohya]));
}

#[test]
fn hooks_apply_to_their_own_prompt_on_top_of_the_stack() {
    let model = model(Size::Tiny, Family::Sdxl, Dtype::Float32);
    let stack = [entry(Size::Tiny, Family::Sdxl, "kohya", 0.5)];
    let hook = |strength| vec![entry(Size::Tiny, Family::Sdxl, "loha", strength)];
    let plain = EncodePrompt::from(cat());
    let hooked = |strength| EncodePrompt { hook_stack: hook(strength), ..plain.clone() };
    let prompts = vec![hooked(0.8), plain.clone(), hooked(-0.4), hooked(0.8), hooked(0.0)];
    let job = EncodeJob { prompts, ..EncodeJob::new([], stack.to_vec()) };
    let together = modes().encode(&model, &job).unwrap();

    for (prompt, together) in job.prompts.iter().zip(&together.conditionings) {
        // In f32 nothing is rounded between the two, so the hook may as well be in the stack.
        let flat = [stack.to_vec(), prompt.hook_stack.clone()].concat();
        let alone = encode(&model, &[cat()], &flat).unwrap().conditionings.remove(0);
        assert_close(&together.cond.elements, &alone.cond.elements);
        assert_close(&together.pooled.elements, &alone.pooled.elements);
    }
    let applied = |hooks: &Vec<Applied>| hooks.iter().map(|hook| hook.applied).collect::<Vec<_>>();
    let all = (4 + 5) * 6;
    let expected = [vec![all], vec![], vec![all], vec![all], vec![0]];
    assert_eq!(together.hook_stacks.iter().map(applied).collect::<Vec<_>>(), expected);
}

#[test]
fn a_hook_that_does_not_fit_fails_the_job() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let hook_stack = vec![low_rank(Component::ClipL, FC1, [3072, 768])];
    let prompts = vec![EncodePrompt { tokens: word(Family::Sd15, 2368), hook_stack }];
    let job = EncodeJob { prompts, ..EncodeJob::new([], Vec::new()) };
    let error = modes().encode(&model, &job).unwrap_err();
    assert_eq!(error.code(), ErrorCode::LoraMismatch);
}

#[test]
fn prompts_that_do_not_fit_the_model_or_each_other_are_refused() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    let (one, both) = (word(Family::Sd15, 5), word(Family::Sdxl, 5));
    let message = |prompts: &[_]| encode(&model, prompts, &[]).unwrap_err().to_string();

    assert!(
        message(std::slice::from_ref(&both))
            .contains("`clip_g`, which family `sd15` does not have")
    );
    assert!(message(&[one.clone(), both]).contains("prompt 1 has tokens for other components"));
    assert!(message(&[BTreeMap::new()]).contains("tokens for no component"));
    let mut short = one.clone();
    short.get_mut(&Component::ClipL).unwrap().chunks[0].ids.pop();
    assert_eq!(message(&[one, short]), "prompt 1, `clip_l`: chunk 0 has 76 positions: expected 77");
}

fn encode(
    model: &LoadedModel,
    prompts: &[luna_worker::conditioning::PromptTokens],
    stack: &[StackEntry],
) -> Result<Encoding, EncodeError> {
    modes().encode(model, &EncodeJob::new(prompts.iter().cloned(), stack.to_vec()))
}

fn encode_leniently(
    model: &LoadedModel,
    prompts: &[luna_worker::conditioning::PromptTokens],
    stack: &[StackEntry],
) -> Result<Encoding, EncodeError> {
    let mut job = EncodeJob::new(prompts.iter().cloned(), stack.to_vec());
    job.options.matching = Matching::Lenient;
    modes().encode(model, &job)
}

fn modes() -> Modes {
    Modes::new(ModeSettings::default())
}

fn cat() -> luna_worker::conditioning::PromptTokens {
    word(Family::Sdxl, 2368)
}

fn patched(component: Component, patches: Vec<(&str, Patch)>) -> StackEntry {
    let patches = patches.into_iter();
    let patches = patches.map(|(name, patch)| (Target::new(component, name).unwrap(), patch));
    stacked(PatchSet::new(patches.collect(), []).unwrap())
}

/// A difference whose elements differ, so that layer norms do not take it away.
fn diff(shape: &[usize]) -> Patch {
    let values =
        (0..shape.iter().product::<usize>()).map(|i| if i % 3 == 0 { 1.0_f32 } else { -0.5 });
    let bytes = values.flat_map(f32::to_le_bytes).collect();
    Patch::Diff(Diff::new(Array::new(Dtype::Float32, shape, bytes).unwrap()))
}

fn low_rank(component: Component, parameter: &str, [rows, cols]: [usize; 2]) -> StackEntry {
    let ones = |rows: usize, cols: usize| {
        let bytes = 1f32.to_le_bytes().repeat(rows * cols);
        Matrix::new(Dtype::Float32, rows, cols, bytes).unwrap()
    };
    let patch = LowRank::new(ones(rows, 2), ones(2, cols), None, None).unwrap();
    let target = Target::new(component, parameter).unwrap();
    let patches = BTreeMap::from([(target, Patch::LowRank(patch))]);
    stacked(PatchSet::new(patches, []).unwrap())
}

fn stacked(adapter: PatchSet) -> StackEntry {
    let id = adapter.id();
    StackEntry { id, adapter: Arc::new(adapter), strength_patch: 1.0, strength_model: 1.0 }
}

/// Batches of other sizes may sum in another order.
fn assert_close(left: &[f32], right: &[f32]) {
    assert_eq!(left.len(), right.len());
    let distances = left.iter().zip(right).map(|(left, right)| (left - right).abs());
    assert!(distances.fold(0.0, f32::max) < 1e-5);
}
