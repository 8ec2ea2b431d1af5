//! A model as a worker holds it.

use std::{collections::BTreeMap, sync::RwLockReadGuard};

use protocol::{Component, Dtype, Family, ModelDigest, ModelName, reply::ModelInfo};

use super::{attachment::Attachment, held::Held, text::TextModel};

/// The weights of all components, locked for readers.
pub type Readings<'a> = BTreeMap<Component, RwLockReadGuard<'a, Held>>;

/// All components of one model, loaded and identified.
#[derive(Debug)]
pub struct LoadedModel {
    /// What people call it.
    pub name: ModelName,
    /// Which components it has and how their outputs are joined.
    pub family: Family,
    /// What its weights are: the same for the same weights, whatever files they came from.
    pub digest: ModelDigest,
    /// The element type that every weight was rounded to.
    pub dtype: Dtype,
    /// The encoders: one for every component of the family.
    pub components: BTreeMap<Component, TextModel>,
}

impl LoadedModel {
    /// The weights of all components as they were loaded, locked for readers: see
    /// [`TextModel::read`].
    pub fn read(&self) -> Readings<'_> {
        // Everybody locks in the order of the components, so nobody waits in a circle.
        self.components.iter().map(|(component, encoder)| (*component, encoder.read())).collect()
    }

    /// The weights of all components for one user alone: see [`TextModel::attach`].
    pub fn attach(&self) -> BTreeMap<Component, Attachment<'_>> {
        self.components.iter().map(|(component, encoder)| (*component, encoder.attach())).collect()
    }

    /// Elements of all parameters of all components.
    pub fn parameter_count(&self) -> usize {
        self.components.values().map(TextModel::parameter_count).sum()
    }

    /// Bytes that all parameters take on the device.
    pub fn byte_count(&self) -> u64 {
        self.components.values().map(|component| component.byte_count() as u64).sum()
    }

    /// What the farm is told about the model.
    pub fn info(&self) -> ModelInfo {
        let chunk_tokens = self.components.iter().map(|(component, encoder)| {
            let positions = u32::try_from(encoder.config().positions);
            (*component, positions.expect("the loader limits positions"))
        });
        ModelInfo {
            name: self.name.clone(),
            digest: self.digest,
            family: self.family,
            weights_dtype: self.dtype,
            bytes: self.byte_count(),
            chunk_tokens: chunk_tokens.collect(),
        }
    }
}
