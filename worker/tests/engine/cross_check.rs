//! Our forward pass against `candle-transformers`' on the same weights.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::text_model::{
    Activation, ClipTextConfig, ClipTextTransformer,
};
use fixtures::{LONG_CLIP_POSITIONS, Size, encoder_tensors, long_clip_tensors};
use luna_worker::{
    execution::{EncodeJob, ModeSettings, Modes},
    model::LoadedModel,
};
use protocol::{Chunk, Component, ComponentTokens, Dtype, Family};

use crate::models::{long_clip, model};

#[test]
fn the_last_hidden_state_is_that_of_candle_transformers() {
    let model = model(Size::Tiny, Family::Sd15, Dtype::Float32);
    check(&model, &encoder_tensors(Size::Tiny, Component::ClipL), 77);
}

#[test]
fn the_last_hidden_state_of_a_long_clip_is_that_of_candle_transformers() {
    let model = long_clip(Family::Sd15);
    check(&model, &long_clip_tensors(Size::Tiny), LONG_CLIP_POSITIONS);
}

/// Compares `model` with the reference on the same weights, for a chunk that it takes.
#[track_caller]
fn check(model: &LoadedModel, tensors: &[fixtures::Tensor], positions: usize) {
    let ids: Vec<u32> = (7..49406).step_by(641).cycle().take(positions).collect();
    let theirs = reference(tensors, &ids);

    let chunk = Chunk { ids, ..Chunk::default() };
    let tokens = ComponentTokens { chunks: vec![chunk], ..ComponentTokens::default() };
    let job = EncodeJob::new([BTreeMap::from([(Component::ClipL, tokens)])], Vec::new());
    let execution = Modes::new(ModeSettings::default());
    let ours = execution.encode(model, &job).unwrap().conditionings.remove(0).cond.elements;

    let distances = ours.iter().zip(&theirs).map(|(left, right)| (left - right).abs());
    assert_eq!(ours.len(), theirs.len());
    assert!(distances.fold(0.0, f32::max) < 1e-5);
}

fn reference(tensors: &[fixtures::Tensor], ids: &[u32]) -> Vec<f32> {
    let tensors: HashMap<String, Tensor> = tensors
        .iter()
        .map(|tensor| {
            let values = Tensor::from_vec(tensor.values(), tensor.shape(), &Device::Cpu).unwrap();
            (tensor.name().to_owned(), values)
        })
        .collect();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu).pp("text_model");
    let config = ClipTextConfig {
        vocab_size: 49408,
        embed_dim: 32,
        activation: Activation::QuickGelu,
        intermediate_size: 128,
        max_position_embeddings: ids.len(),
        pad_with: None,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        projection_dim: 32,
    };
    let reference = ClipTextTransformer::new(weights, &config).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    // `forward` would pick the pooled row; nothing is masked after the last token.
    let states = reference.forward_with_mask(&ids, usize::MAX).unwrap();
    states.flatten_all().unwrap().to_vec1().unwrap()
}
