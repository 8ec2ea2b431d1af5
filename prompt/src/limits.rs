//! How much a prompt may ask for.

/// Bounds on one prompt; beyond one of them the answer is [`PromptError::TooLarge`].
///
/// [`PromptError::TooLarge`]: crate::PromptError::TooLarge
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Length of the text in bytes.
    pub prompt_bytes_max: usize,
    /// Rows of the encoder's length.
    pub chunks_max: usize,
    /// Brackets around one piece of text. ComfyUI stops near 990, at Python's recursion limit.
    pub bracket_levels_max: usize,
    /// Different names looked up among the embeddings; each may cost the directory some reads.
    pub embedding_names_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            prompt_bytes_max: 64 * 1024,
            chunks_max: 64,
            bracket_levels_max: 256,
            embedding_names_max: 256,
        }
    }
}
