//! Which weight a file's key prefix names, and which of several spellings wins.
//!
//! ComfyUI's map of key names, for models that have a CLIP-L (SD 1.5, SDXL). It needs no model:
//! a name is taken for any layer from 0 to 31, and the worker says if its model has no such layer.

use protocol::Component;

use crate::{
    limits::KEY_BYTES_MAX,
    target::{LINEARS, Target, layer_number},
};

/// How a prefix spells its target. Where several prefixes of one file name the same weight, the
/// greater spelling replaces the lesser one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Spelling {
    /// `text_encoders.clip_l.transformer.…`: any weight by its internal name.
    Generic,
    /// `lora_te_…` and `lora_prior_te_…`.
    KohyaPlain,
    /// `lora_te1_…` and `lora_te2_…`.
    KohyaNumbered,
    /// `text_encoder.…` and `text_encoder_2.…`.
    Diffusers,
}

const KOHYA: [(&str, Spelling, Component); 3] = [
    ("lora_te_", Spelling::KohyaPlain, Component::ClipL),
    ("lora_te1_", Spelling::KohyaNumbered, Component::ClipL),
    ("lora_te2_", Spelling::KohyaNumbered, Component::ClipG),
];
const DIFFUSERS: [(&str, Component); 2] =
    [("text_encoder.", Component::ClipL), ("text_encoder_2.", Component::ClipG)];
const PROJECTIONS: [(&str, Spelling, Component); 3] = [
    ("lora_prior_te_text_projection", Spelling::KohyaPlain, Component::ClipG),
    ("lora_te1_text_projection", Spelling::KohyaNumbered, Component::ClipL),
    ("lora_te2_text_projection", Spelling::KohyaNumbered, Component::ClipG),
];

/// Beginnings of keys that are meant for a text encoder, known or not.
const TEXT_ENCODER_MARKS: [&str; 8] = [
    "lora_te",
    "lora_prior_te",
    "text_encoder",
    "te_",
    "te1_",
    "te2_",
    "te3_",
    "cond_stage_model.",
];
/// Parts of keys that only text encoders have, whatever a trainer wrote in front.
const TEXT_ENCODER_PARTS: [&str; 2] = ["text_model.", "text_model_"];

/// The weight that a key prefix (a key without its suffix) names.
pub(crate) fn resolve(prefix: &str) -> Option<(Target, Spelling)> {
    resolve_generic(prefix)
        .or_else(|| resolve_kohya(prefix))
        .or_else(|| resolve_diffusers(prefix))
        .or_else(|| resolve_projection(prefix))
}

/// Whether `key` is meant for a text encoder, so that it may not be ignored in silence.
pub(crate) fn names_text_encoder(key: &str) -> bool {
    TEXT_ENCODER_MARKS.iter().any(|mark| key.starts_with(mark))
        || TEXT_ENCODER_PARTS.iter().any(|part| key.contains(part))
}

/// Whether `key` may be listed as unmatched: visible ASCII that JSON writes as it is.
pub(crate) fn is_listable(key: &str) -> bool {
    (1..=KEY_BYTES_MAX).contains(&key.len())
        && key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\')
}

fn resolve_generic(prefix: &str) -> Option<(Target, Spelling)> {
    let internal = prefix.strip_prefix("text_encoders.")?;
    let target = format!("{internal}.weight").parse().ok()?;
    Some((target, Spelling::Generic))
}

fn resolve_kohya(prefix: &str) -> Option<(Target, Spelling)> {
    KOHYA.into_iter().find_map(|(start, spelling, component)| {
        let place = prefix.strip_prefix(start)?.strip_prefix("text_model_encoder_layers_")?;
        let (layer, name) = place.split_once('_')?;
        let linear = LINEARS.into_iter().find(|linear| linear.replace('.', "_") == name)?;
        Some((Target::linear(component, layer_number(layer)?, linear), spelling))
    })
}

