//! The models that this worker serves: where each comes from, what it is, and its weights while
//! they are in memory.
//!
//! A model is registered once its files were read, so its digest is known. Which models are in
//! memory is for the core to say. When one is needed again after it left memory, its files are read
//! again, and only the same weights will do: files that changed on disk are another model, and
//! requests for the old one must not be answered with it.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::Device;
use protocol::{BlobDigest, ErrorCode, ModelDigest, ModelName, reply::ModelInfo};
use worker_core::{ModelOverBudget, Scheduler};

use super::{download::blob_of, loader::load};
use crate::{
    failure::WireError,
    model::{LoadedModel, ModelSpec},
    weights::LoadError,
};

/// Models that one worker serves; each costs its announcement some bytes and the broker a line.
pub(super) const MODELS_MAX: usize = 256;

/// All models of a worker, by name.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    models: BTreeMap<ModelName, Entry>,
}

#[derive(Debug)]
struct Entry {
    served: Arc<ServedModel>,
    weights: Option<Arc<LoadedModel>>,
}

/// A model that the worker serves: how to load it, and what it must then be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedModel {
    spec: ModelSpec,
    info: ModelInfo,
}

/// Why a model is not registered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegisterError {
    /// Another model has the name.
    #[error(
        "model `{name}` is served already with digest {registered}, these files have {found}: give \
         them another name"
    )]
    Taken {
        /// The name.
        name: ModelName,
        /// What it stands for.
        registered: ModelDigest,
        /// What it was to stand for.
        found: ModelDigest,
    },
    /// There are as many models as a worker serves.
    #[error("this worker serves {most} models already: no more are accepted")]
    Full {
        /// Models that a worker serves.
        most: usize,
    },
    /// The model could never be in memory.
    #[error(transparent)]
    OverBudget(#[from] ModelOverBudget),
}

/// No model is what was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnknownModel {
    /// Nothing has the name.
    #[error("no model `{name}` here: this worker has {known}")]
    Name {
        /// The name.
        name: ModelName,
        /// The names that there are, for people.
        known: String,
    },
    /// The model of that name has other weights.
    #[error("model `{name}` has digest {registered}, not {asked}")]
    Digest {
        /// The name.
        name: ModelName,
        /// Its digest.
        registered: ModelDigest,
        /// The digest asked for.
        asked: ModelDigest,
    },
}

/// Why a model that is served could not be loaded again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReloadError {
    /// The files hold other weights than those that were registered.
    #[error(
        "the files of model `{name}` changed on disk: it is served with digest {registered}, they \
         have {found}; restore them, or register them under another name"
    )]
    Changed {
        /// The model.
        name: ModelName,
        /// The digest that it is served with.
        registered: ModelDigest,
        /// What the files have.
        found: ModelDigest,
    },
    /// The files cannot be loaded any more.
    #[error("model `{name}` cannot be loaded again")]
    Load {
        /// The model.
        name: ModelName,
        /// What is wrong.
        source: Box<LoadError>,
    },
}

impl Catalogue {
    /// Serves from now on the model that `spec` was just loaded as, and keeps its weights if the
    /// scheduler says that they may stay. A model that is served already under this name is loaded
    /// from the newer files from now on.
    ///
    /// # Errors
    /// When its name stands for another model, it is larger than the budget, or there are too many
    /// models; nothing is changed.
    pub(crate) fn register(
        &mut self,
        spec: ModelSpec,
        model: &Arc<LoadedModel>,
        scheduler: &mut Scheduler,
    ) -> Result<&ModelInfo, RegisterError> {
        let served = ServedModel { spec, info: model.info() };
        self.check(&served)?;
        let weights = match self.models.get_mut(served.name()) {
            Some(known) => known.weights.take(),
            None => scheduler
                .register_model(served.name().clone(), model.byte_count())?
                .then(|| Arc::clone(model)),
        };
        Ok(self.insert(served, weights).info())
    }

