//! LongCLIP: a longer table of positions makes longer chunks, and nothing else changes.

use std::collections::BTreeMap;

use fixtures::{LONG_CLIP_POSITIONS, Size, encoder_tensors};
use luna_worker::{
    conditioning::{Conditioning, PromptTokens},
    execution::{EncodeError, EncodeJob, ModeSettings, Modes},
    model::LoadedModel,
};
use protocol::{
    CHUNK_TOKENS, Chunk, Component, ComponentTokens, Dtype, Family, VectorAt, VectorTable,
};

use crate::models::{long_clip, model};

/// Largest difference between the same numbers from matrices of other sizes.
const ROUNDING: f32 = 1e-5;

/// Positions that both an ordinary and a long table have.
const BOTH: usize = CHUNK_TOKENS * 32;

#[test]
fn the_first_77_positions_are_those_of_the_ordinary_model() {
    let (long, plain) = (long_clip(Family::Sd15), model(Size::Tiny, Family::Sd15, Dtype::Float32));
    let ids = ids(LONG_CLIP_POSITIONS);
    let mut weights = vec![1.0; LONG_CLIP_POSITIONS];
    (weights[5], weights[70]) = (1.4, -0.5);
    for weights in [Vec::new(), weights] {
        let chunk = |length: usize| Chunk {
            ids: ids[..length].to_vec(),
            weights: weights.iter().copied().take(length).collect(),
            ..Chunk::default()
        };
        let long = encode_l(&long, vec![chunk(LONG_CLIP_POSITIONS)]);
        let plain = encode_l(&plain, vec![chunk(CHUNK_TOKENS)]);
        assert_eq!(long.cond.shape, [1, 248, 32]);
        assert_close(&long.cond.elements[..BOTH], &plain.cond.elements);
    }
}

#[test]
fn chunks_of_another_length_are_refused() {
    let model = long_clip(Family::Sd15);
    assert_eq!(model.info().chunk_tokens, BTreeMap::from([(Component::ClipL, 248)]));
    for length in [77, 247, 249] {
        let chunk = Chunk { ids: ids(length), ..Chunk::default() };
        let error = try_encode(&model, l(vec![chunk])).unwrap_err().to_string();
        let expected = format!("prompt 0, `clip_l`: chunk 0 has {length} positions: expected 248");
        assert_eq!(error, expected);
    }
}

#[test]
fn every_chunk_is_encoded_by_itself_however_many_go_together() {
    let model = long_clip(Family::Sd15);
    let chunk = |index: usize| {
        let mut chunk = prompt::empty_chunk(Component::ClipL, LONG_CLIP_POSITIONS);
        chunk.ids[1..=index + 200].fill(u32::try_from(320 + index).unwrap());
        chunk
    };
    let together = encode_l(&model, (0..7).map(chunk).collect());
    assert_eq!(together.cond.shape, [1, 7 * 248, 32]);
    for (index, row) in together.cond.elements.chunks(248 * 32).enumerate() {
        let alone = encode_l(&model, vec![chunk(index)]);
        assert_close(row, &alone.cond.elements);
        let end = (index + 201) * 32;
        assert_close(&alone.pooled.elements, &alone.cond.elements[end..end + 32]);
        if index == 0 {
            assert_close(&together.pooled.elements, &alone.pooled.elements);
        }
    }
}

#[test]
fn a_weight_beyond_position_77_moves_against_the_empty_prompt_there() {
    let model = long_clip(Family::Sd15);
    let empty = prompt::empty_chunk(Component::ClipL, LONG_CLIP_POSITIONS);
    let plain = Chunk { ids: ids(LONG_CLIP_POSITIONS), ..Chunk::default() };
    let mut weights = vec![1.0; LONG_CLIP_POSITIONS];
    (weights[100], weights[247]) = (0.0, 1.5);
    let weighted = Chunk { weights, ..plain.clone() };

    let [empty, plain, weighted] =
        [empty, plain, weighted].map(|chunk| encode_l(&model, vec![chunk]).cond.elements);
    let mut expected = plain;
    for (at, weight) in [(100, 0.0), (247, 1.5)] {
        let range = at * 32..(at + 1) * 32;
        for (state, empty) in expected[range.clone()].iter_mut().zip(&empty[range]) {
            *state = (*state - empty) * weight + empty;
        }
    }
    assert_close(&weighted, &expected);
}

