//! Golden results of ComfyUI: cases, and how far an answer is from them.

use std::{collections::BTreeMap, fs, path::PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;

use crate::binary::workspace;

/// All golden cases of one model at one weights dtype.
pub struct GoldenFile {
    /// The cases in the order of the file.
    pub cases: Vec<Case>,
    tensors: Vec<u8>,
}

/// One case: what was asked of ComfyUI, and the shape of what came back.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// For example `lora/kohya`.
    pub id: String,
    /// The prompt, for bigG alone where there is a second one.
    pub prompt: String,
    /// The prompt for CLIP-L (`CLIPTextEncodeSDXL`).
    #[serde(default)]
    pub prompt_l: Option<String>,
    /// LoRA names and strengths, in order.
    pub stack: Vec<(String, f64)>,
    /// ComfyUI's clip skip.
    pub skip: Option<i32>,
    /// The ComfyUI node that made it.
    pub node: String,
    /// LoRA and strength of a hook.
    #[serde(default)]
    pub hook: Option<(String, f64)>,
    /// Start and strength of each keyframe of the hook; none means strength 1 throughout.
    #[serde(default)]
    pub keyframes: Vec<(f64, f64)>,
    /// `CLIPAttentionMultiply`: factors of the four projections of every attention.
    #[serde(flatten)]
    pub attention: Option<Attention>,
    /// Run-length coded tokens by encoder: `[token, weight, count]`.
    pub tokens: BTreeMap<String, Vec<CodedChunk>>,
    /// The outputs; one except for schedules.
    pub outputs: Vec<Output>,
}

/// Factors on weight and bias of every attention's projections.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Attention {
    /// Of the query projection.
    pub q: f64,
    /// Of the key projection.
    pub k: f64,
    /// Of the value projection.
    pub v: f64,
    /// Of the output projection.
    pub out: f64,
}

/// How far an answer is from a golden result.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Distance {
    /// The largest absolute difference of any element of `cond` and `pooled`.
    pub worst: f32,
    /// The L2 norm of the difference of `cond` over that of the golden `cond`.
    pub relative: f64,
}

/// One row of tokens, run-length coded: token, weight, count.
pub type CodedChunk = Vec<(TokenSpelling, f64, usize)>;

/// A token id, or `vec:WIDTH`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum TokenSpelling {
    /// An id.
    Id(u32),
    /// A vector of a textual inversion.
    Vector(String),
}

/// One output of a case.
#[derive(Debug, Clone, Deserialize)]
pub struct Output {
    /// `[1, 77 · chunks, width]`.
    pub shape: Vec<usize>,
    /// Which rows of `cond` are stored.
    pub rows: Rows,
}

/// The rows of `cond` that a golden file stores.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Rows {
    /// `"all"`.
    All(String),
    /// These.
    Some(Vec<usize>),
}

impl Distance {
    /// Of two tensors of one size; a NaN anywhere is infinitely far.
    fn between(found: &[f32], expected: &[f32]) -> Self {
        assert_eq!(found.len(), expected.len(), "number of elements");
        let (mut worst, mut squares, mut norm) = (0.0_f32, 0.0, 0.0);
        for (found, expected) in found.iter().zip(expected) {
            let distance = (found - expected).abs();
            worst = if distance.is_nan() { f32::INFINITY } else { worst.max(distance) };
            squares += f64::from(distance).powi(2);
            norm += f64::from(*expected).powi(2);
        }
        Self { worst, relative: (squares / norm).sqrt() }
    }

    /// The larger of both, number by number.
    #[must_use]
    pub fn farther(self, other: Self) -> Self {
        Self { worst: self.worst.max(other.worst), relative: self.relative.max(other.relative) }
    }
}

impl GoldenFile {
    /// Reads `tests/golden/<name>.{json,safetensors}`.
    pub fn read(name: &str) -> Self {
        let path = |extension: &str| golden().join(format!("{name}.{extension}"));
        let cases = fs::read(path("json")).expect("the golden cases are in the repository");
        let tensors =
            fs::read(path("safetensors")).expect("the golden tensors are in the repository");
        let cases = serde_json::from_slice(&cases).expect("the golden cases are as described");
        Self { cases, tensors }
    }

    /// How far `cond` (row-major, `width` wide) and `pooled` are from output `number` of `case`.
    pub fn distance(&self, case: &Case, number: usize, cond: &[f32], pooled: &[f32]) -> Distance {
        let (id, output) = (&case.id, &case.outputs[number]);
        let width = output.shape[2];
        assert_eq!(cond.len(), output.shape.iter().product::<usize>(), "{id}: size of cond");
        let rows: Vec<usize> = match &output.rows {
            Rows::All(_) => (0..output.shape[1]).collect(),
            Rows::Some(rows) => rows.clone(),
        };
        let stored: Vec<f32> =
            rows.iter().flat_map(|row| cond[row * width..][..width].iter().copied()).collect();
        let expected = self.tensor(&format!("{id}/{number}/cond"));
        let cond = Distance::between(&stored, &expected);
        let pooled =
            Distance::between(pooled, &self.tensor(&format!("{id}/{number}/pooled"))).worst;
        cond.farther(Distance { worst: pooled, relative: 0.0 })
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.tensors).expect("the golden tensors can be read");
        let tensor = file.tensor(name).expect("every case has its tensors");
        let (elements, _) = tensor.data().as_chunks();
        elements.iter().map(|element| f32::from_le_bytes(*element)).collect()
    }
}

/// The folder of golden files.
pub fn golden() -> PathBuf {
    workspace().join("tests/golden")
}

/// The seeded LoRA files of the tiny models, as the golden results' generator wrote them.
pub fn tiny_lora(family: &str, name: &str) -> PathBuf {
    golden().join("loras_tiny").join(family).join(format!("{name}.safetensors"))
}
