//! ComfyUI's prompt syntax, the CLIP tokenizer and chunking, for clients that send text.
//!
//! A ComfyUI process tokenises with what is installed there and sends tokens; this crate serves
//! everyone else. It gives the tokens of ComfyUI 0.3.64 with transformers 4.57 and without `ftfy`;
//! later versions of either differ in rare characters and in how an embedding's name ends.
//!
//! A prompt passes through these steps, a file each:
//!
//! 1. `syntax`: brackets and weights, text → segments;
//! 2. `group`: `embedding:` names and plain pieces, segments → groups of tokens, with `tokenizer`
//!    (on `normalize` and `bpe`) for text and [`Embeddings`] for names;
//! 3. `rows`: groups → [`Rows`] of 77 tokens, or of as many as a LongCLIP takes, exactly as
//!    ComfyUI lists them;
//! 4. `tokenized`: rows → the chunks that a request carries, for one encoder width.
//!
//! [`tokenize`] runs them all. Nothing here reads a file: whoever owns the directory of
//! textual-inversion files implements [`Embeddings`]. **Invariant:** the same arguments always give
//! the same result, and no text makes this crate panic or work without a bound.
//!
//! ```
//! use luna_prompt::{Encoder, Limits, Tokenizer, tokenize};
//! use protocol::Component;
//!
//! let tokenizer = Tokenizer::new(); // keep it
//! let encoder = Encoder { component: Component::ClipL, width: 768, chunk_tokens: 77 };
//! let made = tokenize(&tokenizer, "a (red:1.3) cat", encoder, None, Limits::default())?;
//!
//! let [chunk] = &made.tokens.chunks[..] else { unreachable!("a short prompt is one chunk") };
//! assert_eq!(chunk.ids[..5], [49406, 320, 736, 2368, 49407]);
//! assert_eq!(chunk.weights[..4], [1.0, 1.0, 1.3, 1.0]);
//! # Ok::<(), luna_prompt::PromptError>(())
//! ```

mod bpe;
mod embedding;
mod error;
mod group;
mod limits;
mod normalize;
mod python;
mod rows;
mod syntax;
mod token;
mod tokenized;
mod tokenizer;

pub use embedding::{EmbeddingFailure, Embeddings};
pub use error::{Counted, PromptError, Warning};
pub use limits::Limits;
pub use rows::{NamedVectors, Rows, rows};
pub use token::{Token, VectorRef, WeightedToken, pad_id};
pub use tokenized::{Encoder, Tokenized, empty_chunk, tokenize};
pub use tokenizer::Tokenizer;
