//! Where textual-inversion vectors come from, seen from the prompt.
//!
//! Which files there are, which names stay inside their directory and which tensor of a file is
//! meant are the directory's business; here is only the question that the prompt asks.

use std::error::Error;

use protocol::{Component, VectorTable};

/// Why a directory could not answer.
pub type EmbeddingFailure = Box<dyn Error + Send + Sync>;

/// A directory of textual-inversion files.
pub trait Embeddings {
    /// The vectors of `name` for `component`, of whatever width the file has; nothing if there is
    /// no such file.
    ///
    /// `name` is as written in the prompt: it may hold path separators, and the implementation must
    /// refuse to leave its directory.
    ///
    /// # Errors
    /// If the file is there but cannot be used. A prompt must not lose an embedding to that.
    fn find(
        &self,
        name: &str,
        component: Component,
    ) -> Result<Option<VectorTable>, EmbeddingFailure>;
}
