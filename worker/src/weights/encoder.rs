//! One encoder of a file: its sizes, then its tensors.

use std::{borrow::Cow, collections::BTreeMap};

use candle_core::{Device, Tensor};
use protocol::{CHUNK_TOKENS, Component, Dtype};

use super::{
    convert::{Elements, Stored, float_dtype},
    error::LoadError,
    file::{Entry, TensorFile},
    heads::heads_and_activation,
    names::{Found, Naming, Part, Source},
};
use crate::model::{LayerModule, Module, Parameter, TextConfig, TextModel};

/// Layers of an encoder; bigG has 32.
const LAYERS_MAX: usize = 256;

/// Positions of an encoder; LongCLIP has 248.
const POSITIONS_MAX: usize = 1024;

/// An encoder that was found in a file and whose sizes are known.
pub(super) struct Encoder<'a> {
    file: &'a TensorFile,
    naming: &'a Naming,
    config: TextConfig,
}

impl<'a> Encoder<'a> {
    /// Reads the sizes from the shapes of a few tensors.
    pub(super) fn inspect(
        file: &'a TensorFile,
        found: &'a Found,
        component: Component,
    ) -> Result<Self, LoadError> {
        let naming = &found.naming;
        let layers = naming.layers(file);
        if layers > LAYERS_MAX {
            let (file, found) = (file.path().to_owned(), layers - 1);
            return Err(LoadError::Layers { file, found, most: LAYERS_MAX });
        }
        let [vocab, hidden] = matrix(file, naming, Module::TokenEmbedding)?;
        let [intermediate, _] = matrix(file, naming, Module::Layer(0, LayerModule::Fc1))?;
        let (heads, activation) = heads_and_activation(file.path(), component, hidden)?;
        let projection = match component {
            // No family projects CLIP-L's pooled output, and checkpoints do not have the weight.
            Component::ClipL => None,
            Component::ClipG => Some(projection_width(file, naming)?),
        };
        let positions = positions(file, naming, hidden)?;
        let config = TextConfig {
            hidden,
            layers,
            intermediate,
            heads,
            activation,
            vocab,
            positions,
            projection,
        };
        Ok(Self { file, naming, config })
    }

    /// Reads every parameter, in the order of their names, and adds them to the model's digest.
    pub(super) fn load(
        &self,
        component: Component,
        dtype: Dtype,
        device: &Device,
        hasher: &mut blake3::Hasher,
    ) -> Result<TextModel, LoadError> {
        let placed =
            |source| LoadError::Device { file: self.file.path().to_owned(), component, source };
        let mut parameters = BTreeMap::new();
        for parameter in self.config.parameters() {
            let shape = self.config.shape(parameter).expect("listed by the same configuration");
            let source = self.naming.locate(parameter, self.file);
            let (entry, file_dtype) = self.checked(&source, &shape)?;
            describe(hasher, component, parameter, dtype, &shape);
            let bytes = part_of(self.file.bytes(entry), file_dtype, source.part, &shape);
            let elements = Elements { dtype: file_dtype, bytes: &bytes };
            let tensor = if parameter.module == Module::TokenEmbedding {
                place(elements.stored(dtype, hasher), &shape, device)
            } else {
                Tensor::from_vec(elements.rounded(dtype, hasher), shape, device)
            };
            parameters.insert(parameter, tensor.map_err(placed)?);
            self.file.release(entry);
        }
        TextModel::new(self.config.clone(), dtype, parameters, device).map_err(placed)
    }

    /// The tensor that holds a parameter of `shape`, or what is wrong with it.
    fn checked(&self, source: &Source, shape: &[usize]) -> Result<(&'a Entry, Dtype), LoadError> {
        let Source { tensor, part } = source;
        let entry = self.file.entry(tensor)?;
        let expected = match part {
            Part::Whole => shape.to_vec(),
            Part::Third(_) => {
                shape.iter().enumerate().map(|(i, &n)| if i == 0 { 3 * n } else { n }).collect()
            }
            Part::Transposed => shape.iter().rev().copied().collect(),
        };
        let (file, tensor) = (self.file.path().to_owned(), tensor.clone());
        if entry.shape != expected {
            return Err(LoadError::Shape { file, tensor, expected, found: entry.shape.clone() });
        }
        let found = entry.dtype;
        let dtype = float_dtype(found).ok_or(LoadError::Dtype { file, tensor, found })?;
        Ok((entry, dtype))
    }
}

/// The shape of a module's weight, which has two dimensions.
fn matrix(file: &TensorFile, naming: &Naming, module: Module) -> Result<[usize; 2], LoadError> {
    let Source { tensor, .. } = naming.locate(module.weight(), file);
    let found = &file.entry(&tensor)?.shape;
    <[usize; 2]>::try_from(found.as_slice()).map_err(|_| LoadError::NotMatrix {
        file: file.path().to_owned(),
        tensor,
        found: found.clone(),
    })
}

/// Rows of the table of positions: those of an ordinary CLIP, or more.
fn positions(file: &TensorFile, naming: &Naming, hidden: usize) -> Result<usize, LoadError> {
    let found @ [rows, _] = matrix(file, naming, Module::PositionEmbedding)?;
    let tensor = || naming.locate(Module::PositionEmbedding.weight(), file).tensor;
    if rows < CHUNK_TOKENS {
        let (expected, found) = (vec![CHUNK_TOKENS, hidden], found.to_vec());
        let (file, tensor) = (file.path().to_owned(), tensor());
        return Err(LoadError::Shape { file, tensor, expected, found });
    }
    if rows > POSITIONS_MAX {
        let (file, tensor) = (file.path().to_owned(), tensor());
        return Err(LoadError::Positions { file, tensor, found: rows, most: POSITIONS_MAX });
    }
    Ok(rows)
}

fn projection_width(file: &TensorFile, naming: &Naming) -> Result<usize, LoadError> {
    let [outputs, inputs] = matrix(file, naming, Module::Projection)?;
    match naming.locate(Module::Projection.weight(), file).part {
        Part::Transposed => Ok(inputs),
        Part::Whole | Part::Third(_) => Ok(outputs),
    }
}

/// The bytes of one parameter in those of its tensor.
fn part_of<'a>(bytes: &'a [u8], dtype: Dtype, part: Part, shape: &[usize]) -> Cow<'a, [u8]> {
    match part {
        Part::Whole => bytes.into(),
        Part::Third(index) => {
            let third = bytes.len() / 3;
            (&bytes[index * third..(index + 1) * third]).into()
        }
        Part::Transposed => {
            let (outputs, inputs) = (shape[0], shape[1]);
            Elements { dtype, bytes }.transposed(inputs, outputs).into()
        }
    }
}

fn place(stored: Stored, shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
    match stored {
        Stored::Float32(elements) => Tensor::from_vec(elements, shape, device),
        Stored::Float16(elements) => Tensor::from_vec(elements, shape, device),
        Stored::Bfloat16(elements) => Tensor::from_vec(elements, shape, device),
    }
}

/// Adds what a parameter is to the digest; its bytes follow. Every part is of known length or
/// ends with a byte that it cannot contain, so no two models are described alike.
fn describe(
    hasher: &mut blake3::Hasher,
    component: Component,
    parameter: Parameter,
    dtype: Dtype,
    shape: &[usize],
) {
    for text in [component.as_str(), &parameter.to_string(), dtype.as_str()] {
        hasher.update(text.as_bytes()).update(&[0]);
    }
    hasher.update(&(shape.len() as u64).to_le_bytes());
    for &size in shape {
        hasher.update(&(size as u64).to_le_bytes());
    }
}
