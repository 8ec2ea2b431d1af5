//! Where the files that people have keep a text encoder's parameters.
//!
//! Three spellings: Hugging Face's, the same without `text_model.` (transformers 5), and
//! OpenCLIP's with its fused `in_proj` and its transposed `text_projection`; each under the prefix
//! of a checkpoint or under none.

use protocol::Component;

use super::file::TensorFile;
use crate::model::{LayerModule, Module, Parameter, Role};

/// Layers that only bigG has, as ComfyUI tells encoders apart.
const BIG_G_LAYERS_MIN: usize = 31;

/// Prefixes of encoders inside checkpoints. SD 1.x; SDXL base; SDXL refiner; single-file models
/// that keep their encoders apart.
const CHECKPOINT_PREFIXES: [(&str, Component); 6] = [
    ("cond_stage_model.transformer.", Component::ClipL),
    ("conditioner.embedders.0.transformer.", Component::ClipL),
    ("conditioner.embedders.1.model.", Component::ClipG),
    ("conditioner.embedders.0.model.", Component::ClipG),
    ("text_encoders.clip_l.transformer.", Component::ClipL),
    ("text_encoders.clip_g.transformer.", Component::ClipG),
];

/// An encoder in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// How its parameters are spelled.
    pub(super) naming: Naming,
    /// Which component it is, where the file tells for certain.
    pub(super) component: Option<Component>,
}

impl Found {
    /// Whether it looks like bigG for lack of better evidence: people have bigG under OpenCLIP's
    /// names, and CLIP-L hardly ever.
    pub(super) fn is_open_clip(&self) -> bool {
        self.naming.spelling == Spelling::OpenClip
    }
}

/// How a file spells the parameters of one encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Naming {
    prefix: String,
    spelling: Spelling,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    HuggingFace,
    HuggingFaceBare,
    OpenClip,
}

/// Where a parameter is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// The tensor's name in the file.
    pub(super) tensor: String,
    /// Which part of it the parameter is.
    pub(super) part: Part,
}

/// Which part of a tensor a parameter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// One of three equal parts of the outermost dimension.
    Third(usize),
    /// All of it, stored input by output.
    Transposed,
}

/// The encoders in `file`.
pub(super) fn find_encoders(file: &TensorFile) -> Vec<Found> {
    let in_checkpoint: Vec<Found> = CHECKPOINT_PREFIXES
        .into_iter()
        .filter_map(|(prefix, component)| {
            let naming = Naming::detect(file, prefix)?;
            Some(Found { naming, component: Some(component) })
        })
        .collect();
    if !in_checkpoint.is_empty() {
        return in_checkpoint;
    }
    let Some(naming) = Naming::detect(file, "") else { return Vec::new() };
    let component = naming.component(file);
    vec![Found { naming, component }]
}

impl Naming {
    fn detect(file: &TensorFile, prefix: &str) -> Option<Self> {
        let has = |stem: &str| {
            let stem = format!("{prefix}{stem}");
            file.names().any(|name| name.starts_with(&stem))
        };
        let spelling = if has("text_model.") {
            Spelling::HuggingFace
        } else if has("transformer.resblocks.") {
            Spelling::OpenClip
        } else if has("encoder.layers.") {
            Spelling::HuggingFaceBare
        } else {
            return None;
        };
        Some(Self { prefix: prefix.to_owned(), spelling })
    }

    /// Which component a stand-alone file is, where it tells: by its layers or its width.
    fn component(&self, file: &TensorFile) -> Option<Component> {
        let table = self.locate(Module::TokenEmbedding.weight(), file);
        let width = file.entry(&table.tensor).ok().and_then(|entry| entry.shape.last().copied());
        if self.layers(file) >= BIG_G_LAYERS_MIN || width == Some(1280) {
            Some(Component::ClipG)
        } else {
            (width == Some(768)).then_some(Component::ClipL)
        }
    }

    /// One more than the highest layer in the file.
    pub(super) fn layers(&self, file: &TensorFile) -> usize {
        let stem = match self.spelling {
            Spelling::HuggingFace => "text_model.encoder.layers.",
            Spelling::HuggingFaceBare => "encoder.layers.",
            Spelling::OpenClip => "transformer.resblocks.",
        };
        let stem = format!("{}{stem}", self.prefix);
        let indices = file
            .names()
            .filter_map(|name| name.strip_prefix(&stem)?.split_once('.')?.0.parse::<usize>().ok());
        indices.max().map_or(0, |highest| highest.saturating_add(1))
    }

    /// Where `parameter` is, or would be, in `file`.
    pub(super) fn locate(&self, parameter: Parameter, file: &TensorFile) -> Source {
        let prefix = &self.prefix;
        if parameter.module == Module::Projection {
            let bare = format!("{prefix}text_projection");
            if file.contains(&bare) {
                return Source { tensor: bare, part: Part::Transposed };
            }
            return Source { tensor: format!("{bare}.weight"), part: Part::Whole };
        }
        let name = parameter.to_string();
        let (name, part) = match self.spelling {
            Spelling::HuggingFace => (name, Part::Whole),
            Spelling::HuggingFaceBare => {
                (name.trim_start_matches("text_model.").to_owned(), Part::Whole)
            }
            Spelling::OpenClip => open_clip(parameter),
        };
        Source { tensor: format!("{prefix}{name}"), part }
    }
}

/// OpenCLIP's name for `parameter`, and which part of that tensor it is.
fn open_clip(parameter: Parameter) -> (String, Part) {
    let role = match parameter.role {
        Role::Weight => "weight",
        Role::Bias => "bias",
    };
    let (index, module) = match parameter.module {
        Module::TokenEmbedding => return ("token_embedding.weight".to_owned(), Part::Whole),
        Module::PositionEmbedding => return ("positional_embedding".to_owned(), Part::Whole),
        Module::FinalNorm => return (format!("ln_final.{role}"), Part::Whole),
        Module::Projection => return ("text_projection".to_owned(), Part::Transposed),
        Module::Layer(index, module) => (index, module),
    };
    let (part, in_layer) = match module {
        LayerModule::Norm1 => (Part::Whole, format!("ln_1.{role}")),
        LayerModule::Norm2 => (Part::Whole, format!("ln_2.{role}")),
        LayerModule::Query => (Part::Third(0), format!("attn.in_proj_{role}")),
        LayerModule::Key => (Part::Third(1), format!("attn.in_proj_{role}")),
        LayerModule::Value => (Part::Third(2), format!("attn.in_proj_{role}")),
        LayerModule::Out => (Part::Whole, format!("attn.out_proj.{role}")),
        LayerModule::Fc1 => (Part::Whole, format!("mlp.c_fc.{role}")),
        LayerModule::Fc2 => (Part::Whole, format!("mlp.c_proj.{role}")),
    };
    (format!("transformer.resblocks.{index}.{in_layer}"), part)
}
