//! Every seeded file of both families is read whole: targets, kinds, values and digests.

use std::collections::BTreeMap;

use luna_adapter::{LowRank, Patch, PatchKind, PatchSet, Target, read_lora};
use protocol::{Component, Dtype};
use safetensors::SafeTensors;

use crate::files::seeded;

/// Suffixes of keys and what they become in the canonical form.
type Roles = &'static [(&'static str, &'static str)];

#[test]
fn every_file_is_read_with_all_its_targets_and_elements() {
    // name, kind of all patches, targets on clip_l, targets on clip_g, ignored keys
    let cases = [
        ("sd15/kohya", PatchKind::Lora, 24, 0, 2),
        ("sd15/kohya_f16", PatchKind::Lora, 16, 0, 0),
        ("sd15/peft", PatchKind::Lora, 16, 0, 0),
        ("sd15/diffusers", PatchKind::Lora, 20, 0, 0),
        ("sd15/mid", PatchKind::Lora, 2, 0, 0),
        ("sd15/dora", PatchKind::Lora, 16, 0, 0),
        ("sd15/loha", PatchKind::Loha, 24, 0, 0),
        ("sd15/lokr", PatchKind::Lokr, 24, 0, 0),
        ("sd15/glora", PatchKind::Glora, 6, 0, 0),
        ("sd15/oft", PatchKind::Oft, 6, 0, 0),
        ("sd15/boft", PatchKind::Boft, 2, 0, 0),
        ("sd15/diff", PatchKind::Diff, 12, 0, 0),
        ("sd15/set", PatchKind::Set, 1, 0, 0),
        ("sdxl/kohya", PatchKind::Lora, 24, 30, 2),
        ("sdxl/kohya_f16", PatchKind::Lora, 16, 20, 0),
        ("sdxl/peft", PatchKind::Lora, 16, 20, 0),
        ("sdxl/diffusers", PatchKind::Lora, 20, 25, 0),
        ("sdxl/mid", PatchKind::Lora, 2, 2, 0),
        ("sdxl/dora", PatchKind::Lora, 16, 20, 0),
        ("sdxl/loha", PatchKind::Loha, 24, 30, 0),
        ("sdxl/lokr", PatchKind::Lokr, 24, 30, 0),
        ("sdxl/glora", PatchKind::Glora, 6, 6, 0),
        ("sdxl/oft", PatchKind::Oft, 6, 6, 0),
        ("sdxl/boft", PatchKind::Boft, 2, 2, 0),
        ("sdxl/diff", PatchKind::Diff, 12, 12, 0),
        ("sdxl/set", PatchKind::Set, 1, 1, 0),
        ("sdxl/proj", PatchKind::Lora, 0, 1, 0),
        ("sdxl/sd1names", PatchKind::Lora, 4, 0, 0),
    ];
    for (name, kind, on_clip_l, on_clip_g, ignored) in cases {
        let bytes = seeded(name);
        let (set, report) =
            read_lora(bytes.as_slice()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let count = |component| {
            set.patches().keys().filter(|target| target.component() == component).count()
        };
        assert_eq!(
            [count(Component::ClipL), count(Component::ClipG)],
            [on_clip_l, on_clip_g],
            "{name}"
        );
        assert!(set.patches().values().all(|patch| patch.kind() == kind), "{name}");
        let is_dora = name.ends_with("/dora");
        let has_scale = |patch: &Patch| patch.dora_scale().is_some();
        assert!(set.patches().values().all(|patch| has_scale(patch) == is_dora), "{name}");
        assert_eq!(report.targets, set.patches().keys().cloned().collect::<Vec<_>>(), "{name}");
        assert_eq!(report.ignored_keys, ignored, "{name}");
        assert!(report.unmatched.is_empty() && report.superseded.is_empty(), "{name}");
        assert_eq!(elements(&set), elements_by_the_reference_reader(&bytes), "{name}");
    }
}

#[test]
fn seeded_values_arrive_on_their_targets() {
    let fc2 =
        low_rank("sd15/kohya", "clip_l.transformer.text_model.encoder.layers.3.mlp.fc2.weight");
    assert_eq!(
        (fc2.shape(), fc2.alpha(), fc2.scale().to_bits()),
        ([32, 128], Some(2.0), 0.5_f64.to_bits())
    );
    assert_starts(&fc2.up().to_f32(), [-0.228_827_28, 0.014_795_015, -0.149_776_3]);
    assert_starts(&fc2.down().to_f32(), [0.087_902_91, 0.057_607_688, 0.006_909_386_3]);

    let v_proj = low_rank(
        "sdxl/kohya_f16",
        "clip_g.transformer.text_model.encoder.layers.4.self_attn.v_proj.weight",
    );
    assert_eq!(
        (v_proj.up().dtype(), v_proj.alpha(), v_proj.scale().to_bits()),
        (Dtype::Float16, None, 1.0_f64.to_bits())
    );
    assert_starts(&v_proj.up().to_f32(), [0.519_042_97, -0.468_261_72, 0.392_578_12]);

    let projection = low_rank("sdxl/proj", "clip_g.transformer.text_projection.weight");
    assert_starts(&projection.down().to_f32(), [0.043_139_685, -0.066_852_6, 0.019_230_027]);

    let fc1 = low_rank("sdxl/mid", "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight");
    let mid = fc1.mid().unwrap();
    assert_eq!(mid.shape(), [4, 4]);
    assert_starts(&mid.to_f32(), [0.321_434_6, -0.254_981_73, 0.114_068_61]);

    let out = low_rank(
        "sdxl/diffusers",
        "clip_g.transformer.text_model.encoder.layers.2.self_attn.out_proj.weight",
    );
    assert_starts(&out.up().to_f32(), [-0.135_326_18, 0.047_187_466, 0.359_577_1]);

    let q_proj = low_rank(
        "sd15/peft",
        "clip_l.transformer.text_model.encoder.layers.2.self_attn.q_proj.weight",
    );
    assert_starts(&q_proj.down().to_f32(), [0.179_271_07, 0.114_396_22, 0.088_979_63]);
}

#[test]
fn every_tensor_becomes_the_part_of_its_name() {
    let layer = |n| format!("lora_te_text_model_encoder_layers_{n}_");
    let norm = "text_encoders.clip_l.transformer.text_model.final_layer_norm";
    let cases: [(&str, String, Roles); 11] = [
        (
            "loha",
            layer(1) + "mlp_fc2",
            &[
                (".hada_w1_a", "loha.w1_a"),
                (".hada_w1_b", "loha.w1_b"),
                (".hada_w2_a", "loha.w2_a"),
                (".hada_w2_b", "loha.w2_b"),
            ],
        ),
        ("lokr", layer(0) + "mlp_fc2", &[(".lokr_w1", "lokr.w1"), (".lokr_w2", "lokr.w2")]),
        (
            "lokr",
            layer(1) + "mlp_fc2",
            &[(".lokr_w1", "lokr.w1"), (".lokr_w2_a", "lokr.w2_a"), (".lokr_w2_b", "lokr.w2_b")],
        ),
        ("lokr", layer(2) + "mlp_fc2", &[(".lokr_w1_a", "lokr.w1_a"), (".lokr_w1_b", "lokr.w1_b")]),
        (
            "glora",
            layer(2) + "mlp_fc1",
            &[
                (".a1.weight", "glora.a1"),
                (".a2.weight", "glora.a2"),
                (".b1.weight", "glora.b1"),
                (".b2.weight", "glora.b2"),
            ],
        ),
        (
            "oft",
            layer(3) + "mlp_fc1",
            &[(".oft_blocks", "oft.blocks"), (".rescale", "oft.rescale")],
        ),
        (
            "boft",
            layer(0) + "self_attn_v_proj",
            &[(".oft_blocks", "boft.blocks"), (".rescale", "boft.rescale")],
        ),
        ("dora", layer(0) + "mlp_fc2", &[(".dora_scale", "lora.dora_scale")]),
        ("diff", layer(0) + "mlp_fc1", &[(".diff", "diff.value")]),
        ("diff", norm.to_owned(), &[(".diff", "diff.value")]),
        (
            "set",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2".to_owned(),
            &[(".set_weight", "set.value")],
        ),
    ];
    for (name, prefix, suffixes) in cases {
        let bytes = seeded(&format!("sd15/{name}"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let canonical = read_lora(bytes.as_slice()).unwrap().0.to_bytes();
        let canonical = SafeTensors::deserialize(&canonical).unwrap();
        for (suffix, role) in suffixes {
            let original = file.tensor(&format!("{prefix}{suffix}")).unwrap();
            let target = weight_of(&prefix);
            let part = canonical.tensor(&format!("{target}/{role}")).unwrap();
            assert_eq!(part.data(), original.data(), "{prefix}{suffix}");
            assert_eq!(part.shape(), original.shape(), "{prefix}{suffix}");
        }
    }
}

#[test]
fn differences_of_biases_and_norms_have_their_own_targets() {
    let (set, _) = read_lora(seeded("sdxl/diff").as_slice()).unwrap();
    let clip_g: BTreeMap<_, _> = set
        .patches()
        .iter()
        .filter(|(target, _)| target.component() == Component::ClipG)
        .map(|(target, patch)| (target.parameter(), patch.shape()))
        .collect();
    let (fc1, q_proj) = (Some([192, 48]), Some([48, 48]));
    let expected = BTreeMap::from([
        ("text_model.encoder.layers.0.mlp.fc1.bias", None),
        ("text_model.encoder.layers.0.mlp.fc1.weight", fc1),
        ("text_model.encoder.layers.0.self_attn.q_proj.bias", None),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", q_proj),
        ("text_model.encoder.layers.1.layer_norm1.bias", None),
        ("text_model.encoder.layers.1.layer_norm1.weight", None),
        ("text_model.encoder.layers.2.mlp.fc1.bias", None),
        ("text_model.encoder.layers.2.mlp.fc1.weight", fc1),
        ("text_model.encoder.layers.2.self_attn.q_proj.bias", None),
        ("text_model.encoder.layers.2.self_attn.q_proj.weight", q_proj),
        ("text_model.final_layer_norm.bias", None),
        ("text_model.final_layer_norm.weight", None),
    ]);
    assert_eq!(clip_g, expected);
}

#[test]
fn scales_are_those_of_the_kinds() {
    let scales = |name: &str| {
        let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
        let mut scales = Vec::new();
        for patch in set.patches().values() {
            scales.extend(if let Patch::LowRank(lora) = patch { Some(lora.scale()) } else { None });
            scales.extend(if let Patch::Hadamard(loha) = patch {
                Some(loha.scale())
            } else {
                None
            });
            scales.extend(if let Patch::Kronecker(lokr) = patch {
                Some(lokr.scale())
            } else {
                None
            });
        }
        assert_eq!(scales.len(), set.patches().len());
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        scales
    };
    assert_eq!(scales("sd15/loha"), [0.75]);
    assert_eq!(scales("sd15/dora"), [1.0]);
    // Rank 2 and alpha 1.5, and both matrices whole.
    assert_eq!(scales("sd15/lokr"), [0.75, 1.0]);
}

#[test]
fn shapes_are_those_of_the_weights() {
    for name in ["loha", "lokr", "glora", "dora", "kohya"] {
        let (set, _) = read_lora(seeded(&format!("sd15/{name}")).as_slice()).unwrap();
        for (target, patch) in set.patches() {
            let expected = match target.parameter().split("mlp.").nth(1) {
                Some("fc1.weight") => [128, 32],
                Some("fc2.weight") => [32, 128],
                _ => [32, 32],
            };
            // The tensors of a square weight fit the other layout too, for a weight [rank, rank].
            let is_ambiguous = name == "glora" && expected == [32, 32];
            assert_eq!(patch.shape(), (!is_ambiguous).then_some(expected), "{name} {target}");
        }
    }
}

/// The digest of a stored adapter may never change: a change here is a new version of the format.
#[test]
fn digests_are_frozen() {
    let cases = [
        ("sd15/kohya", "0b6c88c2f1da3e58441b99ec9ae3c6052e530ce5a897e8b142b261c515548e9f"),
        ("sdxl/dora", "7839029ed25111697d1efa7eb4e7f36e19b801de883023928b80171815f173ce"),
        ("sdxl/loha", "dfce2bfaea9725ea507a32e7177e7a134385992555e623f6ff0c9054b7c764f4"),
        ("sdxl/lokr", "1d28e6549dc07288885bc0cc495479385441c8a00cef49bb58aae455aa566466"),
        ("sdxl/glora", "2647be0baf87db9accd1f4433436502bf5a007e81dc4c4a7a81cd3e98d0bc950"),
        ("sdxl/oft", "3edd68f39ae02bfb7e0f9477af4e3be39941ae40bc0ba0f3224c34abb57b2f2a"),
        ("sdxl/boft", "465192ae2b4e88c2af728b625f95bd52cdc5aafe18e58597fb2d32a556941589"),
        ("sdxl/diff", "3f1964fe07ed1003da34a7a13e20a7216c6d2af73672f025d38e7d6ed4aa8228"),
        ("sdxl/set", "507449785c5eba604e3faee9119765aa905d2f67b6564bbdc1d48b4441326860"),
        ("sdxl/mid", "dcd2efb29cfc1741f44dce2f47b3d8e925b481f84c824545b0a670e5a72c59bb"),
    ];
    for (name, digest) in cases {
        let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
        assert_eq!(set.id().to_string(), digest, "{name}");
    }
}

fn low_rank(name: &str, target: &str) -> LowRank {
    let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
    let patch = &set.patches()[&target.parse::<Target>().unwrap()];
    let Patch::LowRank(lora) = patch else { panic!("{patch:?}") };
    lora.clone()
}

#[track_caller]
fn assert_starts(values: &[f32], expected: [f32; 3]) {
    assert_eq!(values[..3], expected);
}

/// The weight that a prefix of an SD 1.5 file names.
fn weight_of(prefix: &str) -> String {
    if let Some(internal) = prefix.strip_prefix("text_encoders.") {
        return format!("{internal}.weight");
    }
    let place = prefix.strip_prefix("lora_te_text_model_encoder_layers_").unwrap();
    let (layer, module) = place.split_once('_').unwrap();
    let module = module.replace("mlp_", "mlp.").replace("self_attn_", "self_attn.");
    format!("clip_l.transformer.text_model.encoder.layers.{layer}.{module}.weight")
}

/// All tensors' bytes with alphas as f32, sorted: what a file holds beside names.
fn elements(set: &PatchSet) -> Vec<Vec<u8>> {
    let bytes = set.to_bytes();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| match tensor.data() {
            #[expect(clippy::cast_possible_truncation, reason = "the seeded alphas are f32")]
            alpha if name.contains(".alpha") => {
                (f64::from_le_bytes(alpha.try_into().unwrap()) as f32).to_le_bytes().to_vec()
            }
            data => data.to_vec(),
        })
        .collect();
    all.sort_unstable();
    all
}

/// The same, read by the `safetensors` crate.
fn elements_by_the_reference_reader(file: &[u8]) -> Vec<Vec<u8>> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let mut all: Vec<_> = tensors
        .iter()
        .filter(|(key, _)| !key.starts_with("lora_unet"))
        .map(|(_, tensor)| tensor.data().to_vec())
        .collect();
    all.sort_unstable();
    all
}
