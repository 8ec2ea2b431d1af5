//! The seam between the forward pass and the execution modes.

use candle_core::{Result, Tensor};

use super::parameter::{Module, Parameter};

/// Epsilon of every layer norm of CLIP.
const NORM_EPSILON: f32 = 1e-5;

/// How the forward pass gets at the parameters of one text encoder.
///
/// An implementation stands for one way to see the weights: as they are held ([`Held`](super::Held)), or with a
/// stack applied. It must have every parameter of the encoder's
/// [`TextConfig`](super::TextConfig) and must answer the same for the whole pass.
pub trait Parameters {
    /// The parameter as f32, in the shape that the configuration says.
    ///
    /// # Errors
    /// When the device fails, for example for want of memory.
    fn parameter(&self, parameter: Parameter) -> Result<Tensor>;

    /// The token embeddings of `ids` as f32: `[ids, hidden]`.
    ///
    /// # Errors
    /// When an id is not in the vocabulary, or the device fails.
    fn embed(&self, ids: &Tensor) -> Result<Tensor>;

    /// The weights as they were loaded, whatever this view makes of them.
    fn original(&self) -> &dyn Parameters;

    /// `input · Wᵀ + b` for rows of inputs: `[rows, in]` gives `[rows, out]`.
    ///
    /// # Errors
    /// When the device fails.
    fn linear(&self, module: Module, input: &Tensor) -> Result<Tensor> {
        let output = input.matmul(&self.parameter(module.weight())?.t()?)?;
        if !module.has_bias() {
            return Ok(output);
        }
        output.broadcast_add(&self.parameter(module.bias())?)
    }

    /// The layer norm of every row of `input`, `[rows, hidden]`.
    ///
    /// # Errors
    /// When the device fails.
    fn norm(&self, module: Module, input: &Tensor) -> Result<Tensor> {
        let weight = self.parameter(module.weight())?;
        let bias = self.parameter(module.bias())?;
        candle_nn::ops::layer_norm(input, &weight, &bias, NORM_EPSILON)
    }
}
