//! The golden results of ComfyUI, through a whole farm: text in, the same tokens and numbers out.

#![expect(clippy::print_stdout, reason = "the distances are worth reading when a gate fails")]

use std::path::PathBuf;

use fixtures::Size;
use luna_client::{
    AdapterId, Chunk, Client, Component, Dtype, EncodeRequest, Encoding, Family, StackEntry,
};
use luna_e2e::{
    Cluster,
    golden::{Case, CodedChunk, GoldenFile, TokenSpelling, tiny_lora},
    models,
};

/// Cases that this version is to reproduce.
const IDS: [&str; 6] = ["p/", "skip/", "pooled/", "lora/", "combo/", "hooks/"];

/// Gate against float32 files, tiny models.
const EXACT_TINY: f32 = 2e-5;
/// Gate against float16 files, tiny models.
const ROUNDED_TINY: f32 = 1e-3;
/// Gate against float32 files, true size.
const EXACT_FULL: f32 = 1e-4;
/// Gate against float16 files, true size.
const ROUNDED_FULL: f32 = 3e-4;

#[tokio::test]
async fn tiny_sd15_in_float32_gives_what_comfyui_gives() {
    check_tiny(Family::Sd15, Dtype::Float32, EXACT_TINY).await;
}

#[tokio::test]
async fn tiny_sd15_in_float16_gives_what_comfyui_gives() {
    check_tiny(Family::Sd15, Dtype::Float16, ROUNDED_TINY).await;
}

#[tokio::test]
async fn tiny_sdxl_in_float32_gives_what_comfyui_gives() {
    check_tiny(Family::Sdxl, Dtype::Float32, EXACT_TINY).await;
}

#[tokio::test]
async fn tiny_sdxl_in_float16_gives_what_comfyui_gives() {
    check_tiny(Family::Sdxl, Dtype::Float16, ROUNDED_TINY).await;
}

#[tokio::test]
async fn full_sd15_in_float32_gives_what_comfyui_gives() {
    check_full(Family::Sd15, Dtype::Float32, EXACT_FULL).await;
}

#[tokio::test]
async fn full_sd15_in_float16_gives_what_comfyui_gives() {
    check_full(Family::Sd15, Dtype::Float16, ROUNDED_FULL).await;
}

#[tokio::test]
async fn full_sdxl_in_float32_gives_what_comfyui_gives() {
    check_full(Family::Sdxl, Dtype::Float32, EXACT_FULL).await;
}

async fn check_tiny(family: Family, dtype: Dtype, gate: f32) {
    let golden = GoldenFile::read(&format!("tiny_{family}_{dtype}"));
    let model = models::spec("tiny", Size::Tiny, family, Dtype::Float32);
    let cluster = Cluster::new()
        .model(&model)
        .weights_dtype(dtype)
        .embeddings(&models::tiny_embeddings())
        .start()
        .await;
    let client = cluster.client().await;
    let cases: Vec<_> = golden.cases.iter().filter(|case| is_wanted(case)).collect();
    let least = if dtype == Dtype::Float32 { 55 } else { 15 };
    assert!(cases.len() >= least, "only {} cases", cases.len());
    let lora = |name: &str| tiny_lora(&family.to_string(), name);
    let mut failures = Vec::new();
    for case in cases {
        let encoding = encode(&client, "tiny", case, lora).await;
        check_tokens(case, &encoding);
        let distance = distance(&golden, case, &encoding);
        println!("{family} {dtype} {}: {distance:.1e}", case.id);
        if distance.is_nan() || distance > gate {
            failures.push(format!("{}: {distance:.1e}", case.id));
        }
    }
    assert!(failures.is_empty(), "over {gate:.0e}: {failures:?}");
}

/// The full-size cases of plain LoRAs and without any; the models are some GB, so one at a time.
async fn check_full(family: Family, dtype: Dtype, gate: f32) {
    let golden = GoldenFile::read(&format!("full_{family}_{dtype}"));
    let model = models::spec("full", Size::Full, family, dtype);
    let cluster = Cluster::new().model(&model).weights_dtype(dtype).threads(2).start().await;
    let client = cluster.client().await;
    let cases: Vec<_> = golden.cases.iter().filter(|case| is_wanted(case)).collect();
    assert!(cases.iter().any(|case| case.id.starts_with("lora/")), "a LoRA at true size");
    for case in cases {
        let id = &case.id;
        let lora = |name: &str| models::full_lora(family, name);
        let encoding = encode(&client, "full", case, lora).await;
        let distance = distance(&golden, case, &encoding);
        println!("full {family} {dtype} {id}: {distance:.1e}");
        assert!(distance <= gate, "{id}: {distance:.1e} is over {gate:.0e}");
    }
}

