//! Options resolved: which hidden state and which pooled output each component gives.
//!
//! A ComfyUI client sends resolved layers, which win; plain clients send `clip_skip` or nothing,
//! and get what ComfyUI 0.3.64 would give, odd corners included. Both end in a [`Plan`].

use std::collections::BTreeMap;

use protocol::{
    Component, Family, Layer,
    request::{EncodeOptions, LayerChoice},
};

use crate::model::{Hidden, LoadedModel, TextConfig};

/// What to compute for every component that takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// By component, in the order in which features are joined.
    pub components: BTreeMap<Component, ComponentPlan>,
    /// Whether prompt weights are applied.
    pub weighted: bool,
}

/// What to compute for one component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComponentPlan {
    /// The hidden state.
    pub hidden: Hidden,
    /// The pooled output.
    pub pooled: Pooled,
}

/// What becomes of a component's pooled output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooled {
    /// Nobody uses it.
    Unused,
    /// The last layer's state after the final layer norm.
    Plain,
    /// That state times the text projection.
    Projected,
}

/// Options that a model cannot honour.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOptions {
    /// A layer is named for a component that the model does not have.
    #[error("option `layers` names `{component}`, which model family `{family}` does not have")]
    Component {
        /// The component.
        component: Component,
        /// The model's family.
        family: Family,
    },
    /// A layer that the encoder does not have.
    #[error("`{component}` has no layer {layer}: expected -{layers} to {}", layers.saturating_sub(1))]
    Layer {
        /// The component.
        component: Component,
        /// The layer asked for.
        layer: i32,
        /// Layers of the encoder.
        layers: usize,
    },
}

/// Resolves `options` for the components `taking_part`, all of which `model` has.
///
/// # Errors
/// When a layer does not exist.
pub fn plan(
    options: &EncodeOptions,
    model: &LoadedModel,
    taking_part: &[Component],
) -> Result<Plan, InvalidOptions> {
    let family = model.family;
    let absent = options.layers.keys().find(|component| !model.components.contains_key(component));
    if let Some(&component) = absent {
        return Err(InvalidOptions::Component { component, family });
    }
    let mut components = BTreeMap::new();
    for (component, encoder) in &model.components {
        if !taking_part.contains(component) {
            continue;
        }
        let hidden = hidden(options, family, *component, encoder.config())?;
        let gives_pooled = taking_part.iter().max() == Some(component);
        let pooled = match (gives_pooled, component) {
            (false, _) => Pooled::Unused,
            (true, Component::ClipG) if options.projected => Pooled::Projected,
            (true, _) => Pooled::Plain,
        };
        components.insert(*component, ComponentPlan { hidden, pooled });
    }
    Ok(Plan { components, weighted: options.weighted })
}

/// The hidden state of one component.
fn hidden(
    options: &EncodeOptions,
    family: Family,
    component: Component,
    config: &TextConfig,
) -> Result<Hidden, InvalidOptions> {
    let choice = match (options.layers.get(&component), options.clip_skip) {
        (Some(choice), _) => *choice,
        (None, Some(skip)) if skip.unsigned_abs() as usize <= config.layers => {
            LayerChoice { layer: Layer::Hidden(skip), final_norm: has_final_norm(family) }
        }
        // ComfyUI 0.3.64 takes the last layer for a skip beyond the first, but asking for the
        // unprojected pooled output afterwards puts the default layer back.
        (None, Some(_)) if options.projected => {
            LayerChoice { layer: Layer::Last, final_norm: false }
        }
        (None, _) => default_choice(family),
    };
    let Layer::Hidden(layer) = choice.layer else { return Ok(Hidden::Last) };
    let beyond = InvalidOptions::Layer { component, layer, layers: config.layers };
    let distance = layer.unsigned_abs() as usize;
    let index = if layer < 0 { config.layers.checked_sub(distance) } else { Some(distance) };
    let index = index.filter(|index| *index < config.layers).ok_or(beyond)?;
    Ok(Hidden::Layer { index, final_norm: choice.final_norm })
}

