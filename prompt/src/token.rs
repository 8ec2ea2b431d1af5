//! One token of a prompt, and the ids that CLIP reserves.

use protocol::Component;

/// Opens every chunk.
pub(crate) const START: u32 = 49406;

/// Closes the text of every chunk; the pooled output is taken here.
pub(crate) const END: u32 = 49407;

/// What fills a chunk behind its end token: the end token again for `clip_l`, id 0 for `clip_g`.
pub const fn pad_id(component: Component) -> u32 {
    match component {
        Component::ClipL => END,
        Component::ClipG => 0,
    }
}

/// What stands at one position of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// An entry of the vocabulary.
    Id(u32),
    /// A vector of an embedding.
    Vector(VectorRef),
}

/// A vector of an embedding that the prompt names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorRef {
    /// Index in [`Rows::embeddings`](crate::Rows::embeddings).
    pub embedding: usize,
    /// Row of that embedding's vectors.
    pub row: usize,
}

/// A token and its weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightedToken {
    /// The token.
    pub token: Token,
    /// Finite; exactly 1 for start, end and padding.
    pub weight: f64,
}

impl WeightedToken {
    /// A token without a weight of its own.
    pub(crate) const fn plain(id: u32) -> Self {
        Self { token: Token::Id(id), weight: 1.0 }
    }
}
