//! One text encoder and its forward pass.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use candle_core::{Device, Result, Tensor};
use protocol::Dtype;

use super::{
    activation::activate,
    attachment::Attachment,
    attention::{Projections, causal_mask},
    config::TextConfig,
    held::Held,
    parameter::{LayerModule, Module, Parameter},
    parameters::Parameters,
};

/// One text encoder: its sizes and its weights.
///
/// The weights are those that were loaded, except while an [`Attachment`] exists. Whoever reads them
/// holds the lock for a whole pass, so that no pass sees two states.
#[derive(Debug)]
pub struct TextModel {
    config: TextConfig,
    dtype: Dtype,
    weights: RwLock<Held>,
    parameter_count: usize,
    byte_count: usize,
    mask: Tensor,
    device: Device,
}

/// Rows of tokens, each of [`TextConfig::positions`], that go through the encoder together.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    /// Token ids of all rows, one after the other; 0 where a vector goes.
    pub ids: Vec<u32>,
    /// Vectors that replace the embedding of their position, in any order.
    pub vectors: Vec<VectorRow<'a>>,
    /// For every row whose pooled output is wanted: the row, and the position to take it from.
    pub pooled: Vec<(usize, usize)>,
}

/// A vector in place of a token's embedding.
#[derive(Debug, Clone, Copy)]
pub struct VectorRow<'a> {
    /// Index in [`Batch::ids`].
    pub index: usize,
    /// As wide as the encoder.
    pub elements: &'a [f32],
}

/// Which hidden state is the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// The last layer's output after the final layer norm.
    Last,
    /// The output of the layer with this index.
    Layer {
        /// Counts from 0; below the number of layers.
        index: usize,
        /// Whether the final layer norm is applied to it.
        final_norm: bool,
    },
}

/// What the encoder says about a batch.
#[derive(Debug)]
pub struct Output {
    /// The chosen hidden state: `[rows · positions, hidden]`.
    pub hidden: Tensor,
    /// The last layer's output after the final layer norm at every position of
    /// [`Batch::pooled`], not projected: `[pooled, hidden]`. Nothing when none was asked for.
    pub pooled: Option<Tensor>,
}

