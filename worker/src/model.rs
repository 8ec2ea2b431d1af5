//! Our CLIP text model: its sizes, its parameters and the forward pass.
//!
//! The forward pass is written once, against [`Parameters`]: how a weight is looked up and how a
//! linear layer is applied. Execution modes are implementations of that trait; the weights are
//! behind a lock, as one mode puts others in their place for a while. Nothing here knows
//! files (see [`crate::weights`]), prompts or weights of prompts (see [`crate::conditioning`]).

mod activation;
pub mod attachment;
mod attention;
pub mod config;
pub mod held;
pub mod loaded;
pub mod parameter;
pub mod parameters;
pub mod spec;
pub mod text;

pub use attachment::Attachment;
pub use config::{Activation, TextConfig};
pub use held::Held;
pub use loaded::{LoadedModel, Readings};
pub use parameter::{LayerModule, Module, Parameter, Role};
pub use parameters::Parameters;
pub use spec::{InvalidSpec, ModelSpec};
pub use text::{Batch, Hidden, Output, TextModel, VectorRow};
