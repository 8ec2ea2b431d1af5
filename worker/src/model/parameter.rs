//! Names of a text encoder's parameters, as a type.
//!
//! The text form is the name in a stand-alone Hugging Face file, for example
//! `text_model.encoder.layers.0.mlp.fc1.weight`; adapters, digests and errors use it.

use std::{fmt, str::FromStr};

/// One tensor of a text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Parameter {
    /// The module that owns it.
    pub module: Module,
    /// What it is to the module.
    pub role: Role,
}

/// What a parameter is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A matrix, or the scale of a layer norm.
    Weight,
    /// What is added after it.
    Bias,
}

/// A part of a text encoder that owns parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// One vector for every token id.
    TokenEmbedding,
    /// One vector for every position.
    PositionEmbedding,
    /// A part of the transformer layer with this index.
    Layer(usize, LayerModule),
    /// The layer norm after the last layer.
    FinalNorm,
    /// The projection of the pooled output.
    Projection,
}

/// A part of a transformer layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerModule {
    /// The layer norm before attention.
    Norm1,
    /// Attention's query projection.
    Query,
    /// Attention's key projection.
    Key,
    /// Attention's value projection.
    Value,
    /// Attention's output projection.
    Out,
    /// The layer norm before the MLP.
    Norm2,
    /// The MLP's first linear layer.
    Fc1,
    /// The MLP's second linear layer.
    Fc2,
}

impl LayerModule {
    /// Every part, in the order of the forward pass.
    pub const ALL: [Self; 8] = [
        Self::Norm1,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Out,
        Self::Norm2,
        Self::Fc1,
        Self::Fc2,
    ];

    /// The name inside a layer.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Norm1 => "layer_norm1",
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Out => "self_attn.out_proj",
            Self::Norm2 => "layer_norm2",
            Self::Fc1 => "mlp.fc1",
            Self::Fc2 => "mlp.fc2",
        }
    }
}

impl Module {
    /// This module's weight.
    pub const fn weight(self) -> Parameter {
        Parameter { module: self, role: Role::Weight }
    }

    /// This module's bias; only a name where [`Self::has_bias`] is false.
    pub const fn bias(self) -> Parameter {
        Parameter { module: self, role: Role::Bias }
    }

    /// Whether the module adds a bias: all but the embeddings and the projection do.
    pub const fn has_bias(self) -> bool {
        matches!(self, Self::Layer(..) | Self::FinalNorm)
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenEmbedding => f.write_str("text_model.embeddings.token_embedding"),
            Self::PositionEmbedding => f.write_str("text_model.embeddings.position_embedding"),
            Self::Layer(index, module) => {
                write!(f, "text_model.encoder.layers.{index}.{}", module.as_str())
            }
            Self::FinalNorm => f.write_str("text_model.final_layer_norm"),
            Self::Projection => f.write_str("text_projection"),
        }
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Weight => "weight",
            Role::Bias => "bias",
        };
        write!(f, "{}.{role}", self.module)
    }
}

/// A name that no text encoder has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a parameter of a CLIP text encoder")]
pub struct UnknownParameter(String);

impl FromStr for Parameter {
    type Err = UnknownParameter;

    fn from_str(name: &str) -> Result<Self, UnknownParameter> {
        parse(name)
            .filter(|parameter| parameter.to_string() == name)
            .ok_or_else(|| UnknownParameter(name.to_owned()))
    }
}

/// Reads a name leniently; the caller compares the result with what it read.
fn parse(name: &str) -> Option<Parameter> {
    let (module, role) = name.rsplit_once('.')?;
    let role = match role {
        "weight" => Role::Weight,
        "bias" => Role::Bias,
        _ => return None,
    };
    let module = if let Some(rest) = module.strip_prefix("text_model.encoder.layers.") {
        let (index, part) = rest.split_once('.')?;
        let part = LayerModule::ALL.into_iter().find(|module| module.as_str() == part)?;
        Module::Layer(index.parse().ok()?, part)
    } else {
        let ends = [
            Module::TokenEmbedding,
            Module::PositionEmbedding,
            Module::FinalNorm,
            Module::Projection,
        ];
        ends.into_iter().find(|end| end.to_string() == module)?
    };
    Some(Parameter { module, role })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_reads_back_from_its_name() {
        for name in [
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.11.self_attn.out_proj.bias",
            "text_model.final_layer_norm.weight",
            "text_projection.weight",
        ] {
            assert_eq!(name.parse::<Parameter>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn a_name_that_is_not_canonical_is_refused() {
        for name in [
            "",
            "weight",
            "text_model.encoder.layers.01.mlp.fc1.weight",
            "text_model.encoder.layers.+1.mlp.fc1.weight",
            "text_model.encoder.layers.1.mlp.fc3.weight",
            "text_model.encoder.layers.1.mlp.fc1.alpha",
        ] {
            assert!(name.parse::<Parameter>().is_err(), "{name:?} was accepted");
        }
    }
}
