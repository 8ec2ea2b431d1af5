//! The weights of one encoder as the device holds them.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

use super::{
    parameter::{Module, Parameter},
    parameters::Parameters,
};

/// Tensors by parameter. A clone shares them by pointer.
#[derive(Debug, Clone)]
pub struct Held {
    tensors: BTreeMap<Parameter, Tensor>,
}

impl Held {
    pub(super) const fn new(tensors: BTreeMap<Parameter, Tensor>) -> Self {
        Self { tensors }
    }

    /// The parameter as it is held, whatever its element type.
    pub fn stored(&self, parameter: Parameter) -> Option<&Tensor> {
        self.tensors.get(&parameter)
    }

    /// All parameters as they are held, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Parameter, &Tensor)> {
        self.tensors.iter().map(|(parameter, tensor)| (*parameter, tensor))
    }

    pub(super) fn stored_mut(&mut self, parameter: Parameter) -> Option<&mut Tensor> {
        self.tensors.get_mut(&parameter)
    }

    pub(super) fn parameter_count(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    pub(super) fn byte_count(&self) -> usize {
        self.tensors.values().map(byte_count).sum()
    }

    fn required(&self, parameter: Parameter) -> Result<&Tensor> {
        match self.stored(parameter) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("the encoder has no parameter `{parameter}`"),
        }
    }
}

impl Parameters for Held {
    fn parameter(&self, parameter: Parameter) -> Result<Tensor> {
        self.required(parameter)?.to_dtype(DType::F32)
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let table = self.required(Module::TokenEmbedding.weight())?;
        table.index_select(ids, 0)?.to_dtype(DType::F32)
    }

    fn original(&self) -> &dyn Parameters {
        self
    }
}

/// Bytes of a tensor's elements.
fn byte_count(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
