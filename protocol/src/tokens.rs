//! Tokens as a request carries them: chunks of ids, inline vectors and weights.
//!
//! A chunk is one row of the encoder: [`CHUNK_TOKENS`] positions, each a token id or a vector
//! (textual inversion), each with a weight. Ids and vectors are kept apart because almost every
//! chunk is ids alone: `ids` lists the ids in order, `vectors` says at which position a row of the
//! vector table is inserted, and positions count ids and vectors alike.

use serde::{Deserialize, Serialize};

/// Positions of one chunk: start token, at most 75 tokens, end token, padding.
pub const CHUNK_TOKENS: usize = 77;

/// One row of tokens for one encoder.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Chunk {
    /// Token ids in order, without the positions that hold vectors.
    pub ids: Vec<u32>,
    /// One weight for every position, ids and vectors alike; empty when every weight is 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// Vectors to insert, by ascending position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vectors: Vec<VectorAt>,
}

impl Chunk {
    /// Positions of this chunk: ids and vectors together.
    pub fn positions(&self) -> usize {
        self.ids.len() + self.vectors.len()
    }

    /// Whether any weight differs from 1 (compared exactly, as ComfyUI does).
    #[expect(clippy::float_cmp, reason = "the rule is exact inequality with 1")]
    pub fn is_weighted(&self) -> bool {
        self.weights.iter().any(|&weight| weight != 1.0)
    }
}

/// A vector at a position of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorAt {
    /// Index in the chunk, counting ids and vectors alike.
    pub position: u32,
    /// Row of the component's vector table.
    pub row: u32,
}

/// Vectors that chunks refer to by row, all equally wide.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VectorTable {
    /// Elements of one vector; 0 for an empty table.
    pub width: usize,
    /// Row-major elements, `rows · width` of them.
    pub elements: Vec<f32>,
}

impl VectorTable {
    /// Number of vectors.
    pub fn rows(&self) -> usize {
        self.elements.len().checked_div(self.width).unwrap_or(0)
    }

    /// The vector in `row`, or nothing beyond the end.
    pub fn row(&self, row: usize) -> Option<&[f32]> {
        self.elements.get(row * self.width..(row + 1) * self.width)
    }
}

/// All chunks of one prompt for one component.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ComponentTokens {
    /// Chunks in order; their encodings are joined on the token axis.
    pub chunks: Vec<Chunk>,
    /// The vectors that the chunks refer to.
    pub vectors: VectorTable,
}

/// Which hidden state of an encoder is the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The last layer's output after the final layer norm.
    Last,
    /// The output of one layer; negative counts from the end, -1 is the last layer's output.
    Hidden(i32),
}
