//! Requests that can be read and cannot be honoured.

use std::collections::BTreeMap;

use luna_client::{
    AdapterId, Chunk, Component, ComponentTokens, EncodeRequest, ErrorCode, ExecutionMode,
    Fidelity, Layer, LayerChoice, ModelDigest, StackEntry, VectorAt, VectorTable,
};
use protocol::request::{ClipEncode, Prompt, TokensRef};

use crate::support::{Farm, MODEL, VOCABULARY, WIDTH, base_message, base_request, chunk, tokens};

#[tokio::test]
async fn a_model_that_nobody_serves_is_named() {
    let mut farm = Farm::start().await;
    let request = EncodeRequest::new("sd35").prompt("a cat");
    farm.assert_refuses(request, ErrorCode::UnknownModel, &["`sd35`", "serves `tiny`"]).await;
    let request = EncodeRequest::new("no such name").prompt("a cat");
    farm.assert_refuses(request, ErrorCode::InvalidRequest, &["`no such name`"]).await;
}

#[tokio::test]
async fn a_digest_that_the_model_does_not_have_is_named_beside_the_one_that_it_has() {
    let mut farm = Farm::start().await;
    let models = farm.client.list_models().await.expect("the broker answers");
    let (other, real) = (ModelDigest::of(b"other weights"), models[0].model.digest);
    let words = [&*format!("`{other}`"), &*format!("`{real}`"), "`tiny`"];
    let request = base_request().model_digest(other);
    farm.assert_refuses(request, ErrorCode::UnknownModel, &words).await;
    farm.client.encode(base_request().model_digest(real)).await.expect("it has this one");
}

#[tokio::test]
async fn an_adapter_that_was_never_uploaded_is_named() {
    let mut farm = Farm::start().await;
    let (good, unknown) = (farm.good_lora().await, AdapterId::of(b"nobody has this"));
    let request = base_request().lora(good, 1.0).lora(unknown, 0.5);
    let words = [&*format!("`{unknown}`"), "upload it"];
    farm.assert_refuses(request, ErrorCode::UnknownLora, &words).await;
}

#[tokio::test]
async fn a_strength_that_is_not_finite_or_out_of_range_is_named() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let adapter = farm.good_lora().await;
    let id = adapter.to_string();
    let cases = [
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
        (f64::NEG_INFINITY, "-inf"),
        (1000.5, "1000.5"),
    ];
    for (strength, shown) in cases {
        let by_patch = StackEntry { adapter, strength_patch: strength, strength_model: 1.0 };
        let by_model = StackEntry { adapter, strength_patch: 1.0, strength_model: strength };
        for (entry, name) in [(by_patch, "`strength_patch`"), (by_model, "`strength_model`")] {
            let words = [shown, name, &id];
            let request = base_request().stack_entry(entry);
            farm.assert_refuses(request, ErrorCode::InvalidRequest, &words).await;

            let message = ClipEncode { stack: vec![entry], ..base_message(wire.next_id()) };
            let code = ErrorCode::InvalidRequest;
            farm.assert_refuses_on_wire(&mut wire, &message, code, &words).await;
        }
    }
}

#[tokio::test]
async fn what_this_version_cannot_do_is_unsupported_and_never_left_out() {
    let mut farm = Farm::start().await;
    let mut wire = farm.wire().await;
    let batched = base_request().mode(ExecutionMode::Batched);
    let words = ["`batched`", "`functional`"];
    farm.assert_refuses(batched, ErrorCode::Unsupported, &words).await;
    let fast = base_request().fidelity(Fidelity::Fast);
    farm.assert_refuses(fast, ErrorCode::Unsupported, &["`fast`", "`comfyui`"]).await;

    let mut advanced = base_message(wire.next_id());
    advanced.requires = vec!["time_travel".to_owned()];
    let words = ["`time_travel`"];
    farm.assert_refuses_on_wire(&mut wire, &advanced, ErrorCode::Unsupported, &words).await;
}

