//! Every seeded file: those of plain LoRA are read whole, the others are refused by their kind.

use luna_adapter::{
    AdapterError, ErrorKind, LowRank, Patch, PatchKind, PatchSet, Target, read_lora,
};
use protocol::{Component, Dtype};
use safetensors::SafeTensors;

use crate::files::seeded;

#[test]
fn every_plain_lora_is_read_with_all_its_targets() {
    // name, targets on clip_l, targets on clip_g, rank of each, ignored keys
    let cases = [
        ("sd15/kohya", 24, 0, 2),
        ("sd15/kohya_f16", 16, 0, 0),
        ("sd15/peft", 16, 0, 0),
        ("sd15/diffusers", 20, 0, 0),
        ("sd15/mid", 2, 0, 0),
        ("sdxl/kohya", 24, 30, 2),
        ("sdxl/kohya_f16", 16, 20, 0),
        ("sdxl/peft", 16, 20, 0),
        ("sdxl/diffusers", 20, 25, 0),
        ("sdxl/mid", 2, 2, 0),
        ("sdxl/proj", 0, 1, 0),
        ("sdxl/sd1names", 4, 0, 0),
    ];
    for (name, on_clip_l, on_clip_g, ignored) in cases {
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
        assert!(set.patches().values().all(|Patch::LowRank(lora)| lora.rank() == 4), "{name}");
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
fn every_other_kind_is_refused_by_name() {
    let cases = [
        ("boft", PatchKind::Boft, "BOFT"),
        ("diff", PatchKind::Diff, "full weight difference (diff)"),
        ("dora", PatchKind::Dora, "DoRA"),
        ("glora", PatchKind::Glora, "GLoRA"),
        ("loha", PatchKind::Loha, "LoHa"),
        ("lokr", PatchKind::Lokr, "LoKr"),
        ("oft", PatchKind::Oft, "OFT"),
        ("set", PatchKind::Set, "weight replacement (set_weight)"),
    ];
    for family in ["sd15", "sdxl"] {
        for (name, expected, shown) in cases {
            let error = read_lora(seeded(&format!("{family}/{name}")).as_slice()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains(&format!("is a {shown} key")), "{error}");
            let AdapterError::UnsupportedKind { kind, key } = error else {
                panic!("{family}/{name}: {error}")
            };
            assert_eq!(kind, expected);
            assert!(key.starts_with("lora_te") || key.starts_with("text_encoders."), "{key}");
        }
    }
}

/// The digest of a stored adapter may never change: a change here is a new version of the format.
#[test]
fn digests_are_frozen() {
    let cases = [
        ("sd15/kohya", "0b6c88c2f1da3e58441b99ec9ae3c6052e530ce5a897e8b142b261c515548e9f"),
        ("sdxl/mid", "dcd2efb29cfc1741f44dce2f47b3d8e925b481f84c824545b0a670e5a72c59bb"),
    ];
    for (name, digest) in cases {
        let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
        assert_eq!(set.id().to_string(), digest, "{name}");
    }
}

fn low_rank(name: &str, target: &str) -> LowRank {
    let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
    let Patch::LowRank(lora) = &set.patches()[&target.parse::<Target>().unwrap()];
    lora.clone()
}

#[track_caller]
fn assert_starts(values: &[f32], expected: [f32; 3]) {
    assert_eq!(values[..3], expected);
}

/// All matrices' bytes and all alphas' bits, sorted: what a file holds beside names.
fn elements(set: &PatchSet) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for Patch::LowRank(lora) in set.patches().values() {
        let matrices = [Some(lora.up()), Some(lora.down()), lora.mid()].into_iter().flatten();
        all.extend(matrices.map(|matrix| matrix.bytes().to_vec()));
        #[expect(clippy::cast_possible_truncation, reason = "the seeded alphas are f32")]
        all.extend(lora.alpha().map(|alpha| (alpha as f32).to_le_bytes().to_vec()));
    }
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
