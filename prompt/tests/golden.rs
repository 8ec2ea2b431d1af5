//! Every prompt of the golden files gives the very tokens and weights that ComfyUI listed.
//!
//! The files hold what ComfyUI 0.3.64 made; the textual-inversion files beside them are modelled
//! here by name, because their values never show in tokens.

use std::collections::BTreeMap;

use luna_prompt::{
    EmbeddingFailure, Embeddings, Encoder, Limits, Rows, Token, Tokenizer, WeightedToken, rows,
    tokenize,
};
use protocol::{CHUNK_TOKENS, Component, VectorTable};
use serde::Deserialize;

#[test]
fn tiny_sd15_prompts_have_the_tokens_of_comfyui() {
    check(include_str!("../../tests/golden/tiny_sd15_float32.json"), 61);
}

#[test]
fn tiny_sdxl_prompts_have_the_tokens_of_comfyui() {
    check(include_str!("../../tests/golden/tiny_sdxl_float32.json"), 67);
}

#[test]
fn full_sd15_prompts_have_the_tokens_of_comfyui() {
    check(include_str!("../../tests/golden/full_sd15_float32.json"), 8);
}

#[test]
fn full_sdxl_prompts_have_the_tokens_of_comfyui() {
    check(include_str!("../../tests/golden/full_sdxl_float32.json"), 6);
}

#[test]
fn every_golden_prompt_gives_whole_chunks_for_its_encoder() {
    let tokenizer = Tokenizer::new();
    for case in cases(include_str!("../../tests/golden/tiny_sdxl_float32.json")) {
        for (component, width) in [(Component::ClipL, 32), (Component::ClipG, 48)] {
            let encoder = Encoder { component, width, chunk_tokens: CHUNK_TOKENS };
            let directory: Option<&dyn Embeddings> = Some(&GoldenDirectory);
            let made =
                tokenize(&tokenizer, &case.prompt, encoder, directory, Limits::default()).unwrap();
            for chunk in &made.tokens.chunks {
                assert_eq!(chunk.positions(), CHUNK_TOKENS, "{}", case.id);
                assert!(chunk.weights.is_empty() || chunk.is_weighted(), "{}", case.id);
            }
        }
    }
}

#[test]
fn a_vector_of_another_width_gives_way_to_a_pad_while_the_weights_stay() {
    let prompt = "cat embedding:ti_sd15 (dog:1.5) end"; // golden case `p/ti_sd15_in_xl`
    let encoder = Encoder { component: Component::ClipG, width: 48, chunk_tokens: CHUNK_TOKENS };
    let directory: Option<&dyn Embeddings> = Some(&GoldenDirectory);
    let made = tokenize(&Tokenizer::new(), prompt, encoder, directory, Limits::default()).unwrap();

    let chunk = &made.tokens.chunks[0];
    assert_eq!(chunk.ids[..6], [49406, 2368, 1929, 806, 49407, 0]);
    assert_eq!(chunk.ids.len(), 77);
    assert_eq!(chunk.weights[4..7], [1.0, 1.5, 1.0]);
    assert_eq!(made.tokens.vectors, VectorTable::default());
    let warnings: Vec<_> = made.warnings.iter().map(ToString::to_string).collect();
    let expected = "embedding `ti_sd15` has width `32`, `clip_g` needs `48`: it is left out";
    assert_eq!(warnings, [expected]);
}

/// One line of a golden file; only what concerns tokens.
#[derive(Deserialize)]
struct Case {
    id: String,
    /// For both encoders, or for `clip_g` where `prompt_l` is given.
    prompt: String,
    prompt_l: Option<String>,
    /// Rows by encoder, each run-length coded.
    tokens: BTreeMap<String, Vec<Vec<Run>>>,
}

/// Token, weight, and how often both repeat.
type Run = (GoldenToken, f64, usize);

/// A token as the files write it: an id, or `vec:` and a width.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum GoldenToken {
    Id(u32),
    Vector(String),
}

/// The files in `tests/golden/embeddings_tiny`: rows and width of what an encoder finds there.
struct GoldenDirectory;

impl Embeddings for GoldenDirectory {
    fn find(
        &self,
        name: &str,
        component: Component,
    ) -> Result<Option<VectorTable>, EmbeddingFailure> {
        let (rows, width) = match (name, component) {
            ("ti_sd15", _) => (3, 32),
            ("ti_one", _) => (1, 32),
            ("ti_xl", Component::ClipL) => (2, 32),
            ("ti_xl", Component::ClipG) => (2, 48),
            ("ti_big", _) => (80, 32),
            ("ti_badshape", _) => (2, 40),
            _ => return Ok(None),
        };
        Ok(Some(VectorTable { width, elements: vec![0.5; rows * width] }))
    }
}

#[track_caller]
fn check(file: &str, count: usize) {
    let tokenizer = Tokenizer::new();
    let cases = cases(file);
    assert_eq!(cases.len(), count);
    for case in cases {
        assert!(!case.tokens.is_empty(), "{}", case.id);
        for (key, expected) in &case.tokens {
            let (component, prompt) = match (key.as_str(), &case.prompt_l) {
                ("l", Some(prompt_l)) => (Component::ClipL, prompt_l),
                ("l", None) => (Component::ClipL, &case.prompt),
                ("g", _) => (Component::ClipG, &case.prompt),
                _ => panic!("`{}` has an encoder `{key}`", case.id),
            };
            let directory: Option<&dyn Embeddings> = Some(&GoldenDirectory);
            // Rows do not depend on the width.
            let encoder = Encoder { component, width: 0, chunk_tokens: CHUNK_TOKENS };
            let made = rows(&tokenizer, prompt, encoder, directory, Limits::default())
                .expect("ComfyUI accepted it");
            let actual: Vec<_> = made.rows.iter().map(|row| listed(row, &made)).collect();
            let expected: Vec<_> = expected.iter().map(|row| expanded(row)).collect();
            assert_eq!(actual, expected, "{} {key}", case.id);
        }
    }
}

fn cases(file: &str) -> Vec<Case> {
    serde_json::from_str(file).expect("the file is JSON in the form of `Case`")
}

/// A row in the form of the files.
fn listed(row: &[WeightedToken], rows: &Rows) -> Vec<(GoldenToken, f64)> {
    let list = |&WeightedToken { token, weight }: &WeightedToken| match token {
        Token::Id(id) => (GoldenToken::Id(id), weight),
        Token::Vector(vector) => {
            let width = rows.embeddings[vector.embedding].vectors.width;
            (GoldenToken::Vector(format!("vec:{width}")), weight)
        }
    };
    row.iter().map(list).collect()
}

/// A run-length coded row, token by token.
fn expanded(row: &[Run]) -> Vec<(GoldenToken, f64)> {
    row.iter()
        .flat_map(|(token, weight, count)| std::iter::repeat_n((token.clone(), *weight), *count))
        .collect()
}
