//! Why a prompt is refused, and what is worth telling about one that is not.
//!
//! Messages never quote the prompt, because errors are logged and prompts are not. Embedding names
//! are quoted: they name files.

use std::fmt;

use protocol::{CHUNK_TOKENS, Component};

use crate::embedding::EmbeddingFailure;

/// Why a prompt has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// A bound of [`Limits`](crate::Limits) is exceeded.
    #[error("the prompt has `{value}` {counted}, the limit is `{limit}`: shorten the prompt")]
    TooLarge {
        /// What is too many.
        counted: Counted,
        /// How many there are, or how many were counted before counting stopped.
        value: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The encoder is said to take fewer tokens than any does; a group that must not be cut might
    /// fit no chunk.
    #[error(
        "chunks of `{component}` have `{chunk_tokens}` tokens: expected at least `{CHUNK_TOKENS}`"
    )]
    ShortChunks {
        /// The encoder.
        component: Component,
        /// Its tokens per chunk, as the caller said.
        chunk_tokens: usize,
    },
    /// Text has an infinite or undefined weight, such as `(cat:inf)`. ComfyUI computes with it;
    /// the result would hold no usable number.
    #[error("weight `{weight}` is not finite: give a plain number after the last `:` of a bracket")]
    NonFiniteWeight {
        /// The weight at fault.
        weight: f64,
    },
    /// `embedding:` with nothing but blanks behind it. ComfyUI fails on it, too.
    #[error("`embedding:` is not followed by a name: write `embedding:<name>`, or leave it out")]
    UnnamedEmbedding,
    /// Looking up an embedding failed, which is not the same as its absence.
    #[error("embedding `{name}` cannot be read for `{component}`: repair or remove its file")]
    UnreadableEmbedding {
        /// The name in the prompt.
        name: String,
        /// The encoder that it was read for.
        component: Component,
        /// What the directory reported.
        source: EmbeddingFailure,
    },
    /// An embedding was found, but its elements are not a positive number of whole vectors.
    #[error(
        "embedding `{name}` has `{elements}` elements for vectors of width `{width}`: repair or \
         remove its file"
    )]
    MalformedEmbedding {
        /// The name in the prompt.
        name: String,
        /// Elements found.
        elements: usize,
        /// Elements of one vector, as the directory says.
        width: usize,
    },
}

/// What [`PromptError::TooLarge`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Bytes of the text.
    Bytes,
    /// Rows of the encoder's length.
    Chunks,
    /// Brackets around one piece of text.
    BracketLevels,
    /// Different embedding names.
    EmbeddingNames,
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Chunks => "chunks",
            Self::BracketLevels => "levels of brackets",
            Self::EmbeddingNames => "embedding names",
        })
    }
}

/// Something in an accepted prompt that had no effect, as in ComfyUI; each name is reported once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// No such embedding; nothing is inserted in its place.
    #[error("embedding `{name}` was not found and is left out")]
    EmbeddingNotFound {
        /// The name in the prompt, without commas around it.
        name: String,
    },
    /// The vectors are not as wide as the encoder; pads at the end of the chunk replace them.
    #[error("embedding `{name}` has width `{got}`, `{component}` needs `{want}`: it is left out")]
    WrongWidth {
        /// The name in the prompt.
        name: String,
        /// The encoder.
        component: Component,
        /// Elements of each vector found.
        got: usize,
        /// Elements of a vector of the encoder.
        want: usize,
    },
}
