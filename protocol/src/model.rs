//! What a model is made of: families, their components, and element types.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// One text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// OpenAI's CLIP ViT-L/14 text encoder: 768 wide, 12 layers, quick-GELU.
    ClipL,
    /// OpenCLIP's ViT-bigG/14 text encoder: 1280 wide, 32 layers, GELU, with a projection.
    ClipG,
}

impl Component {
    /// The name on the wire, in parameter names and in textual-inversion files.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ClipL => "clip_l",
            Self::ClipG => "clip_g",
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which components a model has and how their outputs are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Stable Diffusion 1.x: CLIP-L alone.
    Sd15,
    /// Stable Diffusion XL: CLIP-L and bigG, joined on the feature axis, L first.
    Sdxl,
}

impl Family {
    /// The components of this family, in the order in which their features are joined.
    pub const fn components(self) -> &'static [Component] {
        match self {
            Self::Sd15 => &[Component::ClipL],
            Self::Sdxl => &[Component::ClipL, Component::ClipG],
        }
    }

    /// The name on the wire and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sd15 => "sd15",
            Self::Sdxl => "sdxl",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A family that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown model family `{0}`: expected `sd15` or `sdxl`")]
pub struct UnknownFamily(String);

impl FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(text: &str) -> Result<Self, UnknownFamily> {
        [Self::Sd15, Self::Sdxl]
            .into_iter()
            .find(|family| family.as_str() == text)
            .ok_or_else(|| UnknownFamily(text.to_owned()))
    }
}

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// IEEE 754 binary32.
    Float32,
    /// IEEE 754 binary16.
    Float16,
    /// The upper half of a binary32.
    Bfloat16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
        }
    }

    /// The name on the wire and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An element type that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{0}`: expected `float32`, `float16` or `bfloat16`")]
pub struct UnknownDtype(String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(text: &str) -> Result<Self, UnknownDtype> {
        [Self::Float32, Self::Float16, Self::Bfloat16]
            .into_iter()
            .find(|dtype| dtype.as_str() == text)
            .ok_or_else(|| UnknownDtype(text.to_owned()))
    }
}