fn resolve_diffusers(prefix: &str) -> Option<(Target, Spelling)> {
    DIFFUSERS.into_iter().find_map(|(start, component)| {
        let place = prefix.strip_prefix(start)?.strip_prefix("text_model.encoder.layers.")?;
        let (layer, name) = place.split_once('.')?;
        let linear = LINEARS.into_iter().find(|linear| *linear == name)?;
        Some((Target::linear(component, layer_number(layer)?, linear), Spelling::Diffusers))
    })
}

fn resolve_projection(prefix: &str) -> Option<(Target, Spelling)> {
    let (_, spelling, component) = PROJECTIONS.into_iter().find(|(name, ..)| *name == prefix)?;
    let target = Target::new(component, "text_projection.weight")
        .expect("every CLIP names its projection so");
    Some((target, spelling))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_names_its_weight() {
        let fc1 = "transformer.text_model.encoder.layers.11.mlp.fc1.weight";
        let out = "transformer.text_model.encoder.layers.31.self_attn.out_proj.weight";
        let cases = [
            ("lora_te_text_model_encoder_layers_11_mlp_fc1", "clip_l", fc1, Spelling::KohyaPlain),
            (
                "lora_te1_text_model_encoder_layers_11_mlp_fc1",
                "clip_l",
                fc1,
                Spelling::KohyaNumbered,
            ),
            (
                "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
                "clip_g",
                out,
                Spelling::KohyaNumbered,
            ),
            (
                "text_encoder.text_model.encoder.layers.11.mlp.fc1",
                "clip_l",
                fc1,
                Spelling::Diffusers,
            ),
            (
                "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
                "clip_g",
                out,
                Spelling::Diffusers,
            ),
            (
                "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1",
                "clip_l",
                fc1,
                Spelling::Generic,
            ),
            (
                "text_encoders.clip_g.transformer.text_model.final_layer_norm",
                "clip_g",
                "transformer.text_model.final_layer_norm.weight",
                Spelling::Generic,
            ),
            (
                "lora_te1_text_projection",
                "clip_l",
                "transformer.text_projection.weight",
                Spelling::KohyaNumbered,
            ),
            (
                "lora_te2_text_projection",
                "clip_g",
                "transformer.text_projection.weight",
                Spelling::KohyaNumbered,
            ),
            (
                "lora_prior_te_text_projection",
                "clip_g",
                "transformer.text_projection.weight",
                Spelling::KohyaPlain,
            ),
        ];
        for (prefix, component, parameter, spelling) in cases {
            let (target, found) =
                resolve(prefix).unwrap_or_else(|| panic!("`{prefix}` was not taken"));
            assert_eq!((target.to_string(), found), (format!("{component}.{parameter}"), spelling));
        }
    }

    #[test]
    fn a_prefix_that_comfyui_does_not_map_is_not_taken() {
        for prefix in [
            "lora_te_text_projection",
            "lora_te3_text_model_encoder_layers_0_mlp_fc1",
            "lora_te_text_model_encoder_layers_32_mlp_fc1",
            "lora_te_text_model_encoder_layers_0_mlp.fc1",
            "lora_te_text_model_encoder_layers_0_layer_norm1",
            "lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.layer_norm1",
            "text_encoder.text_projection",
            "text_encoder_3.text_model.encoder.layers.0.mlp.fc1",
            "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
            "text_encoders.t5xxl.transformer.shared",
            "lora_unet_mid_block",
        ] {
            assert!(resolve(prefix).is_none(), "`{prefix}` was taken");
        }
    }

    #[test]
    fn keys_of_text_encoders_are_told_from_others() {
        for key in [
            "lora_te3_x",
            "text_encoder_3.x",
            "te_x",
            "te2_x",
            "base_model.text_model.x",
            "lora_prior_te_x",
        ] {
            assert!(names_text_encoder(key), "`{key}`");
        }
        for key in [
            "lora_unet_x",
            "unet.x",
            "transformer.x",
            "diffusion_model.x",
            "temporal.x",
            "bundle_emb.x",
        ] {
            assert!(!names_text_encoder(key), "`{key}`");
        }
    }
}
