//! Golden cases: what ComfyUI was asked, and what it answered.

use std::{collections::BTreeMap, fs, path::PathBuf};

use fixtures::{EncoderShape, Size};
use luna_worker::{
    conditioning::{Conditioning, PromptTokens},
    model::LayerModule,
};
use protocol::{
    CHUNK_TOKENS, Chunk, Component, ComponentTokens, Dtype, Family, VectorAt, VectorTable,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// Cases of one model.
pub(crate) struct Golden {
    pub(crate) cases: Vec<Case>,
    tensors: Vec<u8>,
}

/// One question to ComfyUI.
pub(crate) struct Case {
    pub(crate) id: String,
    pub(crate) stack: Vec<(String, f64)>,
    pub(crate) skip: Option<i32>,
    pub(crate) node: String,
    pub(crate) tokens: PromptTokens,
    /// Hook LoRA and its strength for every output; nothing when there is none.
    pub(crate) hook: Option<(String, Vec<f64>)>,
    /// Factors of `CLIPAttentionMultiply` on a part of every attention.
    pub(crate) factors: Vec<(LayerModule, f64)>,
    outputs: Vec<Output>,
}

struct Output {
    /// Rows of `cond` that are stored; nothing when all are.
    rows: Option<Vec<usize>>,
    shape: Vec<usize>,
}

impl Golden {
    pub(crate) fn read(size: Size, family: Family, dtype: Dtype) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        let stem = folder.join(format!("{size}_{family}_{dtype}"));
        let json = fs::read(stem.with_extension("json")).unwrap();
        let cases: Vec<Value> = serde_json::from_slice(&json).unwrap();
        let cases = cases.iter().map(|case| Case::parse(size, case)).collect();
        Self { cases, tensors: fs::read(stem.with_extension("safetensors")).unwrap() }
    }

    /// Largest absolute difference of any element of `cond` and `pooled` of any output.
    pub(crate) fn distance(&self, case: &Case, results: &[Conditioning]) -> f32 {
        assert_eq!(results.len(), case.outputs.len(), "{}", case.id);
        let distances = results.iter().enumerate();
        distances.map(|(index, result)| self.distance_of(case, index, result)).fold(0.0, f32::max)
    }

    fn distance_of(&self, case: &Case, index: usize, result: &Conditioning) -> f32 {
        let Output { rows, shape } = &case.outputs[index];
        assert_eq!(result.cond.shape, *shape, "{}", case.id);
        let width = shape[2];
        let cond = match rows {
            None => result.cond.elements.clone(),
            Some(rows) => {
                let row = |row: &usize| &result.cond.elements[row * width..(row + 1) * width];
                rows.iter().flat_map(row).copied().collect()
            }
        };
        let cond = self.distance_to(&format!("{}/{index}/cond", case.id), &cond);
        let pooled =
            self.distance_to(&format!("{}/{index}/pooled", case.id), &result.pooled.elements);
        cond.max(pooled)
    }

    fn distance_to(&self, tensor: &str, elements: &[f32]) -> f32 {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let bytes = tensors.tensor(tensor).unwrap().data();
        let expected = bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word));
        assert_eq!(bytes.len(), elements.len() * 4, "{tensor}");
        let distances = expected.zip(elements).map(|(left, right)| (left - right).abs());
        distances.fold(
            0.0,
            |worst, distance| {
                if distance.is_nan() { f32::INFINITY } else { worst.max(distance) }
            },
        )
    }
}

impl Case {
    fn parse(size: Size, case: &Value) -> Self {
        let names = embedding_names(case["prompt"].as_str().unwrap());
        let tokens = case["tokens"].as_object().unwrap().iter().map(|(letter, chunks)| {
            let component = if letter == "l" { Component::ClipL } else { Component::ClipG };
            let chunks = chunks.as_array().unwrap();
            (component, component_tokens(size, component, chunks, &names))
        });
        let stack = case["stack"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (entry[0].as_str().unwrap().to_owned(), entry[1].as_f64().unwrap()));
        Self {
            id: case["id"].as_str().unwrap().to_owned(),
            stack: stack.collect(),
            skip: case["skip"].as_i64().map(|skip| skip.try_into().unwrap()),
            node: case["node"].as_str().unwrap().to_owned(),
            tokens: tokens.collect(),
            hook: hook(case),
            factors: factors(case),
            outputs: case["outputs"].as_array().unwrap().iter().map(Output::parse).collect(),
        }
    }
}

