//! One content in different spellings is one adapter; which keys win, and what is reported.

use luna_adapter::{AdapterError, ErrorKind, Patch, PatchSet, Target, read_lora};

use crate::files::{Entry, bfloat16, entry, file, float16, float32, pair};

const KOHYA: [&str; 2] = [".lora_up.weight", ".lora_down.weight"];
const PAIRS: [[&str; 2]; 7] = [
    KOHYA,
    ["_lora.up.weight", "_lora.down.weight"],
    [".lora_B.weight", ".lora_A.weight"],
    [".lora.up.weight", ".lora.down.weight"],
    [".lora_B", ".lora_A"],
    [".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"],
    [".lora_B.default.weight", ".lora_A.default.weight"],
];
/// From the one that loses against all others to the one that wins.
const CLIP_L: [&str; 4] = [
    "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
    "lora_te_text_model_encoder_layers_1_mlp_fc1",
    "lora_te1_text_model_encoder_layers_1_mlp_fc1",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1",
];
const CLIP_G: [&str; 3] = [
    "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1",
    "lora_te2_text_model_encoder_layers_1_mlp_fc1",
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
];
const FC1: &str = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight";

#[test]
fn one_content_has_one_digest_in_every_spelling() {
    for prefixes in [CLIP_L.as_slice(), CLIP_G.as_slice()] {
        let digests: Vec<_> = prefixes
            .iter()
            .flat_map(|prefix| PAIRS.map(|suffixes| read(&pair(prefix, suffixes, 0.5)).id()))
            .collect();
        assert_eq!(digests.len(), prefixes.len() * PAIRS.len());
        assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    }
    assert_ne!(read(&pair(CLIP_L[0], KOHYA, 0.5)).id(), read(&pair(CLIP_G[0], KOHYA, 0.5)).id());
    assert_ne!(read(&pair(CLIP_L[0], KOHYA, 0.5)).id(), read(&pair(CLIP_L[0], KOHYA, 0.25)).id());
}

#[test]
fn the_type_in_which_alpha_is_written_leaves_no_trace() {
    let name = format!("{}.alpha", CLIP_L[2]);
    let spellings = [
        float32(&name, &[], &[8.0]),
        float32(&name, &[1], &[8.0]),
        float16(&name, &[], &[8.0]),
        bfloat16(&name, &[1, 1], &[8.0]),
        entry(&name, "F64", &[], 8.0_f64.to_le_bytes().to_vec()),
        entry(&name, "I64", &[], 8_i64.to_le_bytes().to_vec()),
        entry(&name, "U8", &[], vec![8]),
    ];
    let digests = spellings.map(|alpha| read(&with(pair(CLIP_L[2], KOHYA, 0.5), [alpha])).id());
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");

    assert_ne!(digests[0], read(&pair(CLIP_L[2], KOHYA, 0.5)).id(), "no alpha is not alpha 8");
    let other = float32(&name, &[], &[8.000_001]);
    assert_ne!(digests[0], read(&with(pair(CLIP_L[2], KOHYA, 0.5), [other])).id());
}

#[test]
fn matrices_keep_the_type_of_their_file() {
    let [up, down] = KOHYA.map(|suffix| format!("{}{suffix}", CLIP_L[0]));
    let halves = [float16(&up, &[3, 2], &[0.5; 6]), float16(&down, &[2, 2], &[0.5; 4])];
    let brain = [bfloat16(&up, &[3, 2], &[0.5; 6]), bfloat16(&down, &[2, 2], &[0.5; 4])];
    let ids = [pair(CLIP_L[0], KOHYA, 0.5), halves, brain].map(|entries| {
        let set = read(&entries);
        assert_eq!(up_of(&set, FC1), [0.5; 6]);
        set.id()
    });
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
}

#[test]
fn trailing_dimensions_of_convolutions_are_flattened() {
    let [up, down] = KOHYA.map(|suffix| format!("{}{suffix}", CLIP_L[0]));
    let flat = pair(CLIP_L[0], KOHYA, 0.5);
    let deep = [float32(&up, &[3, 2, 1, 1], &[0.5; 6]), float32(&down, &[2, 2, 1, 1], &[0.5; 4])];
    assert_eq!(read(&flat).id(), read(&deep).id());
}

#[test]
fn the_greater_spelling_replaces_the_lesser_and_says_so() {
    for (prefixes, target) in
        [(CLIP_L.as_slice(), FC1), (CLIP_G.as_slice(), &FC1.replace("clip_l", "clip_g"))]
    {
        for winner in 1..prefixes.len() {
            let entries: Vec<_> = (0..=winner)
                .zip([0.125, 0.25, 0.5, 1.0])
                .flat_map(|(index, fill)| pair(prefixes[index], KOHYA, fill))
                .collect();
            let (set, report) = read_lora(file(&entries).as_slice()).unwrap();
            assert_eq!(set.patches().len(), 1);
            assert_eq!(up_of(&set, target), [[0.125, 0.25, 0.5, 1.0][winner]; 6]);
            assert_eq!(report.superseded.len(), 2 * winner);
            assert!(
                report.superseded.iter().all(|key| !key.starts_with(prefixes[winner])),
                "{report:?}"
            );
            assert!(report.unmatched.is_empty());
            assert_eq!(
                set.id(),
                read(&pair(prefixes[winner], KOHYA, [0.125, 0.25, 0.5, 1.0][winner])).id()
            );
        }
    }
}

