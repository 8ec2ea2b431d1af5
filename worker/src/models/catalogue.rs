//! The models that a worker serves, in memory or not.
//!
//! A model is registered once its files were read, so its digest is known. When it is needed again
//! after it left memory, its files are read again, and only the same weights will do.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::Device;
use protocol::{ErrorCode, ModelDigest, ModelName, reply::ModelInfo};

use super::failure::WireError;
use crate::{
    model::{LoadedModel, ModelSpec},
    weights::{LoadError, load},
};

/// Models that one worker serves; each costs a heartbeat some bytes and the broker a line.
const MODELS_MAX: usize = 256;

/// All models of a worker, by name.
#[derive(Debug, Default)]
pub struct Catalogue {
    models: BTreeMap<ModelName, Arc<ServedModel>>,
}

/// A model that the worker serves: how to load it, and what it must then be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    spec: ModelSpec,
    info: ModelInfo,
}

/// What registering a model changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    /// The worker serves one model more.
    New,
    /// It served this model already; only the files to load it from may be others.
    Known,
}

/// Why a model is not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
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
}

/// No model is what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownModel {
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
#[non_exhaustive]
pub enum ReloadError {
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
    /// Serves `model` from now on. A model that is known under its name is loaded from the newer
    /// files from now on.
    ///
    /// # Errors
    /// When its name stands for another model, or there are too many models; nothing is changed.
    pub fn register(&mut self, model: ServedModel) -> Result<Registration, RegisterError> {
        let name = model.name().clone();
        match self.models.get(&name) {
            Some(known) if known.digest() != model.digest() => {
                let (registered, found) = (known.digest(), model.digest());
                return Err(RegisterError::Taken { name, registered, found });
            }
            None if self.models.len() >= MODELS_MAX => {
                return Err(RegisterError::Full { most: MODELS_MAX });
            }
            Some(_) | None => {}
        }
        let known = self.models.insert(name, Arc::new(model));
        Ok(if known.is_some() { Registration::Known } else { Registration::New })
    }

    /// The model called `name`, which must have `digest` if one is given.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(
        &self,
        name: &ModelName,
        digest: Option<ModelDigest>,
    ) -> Result<&Arc<ServedModel>, UnknownModel> {
        let Some(model) = self.models.get(name) else {
            let known = self.models.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(UnknownModel::Name { name: name.clone(), known });
        };
        match digest {
            Some(asked) if asked != model.digest() => {
                let (name, registered) = (name.clone(), model.digest());
                Err(UnknownModel::Digest { name, registered, asked })
            }
            _ => Ok(model),
        }
    }

    /// Every model, by name.
    pub fn models(&self) -> impl Iterator<Item = &Arc<ServedModel>> {
        self.models.values()
    }
}

impl ServedModel {
    /// The model that `spec` was just loaded as.
    pub fn new(spec: ModelSpec, loaded: &LoadedModel) -> Self {
        let info = ModelInfo { name: spec.name.clone(), ..loaded.info() };
        Self { spec, info }
    }

    /// What people call it.
    pub const fn name(&self) -> &ModelName {
        &self.info.name
    }

    /// What its weights are.
    pub const fn digest(&self) -> ModelDigest {
        self.info.digest
    }

    /// Where it is loaded from.
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What the farm is told about it.
    pub const fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Loads it once more. Takes as long as the first time, so not for the event loop.
    ///
    /// # Errors
    /// When the files cannot be read, or are not those that were registered.
    pub fn reload(&self, device: &Device) -> Result<LoadedModel, ReloadError> {
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
            Self::Full { .. } => ErrorCode::TooLarge,
        }
    }
}

impl WireError for UnknownModel {
    fn code(&self) -> ErrorCode {
        ErrorCode::UnknownModel
    }
}

impl WireError for ReloadError {
    /// `unknown_model` where the files are not those that were registered: the model is gone.
    /// Whoever asks for an encode did not choose them, so nothing here is an invalid request.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Changed { .. } => ErrorCode::UnknownModel,
            Self::Load { source, .. } if source.code() == ErrorCode::InvalidRequest => {
                ErrorCode::UnknownModel
            }
            Self::Load { source, .. } => source.code(),
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
        assert_eq!(catalogue.register(model("a", b"1", "/m/1")), Ok(Registration::New));
        assert_eq!(catalogue.register(model("a", b"1", "/m/copy")), Ok(Registration::Known));
        assert_eq!(catalogue.register(model("b", b"1", "/m/1")), Ok(Registration::New));

        let taken = catalogue.register(model("a", b"2", "/m/2")).unwrap_err();
        let [one, two] = [b"1", b"2"].map(|weights| ModelDigest::of(weights));
        let expected = format!(
            "invalid_request: model `a` is served already with digest {one}, these files have \
             {two}: give them another name"
        );
        assert_eq!(taken.to_failure().to_string(), expected);

        let served: Vec<_> = catalogue.models().map(|model| model.spec().to_string()).collect();
        assert_eq!(served, ["a=sd15:/m/copy", "b=sd15:/m/1"]);
    }

    #[test]
    fn a_worker_serves_a_limited_number_of_models() {
        let mut catalogue = Catalogue::default();
        for index in 0..MODELS_MAX {
            catalogue.register(model(&format!("m{index}"), b"1", "/m/1")).unwrap();
        }
        let full = catalogue.register(model("more", b"1", "/m/1")).unwrap_err();
        assert_eq!(full.code(), ErrorCode::TooLarge);
        assert_eq!(catalogue.register(model("m7", b"1", "/m/1")), Ok(Registration::Known));
        assert_eq!(catalogue.models().count(), MODELS_MAX);
    }

    #[test]
    fn a_model_is_found_by_name_and_by_the_digest_that_goes_with_it() {
        let mut catalogue = Catalogue::default();
        let (name, digest) = (model_name("a"), ModelDigest::of(b"1"));
        let failure = catalogue.find(&name, None).unwrap_err().to_failure();
        assert_eq!(failure.to_string(), "unknown_model: no model `a` here: this worker has none");

        catalogue.register(model("a", b"1", "/m/1")).unwrap();
        catalogue.register(model("b", b"2", "/m/2")).unwrap();
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
        let model = ServedModel::new(spec, &loaded);
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
        assert_eq!(gone.code(), ErrorCode::Internal);
        assert!(gone.to_failure().message.contains("No such file"), "{gone}");
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