    /// Whether `model` may have its name.
    fn check(&self, model: &ServedModel) -> Result<(), RegisterError> {
        match self.models.get(model.name()).map(|known| known.served.digest()) {
            Some(registered) if registered != model.digest() => {
                let (name, found) = (model.name().clone(), model.digest());
                Err(RegisterError::Taken { name, registered, found })
            }
            None if self.models.len() >= MODELS_MAX => {
                Err(RegisterError::Full { most: MODELS_MAX })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn insert(&mut self, served: ServedModel, weights: Option<Arc<LoadedModel>>) -> &ServedModel {
        let name = served.name().clone();
        let served = Arc::new(served);
        self.models.insert(name.clone(), Entry { served, weights });
        &self.models[&name].served
    }

    /// The model called `name`, which must have `digest` if one is given.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find(
        &self,
        name: &ModelName,
        digest: Option<ModelDigest>,
    ) -> Result<&Arc<ServedModel>, UnknownModel> {
        let Some(Entry { served, .. }) = self.models.get(name) else {
            let known = self.models.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(UnknownModel::Name { name: name.clone(), known });
        };
        match digest {
            Some(asked) if asked != served.digest() => {
                let (name, registered) = (name.clone(), served.digest());
                Err(UnknownModel::Digest { name, registered, asked })
            }
            _ => Ok(served),
        }
    }

    /// Whether nothing is served.
    pub(crate) fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// What the models are, by name.
    pub(crate) fn infos(&self) -> Vec<ModelInfo> {
        self.models.values().map(|entry| entry.served.info().clone()).collect()
    }

    /// The uploaded files that models are loaded from.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = BlobDigest> {
        let files = self.models.values().flat_map(|entry| &entry.served.spec.files);
        files.filter_map(|file| blob_of(file))
    }

    /// The weights of a model, if they are in memory.
    pub(crate) fn weights(&self, model: &ModelName) -> Option<&Arc<LoadedModel>> {
        self.models.get(model)?.weights.as_ref()
    }

    /// Keeps the weights of a model that was loaded again.
    pub(crate) fn keep(&mut self, model: LoadedModel) {
        if let Some(entry) = self.models.get_mut(&model.name) {
            entry.weights = Some(Arc::new(model));
        }
    }

    /// Takes the weights of a model out.
    pub(crate) fn take(&mut self, model: &ModelName) -> Option<Arc<LoadedModel>> {
        self.models.get_mut(model)?.weights.take()
    }
}

impl ServedModel {
    /// What people call it.
    pub(crate) const fn name(&self) -> &ModelName {
        &self.info.name
    }

    const fn digest(&self) -> ModelDigest {
        self.info.digest
    }

    const fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Loads it once more. Takes as long as the first time, so not for the event loop.
    ///
    /// # Errors
    /// When the files cannot be read, or are not those that were registered.
    pub(crate) fn reload(&self, device: &Device) -> Result<LoadedModel, ReloadError> {
        let name = || self.name().clone();
        let model = load(&self.spec, self.info.weights_dtype, device)
            .map_err(|error| ReloadError::Load { name: name(), source: Box::new(error) })?;
        let (registered, found) = (self.digest(), model.digest);
        if found != registered {
            return Err(ReloadError::Changed { name: name(), registered, found });
        }
        Ok(model)
    }
}

impl WireError for RegisterError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Taken { .. } => ErrorCode::InvalidRequest,
            Self::Full { .. } | Self::OverBudget(_) => ErrorCode::TooLarge,
        }
    }
}

impl WireError for UnknownModel {
    fn code(&self) -> ErrorCode {
        ErrorCode::UnknownModel
    }
}