#[tokio::test]
async fn a_request_with_nothing_to_encode_is_invalid() {
    let mut farm = Farm::start().await;
    let invalid = ErrorCode::InvalidRequest;
    let none = EncodeRequest::new(MODEL);
    farm.assert_refuses(none, invalid, &["`prompts` is empty"]).await;
    let no_chunks = tokens(Vec::new(), VectorTable::default());
    farm.assert_refuses(no_chunks, invalid, &["prompt 0 has no chunks", "`clip_l`"]).await;
    let no_component = EncodeRequest::new(MODEL).tokens(BTreeMap::new());
    farm.assert_refuses(no_component, invalid, &["no component", "`sd15`"]).await;

    let mut wire = farm.wire().await;
    for prompt in [
        Prompt::default(),
        Prompt { tokens: Some(one_chunk()), text: Some("a cat".to_owned()), ..Prompt::default() },
    ] {
        let message = ClipEncode { prompts: vec![prompt], ..base_message(wire.next_id()) };
        let words = ["prompt 0", "`text`, `texts` and `tokens`"];
        farm.assert_refuses_on_wire(&mut wire, &message, invalid, &words).await;
    }
}

#[tokio::test]
async fn tokens_that_the_encoder_cannot_take_are_named() {
    let mut farm = Farm::start().await;
    let cases: [(Chunk, &[&str]); 6] = [
        (with(|chunk| chunk.ids[5] = VOCABULARY), &["id 49408", "vocabulary has 49408"]),
        (with(|chunk| chunk.ids[5] = u32::MAX), &["id 4294967295"]),
        (with(|chunk| chunk.ids.truncate(76)), &["76 positions", "77"]),
        (with(|chunk| chunk.weights = vec![1.0; 3]), &["3 weights", "77"]),
        (with(|chunk| chunk.weights = vec![f64::NAN; 77]), &["weight `NaN`", "position 0"]),
        (with(insert_vector), &["refers to vector 0", "the table has 0"]),
    ];
    for (chunk, words) in cases {
        let words: Vec<_> = ["prompt 0, `clip_l`: chunk 0"].iter().chain(words).copied().collect();
        let request = tokens(vec![chunk], VectorTable::default());
        farm.assert_refuses(request, ErrorCode::InvalidRequest, &words).await;
    }

    let foreign = ComponentTokens { chunks: vec![chunk()], ..ComponentTokens::default() };
    let request = EncodeRequest::new(MODEL).tokens(BTreeMap::from([(Component::ClipG, foreign)]));
    farm.assert_refuses(request, ErrorCode::InvalidRequest, &["`clip_g`", "`sd15`"]).await;
}

#[tokio::test]
async fn vectors_of_another_width_are_refused_and_those_of_the_right_one_are_taken() {
    let mut farm = Farm::start().await;
    let table = |width| VectorTable { width, elements: vec![0.1; width] };
    let request = |width| tokens(vec![with(insert_vector)], table(width));
    for width in [WIDTH - 1, 48, 768] {
        let words = [&*format!("vectors are {width} wide"), "expected 32", "`clip_l`"];
        farm.assert_refuses(request(width), ErrorCode::InvalidRequest, &words).await;
    }
    farm.client.encode(request(WIDTH)).await.expect("32 wide vectors fit");

    let elements = vec![f32::NAN; WIDTH];
    let request = tokens(vec![with(insert_vector)], VectorTable { width: WIDTH, elements });
    farm.assert_refuses(request, ErrorCode::InvalidRequest, &["finite"]).await;
}

#[tokio::test]
async fn a_layer_that_the_encoder_does_not_have_is_named() {
    let mut farm = Farm::start().await;
    for layer in [-5, 4, i32::MIN, i32::MAX] {
        let choice = LayerChoice { layer: Layer::Hidden(layer), final_norm: false };
        let request = base_request().layer(Component::ClipL, choice);
        let words = [&*format!("no layer {layer}"), "`clip_l`", "-4 to 3"];
        farm.assert_refuses(request, ErrorCode::InvalidRequest, &words).await;
    }
    let choice = LayerChoice { layer: Layer::Last, final_norm: false };
    let request = base_request().layer(Component::ClipG, choice);
    farm.assert_refuses(request, ErrorCode::InvalidRequest, &["`clip_g`", "`sd15`"]).await;
}

fn with(change: impl FnOnce(&mut Chunk)) -> Chunk {
    let mut chunk = chunk();
    change(&mut chunk);
    chunk
}

/// Puts row 0 of the vectors in place of the second token.
fn insert_vector(chunk: &mut Chunk) {
    chunk.ids.remove(1);
    chunk.vectors = vec![VectorAt { position: 1, row: 0 }];
}

fn one_chunk() -> BTreeMap<Component, TokensRef> {
    BTreeMap::from([(Component::ClipL, TokensRef { chunks: vec![chunk()], vectors: None })])
}
