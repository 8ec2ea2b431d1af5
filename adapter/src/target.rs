//! The parameters of a text encoder that a patch can change, under their one internal name.

use std::{fmt, str::FromStr};

use protocol::Component;

use crate::error::clip;

/// Layers that a parameter name may count, 0 to 31; a model has fewer or as many.
pub const LAYERS_MAX: usize = 32;

/// The linear layers of one transformer layer.
pub(crate) const LINEARS: [&str; 6] = [
    "mlp.fc1",
    "mlp.fc2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
];

const NORMS: [&str; 2] = ["layer_norm1", "layer_norm2"];
const LAYER_PREFIX: &str = "text_model.encoder.layers.";

/// One parameter of one component.
///
/// Displayed as, and parsed from, ComfyUI's internal name:
/// `clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    component: Component,
    parameter: String,
}

/// A name that no parameter of a known model has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` is not a parameter of a text encoder: expected for example `clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight`"
)]
pub struct InvalidTarget {
    /// The name, cut to a length fit for a message.
    pub name: String,
}

impl Target {
    /// The `parameter` of `component`, named as in a standalone file of that component in
    /// Hugging Face's layout: `text_model.encoder.layers.0.mlp.fc1.weight`.
    ///
    /// # Errors
    ///
    /// No CLIP text model has a parameter of that name.
    pub fn new(component: Component, parameter: &str) -> Result<Self, InvalidTarget> {
        if is_parameter(parameter) {
            return Ok(Self { component, parameter: parameter.to_owned() });
        }
        Err(InvalidTarget { name: clip(&format!("{component}.transformer.{parameter}")) })
    }

    /// The weight of linear layer `linear` (one of [`LINEARS`]) in transformer layer `layer`.
    pub(crate) fn linear(component: Component, layer: usize, linear: &str) -> Self {
        Self { component, parameter: format!("{LAYER_PREFIX}{layer}.{linear}.weight") }
    }

    /// The text encoder.
    pub fn component(&self) -> Component {
        self.component
    }

    /// The parameter's name in a standalone file: what follows `clip_l.transformer.`.
    pub fn parameter(&self) -> &str {
        &self.parameter
    }

    /// The bias of the same module, if there is one.
    pub fn bias(&self) -> Option<Self> {
        let module = self.parameter.strip_suffix(".weight")?;
        Self::new(self.component, &format!("{module}.bias")).ok()
    }

    /// Whether this is a weight, not a bias.
    pub fn is_weight(&self) -> bool {
        self.parameter.ends_with(".weight")
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.transformer.{}", self.component, self.parameter)
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(name: &str) -> Result<Self, InvalidTarget> {
        [Component::ClipL, Component::ClipG]
            .into_iter()
            .find_map(|component| {
                let parameter =
                    name.strip_prefix(component.as_str())?.strip_prefix(".transformer.")?;
                Self::new(component, parameter).ok()
            })
            .ok_or_else(|| InvalidTarget { name: clip(name) })
    }
}

/// Parses a layer number as it is printed: no sign, no leading zero.
pub(crate) fn layer_number(text: &str) -> Option<usize> {
    let number = text.parse::<usize>().ok().filter(|number| *number < LAYERS_MAX)?;
    (number.to_string() == text).then_some(number)
}

fn is_parameter(name: &str) -> bool {
    let Some((module, "weight" | "bias")) = name.rsplit_once('.') else { return false };
    match module {
        "text_model.final_layer_norm" => true,
        // These three have no bias.
        "text_model.embeddings.token_embedding"
        | "text_model.embeddings.position_embedding"
        | "text_projection" => name.ends_with(".weight"),
        _ => module.strip_prefix(LAYER_PREFIX).and_then(|rest| rest.split_once('.')).is_some_and(
            |(layer, inner)| {
                layer_number(layer).is_some()
                    && (LINEARS.contains(&inner) || NORMS.contains(&inner))
            },
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_reads_back_from_its_name() {
        for name in [
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "clip_g.transformer.text_model.encoder.layers.31.self_attn.out_proj.bias",
            "clip_g.transformer.text_model.encoder.layers.7.layer_norm2.weight",
            "clip_l.transformer.text_model.final_layer_norm.bias",
            "clip_l.transformer.text_model.embeddings.token_embedding.weight",
            "clip_g.transformer.text_projection.weight",
        ] {
            assert_eq!(name.parse::<Target>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn a_weight_names_its_bias_where_there_is_one() {
        let bias = |name: &str| name.parse::<Target>().unwrap().bias().map(|bias| bias.to_string());
        let norm = "clip_g.transformer.text_model.final_layer_norm";
        assert_eq!(bias(&format!("{norm}.weight")), Some(format!("{norm}.bias")));
        assert_eq!(bias(&format!("{norm}.bias")), None);
        assert_eq!(bias("clip_g.transformer.text_projection.weight"), None);
    }

    #[test]
    fn a_name_that_no_model_has_is_refused() {
        for name in [
            "",
            "clip_l",
            "clip_l.logit_scale",
            "clip_x.transformer.text_projection.weight",
            "clip_l.transformer.text_projection.bias",
            "clip_l.transformer.text_projection",
            "clip_l.transformer.text_model.encoder.layers.32.mlp.fc1.weight",
            "clip_l.transformer.text_model.encoder.layers.07.mlp.fc1.weight",
            "clip_l.transformer.text_model.encoder.layers.+7.mlp.fc1.weight",
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc3.weight",
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            "clip_l.transformer.text_model.encoder.layers.0.weight",
        ] {
            assert!(name.parse::<Target>().is_err(), "`{name}` was accepted");
        }
    }
}
