//! Causal multi-head attention over rows of 77 tokens.

use candle_core::{D, Device, Result, Tensor};
use protocol::CHUNK_TOKENS;

/// The causal mask: 0 where a token may look, minus infinity where it may not; `[77, 77]`.
pub(super) fn causal_mask(device: &Device) -> Result<Tensor> {
    let elements: Vec<f32> = (0..CHUNK_TOKENS)
        .flat_map(|query| {
            (0..CHUNK_TOKENS).map(move |key| if key > query { f32::NEG_INFINITY } else { 0.0 })
        })
        .collect();
    Tensor::from_vec(elements, (CHUNK_TOKENS, CHUNK_TOKENS), device)
}

/// Queries, keys and values of one layer, each `[rows · 77, hidden]`.
pub(super) struct Projections {
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    pub(super) value: Tensor,
}

impl Projections {
    /// `softmax(q kᵀ / √head + mask) v` for every row and head: `[rows · 77, hidden]`.
    pub(super) fn attend(&self, heads: usize, mask: &Tensor) -> Result<Tensor> {
        let (tokens, hidden) = self.query.dims2()?;
        let (rows, head) = (tokens / CHUNK_TOKENS, hidden / heads);
        let split = |states: &Tensor| {
            states.reshape((rows, CHUNK_TOKENS, heads, head))?.transpose(1, 2)?.contiguous()
        };
        #[expect(clippy::cast_precision_loss, reason = "a head is far narrower than 2^52")]
        let scale = 1.0 / (head as f64).sqrt();

        let query = split(&(&self.query * scale)?)?;
        let scores = query.matmul(&split(&self.key)?.transpose(D::Minus2, D::Minus1)?)?;
        let scores = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(mask)?)?;
        let attended = scores.matmul(&split(&self.value)?)?;
        attended.transpose(1, 2)?.reshape((tokens, hidden))
    }
}
