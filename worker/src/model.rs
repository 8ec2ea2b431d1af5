//! Our CLIP text model: its sizes, its parameters and the forward pass.
//!
//! The forward pass is written once, against [`Parameters`]: how a weight is looked up and how a
//! linear layer is applied. Execution modes are implementations of that trait. Nothing here knows
//! files (see [`crate::weights`]), prompts or weights of prompts (see [`crate::conditioning`]).

mod activation;
mod attention;
pub mod config;
pub mod loaded;
pub mod parameter;
pub mod parameters;
pub mod spec;
pub mod text;

pub use config::{Activation, TextConfig};
pub use loaded::LoadedModel;
pub use parameter::{LayerModule, Module, Parameter, Role};
pub use parameters::Parameters;
pub use spec::{InvalidSpec, ModelSpec};
pub use text::{Batch, Hidden, Output, TextModel, VectorRow};