impl Output {
    fn parse(output: &Value) -> Self {
        Self {
            rows: output["rows"].as_array().map(|rows| rows.iter().map(index).collect()),
            shape: output["shape"].as_array().unwrap().iter().map(index).collect(),
        }
    }
}

/// The strength of a hook in a range is its own times that of the range's keyframe.
fn hook(case: &Value) -> Option<(String, Vec<f64>)> {
    let name = case["hook"][0].as_str()?.to_owned();
    let strength = case["hook"][1].as_f64().unwrap();
    let strengths = case["keyframes"].as_array().map_or(vec![strength], |keyframes| {
        keyframes.iter().map(|keyframe| strength * keyframe[1].as_f64().unwrap()).collect()
    });
    Some((name, strengths))
}

fn factors(case: &Value) -> Vec<(LayerModule, f64)> {
    let parts = [
        ("q", LayerModule::Query),
        ("k", LayerModule::Key),
        ("v", LayerModule::Value),
        ("out", LayerModule::Out),
    ];
    parts.into_iter().filter_map(|(name, part)| Some((part, case[name].as_f64()?))).collect()
}

fn index(value: &Value) -> usize {
    value.as_u64().unwrap().try_into().unwrap()
}

/// Names after `embedding:` that are separated as ComfyUI wants them, in order.
fn embedding_names(prompt: &str) -> Vec<String> {
    let words = prompt.split(|c: char| c.is_whitespace() || c == '(');
    let names = words.filter_map(|word| word.strip_prefix("embedding:"));
    names
        .map(|name| name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .collect()
}

/// Run-length coded chunks as they go over the wire: vectors of the wrong width are dropped, what
/// follows moves up, and pads fill the end.
fn component_tokens(
    size: Size,
    component: Component,
    chunks: &[Value],
    names: &[String],
) -> ComponentTokens {
    let width = EncoderShape::of(size, component).hidden;
    let mut vectors = names.iter().flat_map(|name| embedding(size, component, name));
    let mut tokens = ComponentTokens::default();
    tokens.vectors.width = width;
    for runs in chunks {
        let (mut chunk, mut dropped, mut position) = (Chunk::default(), 0, 0);
        for run in runs.as_array().unwrap() {
            for _ in 0..index(&run[2]) {
                chunk.weights.push(run[1].as_f64().unwrap());
                if let Some(id) = run[0].as_u64() {
                    chunk.ids.push(id.try_into().unwrap());
                    position += 1;
                    continue;
                }
                let vector = vectors.next().unwrap();
                if vector.len() != width {
                    dropped += 1;
                    continue;
                }
                let row = tokens.vectors.rows().try_into().unwrap();
                tokens.vectors.elements.extend(vector);
                chunk.vectors.push(VectorAt { position, row });
                position += 1;
            }
        }
        let pad = if component == Component::ClipL { 49407 } else { 0 };
        chunk.ids.extend(vec![pad; dropped]);
        if !chunk.is_weighted() {
            chunk.weights.clear();
        }
        assert_eq!(chunk.positions(), CHUNK_TOKENS);
        tokens.chunks.push(chunk);
    }
    if tokens.vectors.elements.is_empty() {
        tokens.vectors = VectorTable::default();
    }
    tokens
}

/// The vectors of an embedding, as ComfyUI chooses them for `component`; none if it is unknown.
fn embedding(size: Size, component: Component, name: &str) -> Vec<Vec<f32>> {
    let all: BTreeMap<_, _> = fixtures::embeddings(size).into_iter().collect();
    let Some(tensors) = all.get(name) else { return Vec::new() };
    let own = tensors.iter().find(|tensor| tensor.name() == component.as_str());
    let tensor = own.unwrap_or(&tensors[0]);
    let width = *tensor.shape().last().unwrap();
    tensor.values().chunks(width).map(<[f32]>::to_vec).collect()
}