#[test]
fn a_vector_may_stand_beyond_position_77() {
    let model = long_clip(Family::Sd15);
    let with_id = Chunk { ids: ids(LONG_CLIP_POSITIONS), ..Chunk::default() };
    let mut with_vector = with_id.clone();
    let id = with_vector.ids.remove(200) as usize;
    with_vector.vectors = vec![VectorAt { position: 200, row: 0 }];
    let table = encoder_tensors(Size::Tiny, Component::ClipL)[0].values();
    let vectors = VectorTable { width: 32, elements: table[id * 32..(id + 1) * 32].to_vec() };
    let tokens = ComponentTokens { chunks: vec![with_vector], vectors };

    let found = encode(&model, BTreeMap::from([(Component::ClipL, tokens)]));
    assert_close(&found.cond.elements, &encode_l(&model, vec![with_id]).cond.elements);
}

#[test]
fn components_of_different_chunk_lengths_are_cut_to_the_shorter_total() {
    let model = long_clip(Family::Sdxl);
    let lengths = [(Component::ClipL, 248), (Component::ClipG, 77)];
    assert_eq!(model.info().chunk_tokens, lengths.into());
    let chunks = |component, length, count: usize| {
        let mut chunk = prompt::empty_chunk(component, length);
        chunk.ids[1..50].fill(2368);
        let tokens = ComponentTokens { chunks: vec![chunk; count], ..ComponentTokens::default() };
        BTreeMap::from([(component, tokens)])
    };
    for (l_count, g_count, positions) in [(1, 1, 77), (1, 2, 154), (1, 4, 248), (2, 7, 496)] {
        let l = chunks(Component::ClipL, 248, l_count);
        let g = chunks(Component::ClipG, 77, g_count);
        let both = encode(&model, l.clone().into_iter().chain(g.clone()).collect());
        let [l, g] = [l, g].map(|tokens| encode(&model, tokens));
        assert_eq!(both.cond.shape, [1, positions, 32 + 48]);
        for (at, features) in both.cond.elements.chunks(32 + 48).enumerate() {
            assert_close(&features[..32], &l.cond.elements[at * 32..][..32]);
            assert_close(&features[32..], &g.cond.elements[at * 48..][..48]);
        }
        assert_close(&both.pooled.elements, &g.pooled.elements);
    }
}

/// Ordinary ids, none of them start or end.
fn ids(count: usize) -> Vec<u32> {
    (0..49406).step_by(641).cycle().take(count).collect()
}

fn l(chunks: Vec<Chunk>) -> PromptTokens {
    let tokens = ComponentTokens { chunks, ..ComponentTokens::default() };
    BTreeMap::from([(Component::ClipL, tokens)])
}

fn encode_l(model: &LoadedModel, chunks: Vec<Chunk>) -> Conditioning {
    encode(model, l(chunks))
}

fn encode(model: &LoadedModel, tokens: PromptTokens) -> Conditioning {
    try_encode(model, tokens).unwrap()
}

fn try_encode(model: &LoadedModel, tokens: PromptTokens) -> Result<Conditioning, EncodeError> {
    let job = EncodeJob::new([tokens], Vec::new());
    Ok(Modes::new(ModeSettings::default()).encode(model, &job)?.conditionings.remove(0))
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let distance = found.iter().zip(expected).map(|(left, right)| (left - right).abs());
    let distance = distance.fold(0.0, f32::max);
    assert!(distance < ROUNDING, "the difference is {distance}");
}