/// SD 1.5 takes the last layer; SDXL the one before it, as it is.
fn default_choice(family: Family) -> LayerChoice {
    let layer = match family {
        Family::Sd15 => Layer::Last,
        Family::Sdxl => Layer::Hidden(-2),
    };
    LayerChoice { layer, final_norm: has_final_norm(family) }
}

/// Whether the final layer norm is applied to a layer that `clip_skip` chose.
fn has_final_norm(family: Family) -> bool {
    family == Family::Sd15
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Activation;

    #[test]
    fn defaults_are_those_of_the_family() {
        assert_eq!(resolve(Family::Sd15, &EncodeOptions::default(), 12), Ok(Hidden::Last));
        let before_last = Hidden::Layer { index: 10, final_norm: false };
        assert_eq!(resolve(Family::Sdxl, &EncodeOptions::default(), 12), Ok(before_last));
    }

    #[test]
    fn a_skip_counts_from_the_end_and_keeps_the_familys_norm() {
        for (family, skip, expected) in [
            (Family::Sd15, -1, Hidden::Layer { index: 11, final_norm: true }),
            (Family::Sd15, -12, Hidden::Layer { index: 0, final_norm: true }),
            (Family::Sd15, 3, Hidden::Layer { index: 3, final_norm: true }),
            (Family::Sdxl, -1, Hidden::Layer { index: 11, final_norm: false }),
            (Family::Sdxl, -13, Hidden::Last),
            (Family::Sd15, -13, Hidden::Last),
            (Family::Sd15, 13, Hidden::Last),
        ] {
            assert_eq!(resolve(family, &skipping(skip), 12), Ok(expected), "{family} {skip}");
        }
        let error = resolve(Family::Sd15, &skipping(12), 12).unwrap_err();
        assert_eq!(error.to_string(), "`clip_l` has no layer 12: expected -12 to 11");
    }

    #[test]
    fn an_unprojected_pooled_output_puts_the_default_layer_in_place_of_a_skip_out_of_range() {
        let unprojected = EncodeOptions { projected: false, ..skipping(-24) };
        let before_last = Hidden::Layer { index: 10, final_norm: false };
        assert_eq!(resolve(Family::Sdxl, &unprojected, 12), Ok(before_last));
        assert_eq!(resolve(Family::Sd15, &unprojected, 12), Ok(Hidden::Last));
        let in_range = EncodeOptions { projected: false, ..skipping(-3) };
        let third = Hidden::Layer { index: 9, final_norm: false };
        assert_eq!(resolve(Family::Sdxl, &in_range, 12), Ok(third));
    }

    #[test]
    fn a_resolved_layer_wins_over_a_skip() {
        let choice = LayerChoice { layer: Layer::Hidden(-4), final_norm: true };
        let layers = BTreeMap::from([(Component::ClipL, choice)]);
        let options = EncodeOptions { layers, ..skipping(-2) };
        let fourth = Hidden::Layer { index: 8, final_norm: true };
        assert_eq!(resolve(Family::Sdxl, &options, 12), Ok(fourth));
        assert!(resolve(Family::Sdxl, &options, 3).is_err(), "layer -4 of 3 was accepted");
    }

    fn resolve(
        family: Family,
        options: &EncodeOptions,
        layers: usize,
    ) -> Result<Hidden, InvalidOptions> {
        let config = TextConfig {
            hidden: 4,
            layers,
            intermediate: 8,
            heads: 2,
            activation: Activation::Gelu,
            vocab: 49408,
            positions: 77,
            projection: None,
        };
        hidden(options, family, Component::ClipL, &config)
    }

    fn skipping(skip: i32) -> EncodeOptions {
        EncodeOptions { clip_skip: Some(skip), ..EncodeOptions::default() }
    }
}