#[test]
fn the_first_pair_of_a_prefix_wins_and_the_others_are_unmatched() {
    for winner in 0..PAIRS.len() {
        let entries: Vec<_> = (winner..PAIRS.len())
            .flat_map(|index| {
                pair(CLIP_L[1], PAIRS[index], if index == winner { 1.0 } else { 0.5 })
            })
            .collect();
        let (set, report) = read_lora(file(&entries).as_slice()).unwrap();
        assert_eq!(up_of(&set, FC1), [1.0; 6]);
        assert_eq!(report.unmatched.len(), 2 * (PAIRS.len() - winner - 1));
    }
}

#[test]
fn projections_are_named_by_their_own_keys() {
    let read_projection = |prefix| {
        let (set, _) = read_lora(file(&pair(prefix, KOHYA, 0.5)).as_slice()).unwrap();
        set.into_patches().into_keys().next().unwrap().to_string()
    };
    assert_eq!(
        read_projection("lora_te1_text_projection"),
        "clip_l.transformer.text_projection.weight"
    );
    assert_eq!(
        read_projection("lora_te2_text_projection"),
        "clip_g.transformer.text_projection.weight"
    );
    assert_eq!(
        read_projection("lora_prior_te_text_projection"),
        "clip_g.transformer.text_projection.weight"
    );
}

#[test]
fn unmatched_keys_are_reported_and_part_of_the_content() {
    let known = pair(CLIP_L[1], KOHYA, 0.5);
    let stray = [
        float32(
            "lora_te3_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
            &[1, 1],
            &[f32::NAN],
        ),
        float32("text_encoder.text_model.encoder.layers.0.mlp.fc9.lora_A.weight", &[1, 1], &[0.0]),
        float32("lora_te_text_model_encoder_layers_0_mlp_fc2.alpha", &[], &[1.0]),
        float32("lora_te_text_model_encoder_layers_0_mlp_fc2.lora_down.weight", &[1, 1], &[1.0]),
    ];
    let (set, report) = read_lora(file(&with(known.clone(), stray.clone())).as_slice()).unwrap();
    let mut expected = stray.map(|entry| entry.name);
    expected.sort_unstable();
    assert_eq!(report.unmatched, expected);
    assert_eq!(set.unmatched(), expected);
    assert_eq!((report.text_encoder_keys, report.ignored_keys), (6, 0));
    assert_ne!(set.id(), read(&known).id());
    assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set);
}

#[test]
fn a_file_without_text_encoder_keys_is_an_empty_adapter() {
    let unet = pair("lora_unet_mid_block_attentions_0_proj_in", KOHYA, 0.5);
    let (set, report) = read_lora(file(&unet).as_slice()).unwrap();
    assert!(set.is_empty() && !report.has_text_encoder_keys());
    assert_eq!(report.ignored_keys, 2);
    assert_eq!(set.id(), PatchSet::default().id());
    assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set);
}

#[test]
fn text_encoder_keys_that_all_match_nothing_are_an_error_that_names_some() {
    let entries: Vec<_> =
        (0..9).flat_map(|n| pair(&format!("lora_te3_encoder_block_{n}"), KOHYA, 0.5)).collect();
    let error = read_lora(file(&entries).as_slice()).unwrap_err();
    let AdapterError::NothingMatches { count, examples } = &error else { panic!("{error}") };
    assert_eq!((*count, examples.len()), (18, 5));
    assert!(error.to_string().contains("`lora_te3_encoder_block_0.lora_down.weight`"), "{error}");
}

#[test]
fn an_up_without_its_down_is_an_error() {
    for suffixes in PAIRS {
        let [up, _] = pair(CLIP_L[1], suffixes, 0.5);
        let error = read_lora(file(&[up]).as_slice()).unwrap_err();
        let AdapterError::MissingPartner { key, missing } = error else { panic!("{error}") };
        assert_eq!([key, missing], suffixes.map(|suffix| format!("{}{suffix}", CLIP_L[1])));
    }
}

#[test]
fn a_lora_that_asks_for_another_shape_is_refused_whole() {
    let shape = entry(&format!("{}.reshape_weight", CLIP_L[1]), "I64", &[2], vec![1; 16]);
    let error =
        read_lora(file(&with(pair(CLIP_L[1], KOHYA, 0.5), [shape])).as_slice()).unwrap_err();
    assert!(matches!(error, AdapterError::UnsupportedReshape { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("is a reshape_weight key"), "{error}");
}

#[test]
fn any_kind_on_the_image_model_is_ignored() {
    let unet = entry("lora_unet_x.hada_w1_a", "F8_E4M3", &[4], vec![0x7f; 4]);
    assert_eq!(read(&with(pair(CLIP_L[1], KOHYA, 0.5), [unet])).patches().len(), 1);
}

fn read(entries: &[Entry]) -> PatchSet {
    read_lora(file(entries).as_slice()).unwrap().0
}

fn with<const N: usize>(entries: [Entry; 2], more: [Entry; N]) -> Vec<Entry> {
    entries.into_iter().chain(more).collect()
}

fn up_of(set: &PatchSet, target: &str) -> Vec<f32> {
    let patch = &set.patches()[&target.parse::<Target>().unwrap()];
    let Patch::LowRank(lora) = patch else { panic!("{patch:?}") };
    lora.up().to_f32()
}