fn is_wanted(case: &Case) -> bool {
    IDS.iter().any(|id| case.id.starts_with(id))
}

async fn encode(
    client: &Client,
    model: &str,
    case: &Case,
    lora: impl Fn(&str) -> PathBuf,
) -> Encoding {
    let mut request = EncodeRequest::new(model).return_tokens();
    let hook = match &case.hook {
        None => None,
        Some((name, strength)) => Some((upload(client, lora(name)).await, *strength)),
    };
    for output in 0..case.outputs.len() {
        request = request.prompt(case.prompt.as_str());
        if let Some((adapter, strength)) = hook {
            // A keyframe scales its hook; the ranges of a schedule are prompts of one request.
            let factor = case.keyframes.get(output).map_or(1.0, |(_, factor)| *factor);
            let strength_patch = strength * factor;
            request = request.hook(StackEntry { adapter, strength_patch, strength_model: 1.0 });
        }
    }
    for (name, strength) in &case.stack {
        request = request.lora(upload(client, lora(name)).await, *strength);
    }
    if let Some(skip) = case.skip {
        request = request.clip_skip(skip);
    }
    if case.node == "unprojected" {
        request = request.unprojected();
    }
    client.encode(request).await.unwrap_or_else(|error| panic!("{}: {error}", case.id))
}

async fn upload(client: &Client, path: PathBuf) -> AdapterId {
    client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter
}

/// The worst distance over all outputs.
fn distance(golden: &GoldenFile, case: &Case, encoding: &Encoding) -> f32 {
    let outputs = encoding.conditionings.iter().enumerate();
    let distances = outputs.map(|(number, result)| {
        golden.distance(case, number, &result.cond.data, &result.pooled.data)
    });
    distances
        .fold(0.0, |worst, distance| if distance.is_nan() { distance } else { worst.max(distance) })
}

/// The tokens that the farm encoded are those of ComfyUI, weights included.
fn check_tokens(case: &Case, encoding: &Encoding) {
    let tokens = encoding.conditionings[0].tokens.as_ref().expect("tokens were asked for");
    for (encoder, coded) in &case.tokens {
        let (component, width, pad) =
            if encoder == "l" { (Component::ClipL, 32, 49407) } else { (Component::ClipG, 48, 0) };
        let expected: Vec<_> = coded.iter().map(|row| spelled_out(row, width, pad)).collect();
        let found: Vec<_> = tokens[&component].iter().map(spelled).collect();
        assert_eq!(found, expected, "{}: tokens of {component}", case.id);
    }
}

/// A row as ids, with nothing for a vector, and its weights.
type Spelled = (Vec<Option<u32>>, Vec<f64>);

fn spelled(chunk: &Chunk) -> Spelled {
    let mut ids: Vec<_> = chunk.ids.iter().map(|id| Some(*id)).collect();
    for vector in &chunk.vectors {
        ids.insert(vector.position as usize, None);
    }
    let weights =
        if chunk.weights.is_empty() { vec![1.0; ids.len()] } else { chunk.weights.clone() };
    (ids, weights)
}

/// What ComfyUI lists. It drops vectors of another width only later: the tokens behind them move
/// up, a pad follows for each, and weights stay where they were.
fn spelled_out(coded: &CodedChunk, width: usize, pad: u32) -> Spelled {
    let ours = format!("vec:{width}");
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for (token, weight, count) in coded {
        weights.extend(std::iter::repeat_n(*weight, *count));
        match token {
            TokenSpelling::Id(id) => ids.extend(std::iter::repeat_n(Some(*id), *count)),
            TokenSpelling::Vector(vector) if *vector == ours => {
                ids.extend(std::iter::repeat_n(None, *count));
            }
            TokenSpelling::Vector(_) => {}
        }
    }
    ids.resize(weights.len(), Some(pad));
    (ids, weights)
}
