//! The models that this worker serves: where each comes from, what it is, and its weights while
//! they are in memory.
//!
//! Which of them are in memory is for the core to say. A model that is loaded again must have the
//! digest that it was registered with: files that changed on disk are another model, and requests
//! for the old one must not be answered with it.

mod loader;

use std::{collections::BTreeMap, sync::Arc};

use protocol::{ErrorCode, Failure, ModelName, reply::ModelInfo};

use crate::{
    model::{LoadedModel, ModelSpec},
    request::Request,
};

pub(crate) use loader::{LoadTask, ModelLoader, load};

/// All models of this worker, by name.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    entries: BTreeMap<ModelName, Entry>,
}

#[derive(Debug)]
struct Entry {
    spec: ModelSpec,
    info: ModelInfo,
    loaded: Option<Arc<LoadedModel>>,
}

impl Catalog {
    /// Adds a model that was just read. Its weights are kept if it `stays` in memory.
    pub(crate) fn add(&mut self, spec: ModelSpec, model: LoadedModel, stays: bool) {
        let info = model.info();
        let loaded = stays.then(|| Arc::new(model));
        self.entries.insert(spec.name.clone(), Entry { spec, info, loaded });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the models are, by name.
    pub(crate) fn infos(&self) -> Vec<ModelInfo> {
        self.entries.values().map(|entry| entry.info.clone()).collect()
    }

    /// Checks that the model that `request` names is here.
    pub(crate) fn check(&self, request: &Request) -> Result<(), Failure> {
        let unknown = |message| Failure::new(ErrorCode::UnknownModel, message);
        let Some(Entry { info, .. }) = self.entries.get(&request.model) else {
            let known = self.entries.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(unknown(format!(
                "no model `{}` here: this worker has {known}",
                request.model
            )));
        };
        match request.model_digest {
            Some(asked) if asked != info.digest => Err(unknown(format!(
                "model `{}` has digest {}, not {asked}",
                info.name, info.digest
            ))),
            _ => Ok(()),
        }
    }

    /// The weights of a model, if they are in memory.
    pub(crate) fn weights(&self, model: &ModelName) -> Option<&Arc<LoadedModel>> {
        self.entries.get(model)?.loaded.as_ref()
    }

    /// How to load a model again.
    pub(crate) fn load_task(&self, model: &ModelName) -> Option<LoadTask> {
        let entry = self.entries.get(model)?;
        Some(LoadTask::Load(entry.spec.clone(), entry.info.digest))
    }

    /// Keeps the weights of a model.
    pub(crate) fn keep(&mut self, model: LoadedModel) {
        if let Some(entry) = self.entries.get_mut(&model.name) {
            entry.loaded = Some(Arc::new(model));
        }
    }

    /// Takes the weights of a model out.
    pub(crate) fn take(&mut self, model: &ModelName) -> Option<Arc<LoadedModel>> {
        self.entries.get_mut(model)?.loaded.take()
    }
}
