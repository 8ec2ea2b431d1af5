//! Patched weights in place of a model's own, for as long as one guard lives.

use std::sync::RwLockWriteGuard;

use candle_core::{Result, Tensor};

use super::{held::Held, parameter::Parameter, parameters::Parameters};

/// The only access to an encoder's weights while it lives. However it ends (success, error, panic),
/// its drop puts the originals back, which were kept by pointer: detaching is exact, and cannot fail.
#[derive(Debug)]
pub struct Attachment<'a> {
    weights: RwLockWriteGuard<'a, Held>,
    originals: Held,
}

impl<'a> Attachment<'a> {
    pub(super) fn new(weights: RwLockWriteGuard<'a, Held>) -> Self {
        let originals = weights.clone();
        Self { weights, originals }
    }

    /// Puts `tensor` in place of the parameter.
    ///
    /// # Errors
    /// When the encoder has no such parameter, or one of another shape.
    pub fn replace(&mut self, parameter: Parameter, tensor: Tensor) -> Result<()> {
        match self.weights.stored_mut(parameter) {
            Some(held) if held.shape() == tensor.shape() => *held = tensor,
            _ => candle_core::bail!("the encoder has no parameter `{parameter}` of this shape"),
        }
        Ok(())
    }

    /// The weights as they are now.
    pub fn attached(&self) -> &Held {
        &self.weights
    }

    /// The weights as they were, and will be.
    pub const fn originals(&self) -> &Held {
        &self.originals
    }
}

impl Drop for Attachment<'_> {
    fn drop(&mut self) {
        std::mem::swap(&mut *self.weights, &mut self.originals);
    }
}

impl Parameters for Attachment<'_> {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        self.weights.parameter(parameter)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.weights.embed(ids)
    }

    fn original(&self) -> &dyn Parameters {
        &self.originals
    }
}