impl WireError for ReloadError {
    /// `unknown_model` where the files are gone or others: the model is gone. Whoever asks for an
    /// encode did not choose them, so nothing here is an invalid request.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Load { source, .. } if matches!(**source, LoadError::Device { .. }) => {
                ErrorCode::Internal
            }
            Self::Load { .. } | Self::Changed { .. } => ErrorCode::UnknownModel,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use fixtures::{Naming, Size, write_encoder};
    use protocol::{Component, Dtype, Family};

    use super::*;

    #[test]
    fn a_name_stands_for_one_model_and_the_newest_files_of_it() {
        let mut catalogue = Catalogue::default();
        assert_eq!(serve(&mut catalogue, model("a", b"1", "/m/1")), Ok(()));
        assert_eq!(serve(&mut catalogue, model("a", b"1", "/m/copy")), Ok(()));
        assert_eq!(serve(&mut catalogue, model("b", b"1", "/m/1")), Ok(()));

        let taken = serve(&mut catalogue, model("a", b"2", "/m/2")).unwrap_err();
        let [one, two] = [b"1", b"2"].map(|weights| ModelDigest::of(weights));
        let expected = format!(
            "invalid_request: model `a` is served already with digest {one}, these files have \
             {two}: give them another name"
        );
        assert_eq!(taken.to_failure().to_string(), expected);

        let served: Vec<_> =
            catalogue.models.values().map(|it| it.served.spec.to_string()).collect();
        assert_eq!(served, ["a=sd15:/m/copy", "b=sd15:/m/1"]);
    }

    #[test]
    fn a_worker_serves_a_limited_number_of_models() {
        let mut catalogue = Catalogue::default();
        for index in 0..MODELS_MAX {
            serve(&mut catalogue, model(&format!("m{index}"), b"1", "/m/1")).unwrap();
        }
        let full = serve(&mut catalogue, model("more", b"1", "/m/1")).unwrap_err();
        assert_eq!(full.code(), ErrorCode::TooLarge);
        assert_eq!(serve(&mut catalogue, model("m7", b"1", "/m/1")), Ok(()));
        assert_eq!(catalogue.models.len(), MODELS_MAX);
    }

    #[test]
    fn a_model_is_found_by_name_and_by_the_digest_that_goes_with_it() {
        let mut catalogue = Catalogue::default();
        let (name, digest) = (model_name("a"), ModelDigest::of(b"1"));
        let failure = catalogue.find(&name, None).unwrap_err().to_failure();
        assert_eq!(failure.to_string(), "unknown_model: no model `a` here: this worker has none");

        serve(&mut catalogue, model("a", b"1", "/m/1")).unwrap();
        serve(&mut catalogue, model("b", b"2", "/m/2")).unwrap();
        for asked in [None, Some(digest)] {
            assert_eq!(catalogue.find(&name, asked).unwrap().digest(), digest);
        }
        let other = ModelDigest::of(b"2");
        let failure = catalogue.find(&name, Some(other)).unwrap_err().to_failure();
        let expected = format!("unknown_model: model `a` has digest {digest}, not {other}");
        assert_eq!(failure.to_string(), expected);
        let error = catalogue.find(&model_name("c"), None).unwrap_err();
        assert_eq!(error.to_string(), "no model `c` here: this worker has `a`, `b`");
    }

    #[test]
    fn a_model_is_loaded_again_only_as_the_same_weights() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("clip.safetensors");
        let write = |component| {
            write_encoder(&file, Size::Tiny, component, Dtype::Float32, Naming::Hf).unwrap();
        };
        write(Component::ClipL);
        let spec = spec("a", file.clone());
        let loaded = load(&spec, Dtype::Float16, &Device::Cpu).unwrap();
        let model = ServedModel { spec, info: loaded.info() };
        assert_eq!(model.reload(&Device::Cpu).unwrap().digest, loaded.digest);

        write(Component::ClipG);
        let changed = model.reload(&Device::Cpu).unwrap_err();
        assert!(matches!(&changed, ReloadError::Changed { found, .. } if *found != loaded.digest));
        assert_eq!(changed.code(), ErrorCode::UnknownModel);
        assert!(changed.to_string().contains(&loaded.digest.to_string()), "{changed}");

        fs::write(&file, b"no model").unwrap();
        let ruined = model.reload(&Device::Cpu).unwrap_err();
        assert_eq!(ruined.code(), ErrorCode::UnknownModel, "{ruined}");
        fs::remove_file(&file).unwrap();
        let gone = model.reload(&Device::Cpu).unwrap_err();
        assert_eq!(gone.code(), ErrorCode::UnknownModel);
        assert!(gone.to_failure().message.contains("No such file"), "{gone}");
    }

    /// Registers a model that is not loaded.
    fn serve(catalogue: &mut Catalogue, model: ServedModel) -> Result<(), RegisterError> {
        catalogue.check(&model)?;
        catalogue.insert(model, None);
        Ok(())
    }

    fn model(name: &str, weights: &[u8], file: &str) -> ServedModel {
        let spec = spec(name, file.into());
        let info = ModelInfo {
            name: spec.name.clone(),
            digest: ModelDigest::of(weights),
            family: spec.family,
            weights_dtype: Dtype::Float16,
            bytes: 1,
            chunk_tokens: BTreeMap::from([(Component::ClipL, 77)]),
        };
        ServedModel { spec, info }
    }

    fn spec(name: &str, file: PathBuf) -> ModelSpec {
        ModelSpec::new(model_name(name), Family::Sd15, vec![file]).unwrap()
    }

    fn model_name(name: &str) -> ModelName {
        name.parse().unwrap()
    }
}
