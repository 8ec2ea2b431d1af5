//! From tokens to conditioning: what to ask of each encoder, and what to make of its answers.
//!
//! [`plan`] resolves options to one hidden state and one kind of pooled output per component;
//! [`rows`] checks tokens and lays them out as rows; [`encode`] runs the rows through the encoders,
//! applies prompt weights and joins components. Which weights the encoders use is the caller's
//! business: it passes one [`Parameters`] per component.

pub mod plan;
pub mod rows;
mod weighting;

use std::collections::BTreeMap;

use protocol::{Component, ComponentTokens};

use self::{
    plan::{ComponentPlan, Plan, Pooled},
    rows::{Row, rows_of},
};
use crate::model::{Batch, LoadedModel, Module, Parameters, TextConfig, TextModel, VectorRow};

pub use plan::InvalidOptions;
pub use rows::{InvalidTokens, TokenProblem};

/// Tokens that go through an encoder at once, or one row if it has more. Bounds the memory of the
/// activations: 16 rows of 77 tokens of bigG keep about 100 MB alive.
const TOKENS_PER_PASS: usize = 16 * 77;

/// The tokens of one prompt.
pub type PromptTokens = BTreeMap<Component, ComponentTokens>;

/// What a diffusion model is conditioned on, for one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Conditioning {
    /// `[1, tokens, width]`: as many tokens as all chunks of the prompt have, of the component that
    /// has the fewest.
    pub cond: Array,
    /// `[1, width]`.
    pub pooled: Array,
}

/// Row-major f32 elements with their shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Sizes of the dimensions, outermost first.
    pub shape: Vec<usize>,
    /// As many as the product of `shape`.
    pub elements: Vec<f32>,
}

/// How to see the weights of each component.
pub type Views<'a> = BTreeMap<Component, &'a dyn Parameters>;

/// Encodes `prompts` as `plan` says, with the weights that `views` shows. The prompts have the
/// plan's components, and [`rows::check`] accepted them.
///
/// # Errors
/// When the device fails, for example for want of memory.
pub fn encode(
    model: &LoadedModel,
    prompts: &[&PromptTokens],
    plan: &Plan,
    views: &Views<'_>,
) -> candle_core::Result<Vec<Conditioning>> {
    let mut results: Vec<Vec<Part>> = prompts.iter().map(|_| Vec::new()).collect();
    for (component, planned) in &plan.components {
        let (Some(encoder), Some(view)) = (model.components.get(component), views.get(component))
        else {
            candle_core::bail!("the plan has `{component}`, which the model has not");
        };
        let tokens: Vec<&ComponentTokens> =
            prompts.iter().filter_map(|prompt| prompt.get(component)).collect();
        let empty = prompt::empty_chunk(*component, encoder.config().positions);
        let rows = rows_of(&tokens, plan.weighted.then_some(&empty));
        let states = run(encoder, *view, &rows, planned)?;
        let mut start = 0;
        for (tokens, parts) in tokens.iter().zip(&mut results) {
            let end = start + tokens.chunks.len();
            let part = states.part(start..end);
            parts.push(
                if plan.weighted && tokens.chunks.iter().any(protocol::Chunk::is_weighted) {
                    weighting::apply(part, &tokens.chunks, states.last_row())
                } else {
                    part
                },
            );
            start = end;
        }
    }
    Ok(results.into_iter().map(join).collect())
}

/// What one component says about one prompt.
struct Part {
    /// `[positions · chunks, width]`.
    hidden: Vec<f32>,
    width: usize,
    /// Nothing for a component whose pooled output nobody uses.
    pooled: Option<Vec<f32>>,
}

/// What one component says about all rows of a job.
struct States {
    /// `[rows · positions, width]`.
    hidden: Vec<f32>,
    width: usize,
    /// Tokens of one row.
    positions: usize,
    /// By row.
    pooled: BTreeMap<usize, Vec<f32>>,
}

impl States {
    fn part(&self, rows: std::ops::Range<usize>) -> Part {
        let row = self.positions * self.width;
        Part {
            hidden: self.hidden[rows.start * row..rows.end * row].to_vec(),
            width: self.width,
            pooled: self.pooled.get(&rows.start).cloned(),
        }
    }

    fn last_row(&self) -> &[f32] {
        &self.hidden[self.hidden.len() - self.positions * self.width..]
    }
}

/// Runs all rows, as many at a time as [`TOKENS_PER_PASS`] allows.
fn run(
    encoder: &TextModel,
    view: &dyn Parameters,
    rows: &[Row<'_>],
    plan: &ComponentPlan,
) -> candle_core::Result<States> {
    let TextConfig { hidden: width, positions, .. } = *encoder.config();
    let rows_per_pass = (TOKENS_PER_PASS / positions).max(1);
    let mut states = States {
        hidden: Vec::with_capacity(rows.len() * positions * width),
        width,
        positions,
        pooled: BTreeMap::new(),
    };
    for (pass, rows) in rows.chunks(rows_per_pass).enumerate() {
        let batch = batch_of(rows, plan.pooled);
        let output = encoder.forward(view, &batch, plan.hidden)?;
        states.hidden.extend(output.hidden.flatten_all()?.to_vec1::<f32>()?);
        let Some(pooled) = output.pooled else { continue };
        let pooled = match plan.pooled {
            Pooled::Projected => view.linear(Module::Projection, &pooled)?,
            Pooled::Plain | Pooled::Unused => pooled,
        };
        let first = pass * rows_per_pass;
        let pooled = pooled.to_vec2::<f32>()?;
        states.pooled.extend(
            batch.pooled.iter().zip(pooled).map(|((row, _), pooled)| (first + row, pooled)),
        );
    }
    Ok(states)
}

fn batch_of<'a>(rows: &[Row<'a>], pooled: Pooled) -> Batch<'a> {
    let mut batch = Batch::default();
    for (index, row) in rows.iter().enumerate() {
        let start = batch.ids.len();
        let vectors = row.vectors();
        batch
            .vectors
            .extend(vectors.map(|(at, elements)| VectorRow { index: start + at, elements }));
        batch.ids.extend(row.ids());
        if row.is_first && pooled != Pooled::Unused {
            batch.pooled.push((index, row.pooled_position()));
        }
    }
    batch
}

/// Joins the components of one prompt on the feature axis, cut to the shortest; the last pooled
/// output is the family's.
fn join(parts: Vec<Part>) -> Conditioning {
    let tokens = parts.iter().map(|part| part.hidden.len() / part.width).min().unwrap_or(0);
    let width = parts.iter().map(|part| part.width).sum();
    let elements = match parts.as_slice() {
        [only] => only.hidden.clone(),
        parts => (0..tokens)
            .flat_map(|token| {
                parts.iter().map(move |part| &part.hidden[token * part.width..][..part.width])
            })
            .flatten()
            .copied()
            .collect(),
    };
    let pooled = parts.into_iter().rev().find_map(|part| part.pooled).unwrap_or_default();
    Conditioning {
        cond: Array { shape: vec![1, tokens, width], elements },
        pooled: Array { shape: vec![1, pooled.len()], elements: pooled },
    }
}
