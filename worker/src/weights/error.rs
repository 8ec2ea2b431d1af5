//! Why a model was not loaded.

use std::path::PathBuf;

use protocol::{Component, Family};

use crate::model::ModelSpec;

/// Why a model was not loaded. Every message names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be opened or mapped.
    #[error("cannot open `{file}`")]
    Open {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The header announces more bytes than a checkpoint's header can have.
    #[error("`{file}` announces a header of {found} bytes: at most {most} are accepted")]
    HeaderSize {
        /// The file.
        file: PathBuf,
        /// Bytes announced.
        found: u64,
        /// Bytes accepted.
        most: u64,
    },
    /// The file is not safetensors.
    #[error("`{file}` is not a safetensors file: convert it, or download it again if it was cut")]
    Header {
        /// The file.
        file: PathBuf,
        /// What the parser says.
        source: safetensors::SafeTensorError,
    },
    /// No text encoder that we know is in the file.
    #[error(
        "`{file}` holds no CLIP text encoder: expected `text_model.…`, `transformer.resblocks.…`, \
         an SD 1.x or an SDXL checkpoint"
    )]
    NoEncoder {
        /// The file.
        file: PathBuf,
    },
    /// The file holds a component that the family does not have.
    #[error("`{file}` holds `{component}`, which family `{family}` does not have")]
    Foreign {
        /// The file.
        file: PathBuf,
        /// What it holds.
        component: Component,
        /// The family asked for.
        family: Family,
    },
    /// Two files hold the same component.
    #[error("both `{other}` and `{file}` hold `{component}`: name one of them")]
    Twice {
        /// The component.
        component: Component,
        /// The second file.
        file: PathBuf,
        /// The first file.
        other: PathBuf,
    },
    /// Every component of the family is found, and there is one encoder more.
    #[error("`{file}` is one encoder too many for family `{family}`")]
    Surplus {
        /// The file.
        file: PathBuf,
        /// The family.
        family: Family,
    },
    /// No file holds the component.
    #[error("model `{}` has no `{component}`: add a file that holds it", spec.name)]
    MissingComponent {
        /// The model.
        spec: ModelSpec,
        /// What is missing.
        component: Component,
    },
    /// A tensor of the encoder is not in the file.
    #[error("`{file}` has no tensor `{tensor}`")]
    MissingTensor {
        /// The file.
        file: PathBuf,
        /// The name as this file would spell it.
        tensor: String,
    },
    /// A tensor has another shape than the encoder's sizes imply.
    #[error("tensor `{tensor}` of `{file}` has shape {found:?}: expected {expected:?}")]
    Shape {
        /// The file.
        file: PathBuf,
        /// The name in the file.
        tensor: String,
        /// The shape that fits.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor that must be a matrix is none.
    #[error("tensor `{tensor}` of `{file}` has shape {found:?}: expected two dimensions")]
    NotMatrix {
        /// The file.
        file: PathBuf,
        /// The name in the file.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that cannot be read.
    #[error("tensor `{tensor}` of `{file}` is {found}: expected F32, F16 or BF16")]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The name in the file.
        tensor: String,
        /// Its element type.
        found: safetensors::Dtype,
    },
    /// More layers than any text encoder has.
    #[error("`{file}` has layer {found}: at most {most} layers are accepted")]
    Layers {
        /// The file.
        file: PathBuf,
        /// The highest index found.
        found: usize,
        /// Layers accepted.
        most: usize,
    },
    /// More positions than any text encoder has.
    #[error("tensor `{tensor}` of `{file}` has {found} positions: at most {most} are accepted")]
    Positions {
        /// The file.
        file: PathBuf,
        /// The name in the file.
        tensor: String,
        /// Rows of the table.
        found: usize,
        /// Rows accepted.
        most: usize,
    },
    /// Neither the width nor a configuration says how many heads there are.
    #[error(
        "`{file}` does not say how many attention heads its {hidden} wide `{component}` has: put a \
         `config.json` with `num_attention_heads` and `hidden_act` beside it"
    )]
    UnknownWidth {
        /// The file.
        file: PathBuf,
        /// The component.
        component: Component,
        /// Its width.
        hidden: usize,
    },
    /// A configuration beside the file cannot be read.
    #[error("cannot read `{config}`")]
    ConfigUnreadable {
        /// The configuration.
        config: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A configuration beside the file cannot be used.
    #[error("`{config}`: {reason}")]
    Config {
        /// The configuration.
        config: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The device failed, for example for want of memory.
    #[error("cannot place `{component}` of `{file}` on the device")]
    Device {
        /// The file.
        file: PathBuf,
        /// The component.
        component: Component,
        /// What the device says.
        source: candle_core::Error,
    },
}