impl TextModel {
    /// An encoder of loaded parameters; `parameters` holds what `config` lists, in its shapes.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn new(
        config: TextConfig,
        dtype: Dtype,
        parameters: BTreeMap<Parameter, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let mask = causal_mask(config.positions, device)?;
        let weights = Held::new(parameters);
        let (parameter_count, byte_count) = (weights.parameter_count(), weights.byte_count());
        let (weights, device) = (RwLock::new(weights), device.clone());
        Ok(Self { config, dtype, weights, parameter_count, byte_count, mask, device })
    }

    /// The encoder's sizes.
    pub const fn config(&self) -> &TextConfig {
        &self.config
    }

    /// The element type that every weight was rounded to.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where the weights are.
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Elements of all parameters.
    pub const fn parameter_count(&self) -> usize {
        self.parameter_count
    }

    /// Bytes that the parameters take on the device, attached ones left out.
    pub const fn byte_count(&self) -> usize {
        self.byte_count
    }

    /// The weights as they were loaded; waits while patched ones are attached.
    ///
    /// To be called once per thread and pass: a second call may wait for a writer that waits for the
    /// first.
    pub fn read(&self) -> RwLockReadGuard<'_, Held> {
        // A panic while weights were attached poisons the lock, but has put the originals back.
        self.weights.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights for one user alone, who may attach others until the attachment is dropped; waits
    /// for all who read.
    pub fn attach(&self) -> Attachment<'_> {
        Attachment::new(self.weights.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `batch` with the weights that `parameters` shows. Layers that nobody needs are not
    /// run, and once the hidden state is taken only the rows with a pooled output go on.
    ///
    /// # Errors
    /// When an id is not in the vocabulary, a vector is not as wide as the encoder, or the
    /// device fails.
    pub fn forward(
        &self,
        parameters: &dyn Parameters,
        batch: &Batch<'_>,
        hidden: Hidden,
    ) -> Result<Output> {
        let mut states = self.embed(parameters, batch)?;
        let mut pooled_at = self.pooled_indices(batch);
        let mut chosen = None;
        for layer in 0..self.config.layers {
            states = self.layer(parameters, layer, &states)?;
            if let Hidden::Layer { index, final_norm } = hidden
                && index == layer
            {
                chosen = Some(if final_norm {
                    parameters.norm(Module::FinalNorm, &states)?
                } else {
                    states.clone()
                });
                if pooled_at.is_empty() {
                    break;
                }
                (states, pooled_at) = self.keep_pooled_rows(&states, batch)?;
            }
        }
        if let Some(hidden) = chosen {
            let pooled = self.select(&states, &pooled_at)?;
            let pooled = pooled.map(|states| parameters.norm(Module::FinalNorm, &states));
            return Ok(Output { hidden, pooled: pooled.transpose()? });
        }
        let hidden = parameters.norm(Module::FinalNorm, &states)?;
        let pooled = self.select(&hidden, &pooled_at)?;
        Ok(Output { hidden, pooled })
    }

    /// Token plus position embeddings: `[rows · positions, hidden]`.
    fn embed(&self, parameters: &dyn Parameters, batch: &Batch<'_>) -> Result<Tensor> {
        let TextConfig { hidden, positions: length, .. } = self.config;
        let rows = batch.ids.len() / length;
        let ids = Tensor::from_slice(&batch.ids, batch.ids.len(), &self.device)?;
        let mut tokens = parameters.embed(&ids)?;
        if !batch.vectors.is_empty() {
            tokens = self.insert_vectors(&tokens, batch)?;
        }
        let positions = parameters.parameter(Module::PositionEmbedding.weight())?;
        tokens
            .reshape((rows, length, hidden))?
            .broadcast_add(&positions)?
            .reshape((rows * length, hidden))
    }

    fn insert_vectors(&self, tokens: &Tensor, batch: &Batch<'_>) -> Result<Tensor> {
        let elements = batch.vectors.iter().flat_map(|vector| vector.elements).copied().collect();
        let shape = (batch.vectors.len(), self.config.hidden);
        let vectors = Tensor::from_vec::<_, f32>(elements, shape, &self.device)?;
        let mut sources: Vec<usize> = (0..batch.ids.len()).collect();
        for (row, vector) in batch.vectors.iter().enumerate() {
            let Some(source) = sources.get_mut(vector.index) else {
                candle_core::bail!("a vector stands at {}, beyond the batch", vector.index);
            };
            *source = batch.ids.len() + row;
        }
        let sources = self.indices(&sources)?;
        Tensor::cat(&[tokens, &vectors], 0)?.index_select(&sources, 0)
    }

    /// One pre-norm transformer layer.
    fn layer(&self, parameters: &dyn Parameters, layer: usize, states: &Tensor) -> Result<Tensor> {
        let module = |part| Module::Layer(layer, part);
        let normed = parameters.norm(module(LayerModule::Norm1), states)?;
        let projections = Projections {
            query: parameters.linear(module(LayerModule::Query), &normed)?,
            key: parameters.linear(module(LayerModule::Key), &normed)?,
            value: parameters.linear(module(LayerModule::Value), &normed)?,
        };
        let attended = projections.attend(self.config.heads, &self.mask)?;
        let states = (states + parameters.linear(module(LayerModule::Out), &attended)?)?;

        let normed = parameters.norm(module(LayerModule::Norm2), &states)?;
        let expanded = parameters.linear(module(LayerModule::Fc1), &normed)?;
        let expanded = activate(self.config.activation, &expanded)?;
        states + parameters.linear(module(LayerModule::Fc2), &expanded)?
    }

    /// The rows whose pooled output is wanted, and where their positions are among them.
    fn keep_pooled_rows(&self, states: &Tensor, batch: &Batch<'_>) -> Result<(Tensor, Vec<usize>)> {
        let length = self.config.positions;
        let rows = batch.pooled.iter().map(|(row, _)| *row);
        let kept: Vec<usize> = rows.flat_map(|row| row * length..(row + 1) * length).collect();
        let positions = batch.pooled.iter().enumerate();
        let pooled_at = positions.map(|(row, (_, at))| row * length + at).collect();
        if kept.len() == batch.ids.len() {
            return Ok((states.clone(), self.pooled_indices(batch)));
        }
        Ok((states.index_select(&self.indices(&kept)?, 0)?, pooled_at))
    }

    fn pooled_indices(&self, batch: &Batch<'_>) -> Vec<usize> {
        let length = self.config.positions;
        batch.pooled.iter().map(|(row, at)| row * length + at).collect()
    }

    fn select(&self, states: &Tensor, indices: &[usize]) -> Result<Option<Tensor>> {
        if indices.is_empty() {
            return Ok(None);
        }
        Ok(Some(states.index_select(&self.indices(indices)?, 0)?))
    }

    fn indices(&self, indices: &[usize]) -> Result<Tensor> {
        let narrow = indices.iter().map(|&index| u32::try_from(index));
        let narrow: Vec<u32> =
            narrow.collect::<std::result::Result<_, _>>().map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(narrow, indices.len(), &self.device)
    }
}
