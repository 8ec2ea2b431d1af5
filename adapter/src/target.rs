//! The parameters of a text encoder that a patch can change, under their one internal name.

use std::{fmt, str::FromStr};

use protocol::Component;

use crate::{
    error::clip,
    slice::{Slice, number},
};

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

/// One parameter of one component, or a [`Slice`] of it.
///
/// Displayed as, and parsed from, ComfyUI's internal name and the slice, if there is one:
/// `clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight`, `….weight[0:768:768]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    component: Component,
    parameter: String,
    slice: Option<Slice>,
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
    /// The whole `parameter` of `component`, named as in a standalone file of that component in
    /// Hugging Face's layout: `text_model.encoder.layers.0.mlp.fc1.weight`.
    ///
    /// # Errors
    ///
    /// No CLIP text model has a parameter of that name.
    pub fn new(component: Component, parameter: &str) -> Result<Self, InvalidTarget> {
        if is_parameter(parameter) {
            return Ok(Self { component, parameter: parameter.to_owned(), slice: None });
        }
        Err(InvalidTarget { name: clip(&format!("{component}.transformer.{parameter}")) })
    }

    /// The weight of linear layer `linear` (one of [`LINEARS`]) in transformer layer `layer`.
    pub(crate) fn linear(component: Component, layer: usize, linear: &str) -> Self {
        let parameter = format!("{LAYER_PREFIX}{layer}.{linear}.weight");
        Self { component, parameter, slice: None }
    }

    /// This `slice` of the parameter, in place of the slice that there may be already.
    ///
    /// Whether the parameter reaches that far is for the worker that holds it.
    #[must_use]
    pub fn with_slice(self, slice: Slice) -> Self {
        Self { slice: Some(slice), ..self }
    }

    /// The whole parameter.
    #[must_use]
    pub fn whole(&self) -> Self {
        Self { slice: None, ..self.clone() }
    }

    /// The text encoder.
    pub fn component(&self) -> Component {
        self.component
    }

    /// The parameter's name in a standalone file: what follows `clip_l.transformer.`.
    pub fn parameter(&self) -> &str {
        &self.parameter
    }

    /// What of the parameter is patched; nothing if it is the whole.
    pub fn slice(&self) -> Option<Slice> {
        self.slice
    }

    /// Whether both are of one parameter and an element of it can be in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let is_same = self.component == other.component && self.parameter == other.parameter;
        is_same
            && match (&self.slice, &other.slice) {
                (Some(one), Some(other)) => one.overlaps(other),
                _ => true,
            }
    }

    /// The whole bias of the same module, if there is one.
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
        write!(f, "{}.transformer.{}", self.component, self.parameter)?;
        self.slice.map_or(Ok(()), |slice| slice.fmt(f))
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(name: &str) -> Result<Self, InvalidTarget> {
        let (whole, slice) = name.split_at(name.find('[').unwrap_or(name.len()));
        let target = [Component::ClipL, Component::ClipG].into_iter().find_map(|component| {
            let parameter =
                whole.strip_prefix(component.as_str())?.strip_prefix(".transformer.")?;
            Self::new(component, parameter).ok()
        });
        let sliced = |target: Self| match slice {
            "" => Some(target),
            slice => Some(target.with_slice(slice.parse().ok()?)),
        };
        target.and_then(sliced).ok_or_else(|| InvalidTarget { name: clip(name) })
    }
}

/// Parses a layer number as it is printed: no sign, no leading zero.
pub(crate) fn layer_number(text: &str) -> Option<usize> {
    number(text).filter(|number| *number < LAYERS_MAX)
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
            "clip_g.transformer.text_projection.weight[0:640:640]",
            "clip_l.transformer.text_model.final_layer_norm.bias[0:0:1]",
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
        assert_eq!(bias(&format!("{norm}.weight[0:0:1]")), Some(format!("{norm}.bias")));
        assert_eq!(bias("clip_g.transformer.text_projection.weight"), None);
    }

    #[test]
    fn a_slice_is_put_on_and_taken_off() {
        let name = "clip_g.transformer.text_projection.weight";
        let whole: Target = name.parse().unwrap();
        let slice = Slice::new(1, 2, 3).unwrap();
        let sliced = whole.clone().with_slice(slice);
        assert_eq!((whole.slice(), sliced.slice()), (None, Some(slice)));
        assert_eq!(sliced.to_string(), format!("{name}[1:2:3]"));
        assert_eq!((sliced.whole(), sliced.parameter()), (whole, "text_projection.weight"));
    }

    #[test]
    fn targets_overlap_on_one_parameter_only() {
        let overlap = |one: &str, other: &str| {
            let name = |end: &str| format!("clip_l.transformer.text_model.final_layer_norm.{end}");
            let [one, other] = [one, other].map(|end| name(end).parse::<Target>().unwrap());
            one.overlaps(&other)
        };
        assert!(overlap("weight", "weight") && overlap("weight", "weight[0:7:1]"));
        assert!(overlap("weight[0:0:2]", "weight[0:1:2]"));
        assert!(!overlap("weight[0:0:2]", "weight[0:2:2]"));
        assert!(!overlap("weight", "bias") && !overlap("weight[0:0:2]", "bias[0:0:2]"));
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
            "clip_l.transformer.text_projection.weight[]",
            "clip_l.transformer.text_projection.weight[0:0:0]",
            "clip_l.transformer.text_projection.weight[0:00:1]",
            "clip_l.transformer.text_projection.weight[0:0:1][0:0:1]",
            "clip_l.transformer.text_projection.weight [0:0:1]",
            "clip_l.transformer.text_projection[0:0:1].weight",
        ] {
            assert!(name.parse::<Target>().is_err(), "`{name}` was accepted");
        }
    }
}
