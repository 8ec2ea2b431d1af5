//! Causal multi-head attention over rows of tokens.

use candle_core::{D, Device, Result, Tensor};

/// The causal mask: 0 where a token may look, minus infinity where it may not;
/// `[positions, positions]`.
pub(super) fn causal_mask(positions: usize, device: &Device) -> Result<Tensor> {
    let elements: Vec<f32> = (0..positions)
        .flat_map(|query| {
            (0..positions).map(move |key| if key > query { f32::NEG_INFINITY } else { 0.0 })
        })
        .collect();
    Tensor::from_vec(elements, (positions, positions), device)
}

/// Queries, keys and values of one layer, each `[rows · positions, hidden]`.
pub(super) struct Projections {
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    pub(super) value: Tensor,
}

impl Projections {
    /// `softmax(q kᵀ / √head + mask) v` for every row and head: `[rows · positions, hidden]`. A row
    /// is as long as `mask`.
    pub(super) fn attend(&self, heads: usize, mask: &Tensor) -> Result<Tensor> {
        let (tokens, hidden) = self.query.dims2()?;
        let positions = mask.dim(0)?;
        let (rows, head) = (tokens / positions, hidden / heads);
        let split = |states: &Tensor| {
            states.reshape((rows, positions, heads, head))?.transpose(1, 2)?.contiguous()
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
