//! Kinds other than plain LoRA: which one wins, what they need, and what they refuse.

use luna_adapter::{
    AdapterError, ArrayError, ErrorKind, KeyReport, Limits, MatrixError, Patch, PatchKind,
    PatchSet, Target, read_lora, read_lora_with,
};

use crate::files::{Entry, entry, file, float32};

const PREFIX: &str = "lora_te_text_model_encoder_layers_0_mlp_fc1";
const LESSER: &str = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1";
const WEIGHT: &str = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight";
const BIAS: &str = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.bias";
const NORM: &str = "text_encoders.clip_l.transformer.text_model.final_layer_norm";

/// Suffixes and shapes of one patch of a weight [4, 6].
type Parts = &'static [(&'static str, &'static [usize])];

const LORA: Parts = &[(".lora_up.weight", &[4, 2]), (".lora_down.weight", &[2, 6])];
const LOHA: Parts = &[
    (".hada_w1_a", &[4, 2]),
    (".hada_w1_b", &[2, 6]),
    (".hada_w2_a", &[4, 3]),
    (".hada_w2_b", &[3, 6]),
];
const LOHA_CORES: Parts = &[
    (".hada_w1_a", &[2, 4]),
    (".hada_w1_b", &[3, 3]),
    (".hada_w2_a", &[2, 4]),
    (".hada_w2_b", &[3, 3]),
    (".hada_t1", &[2, 3, 2, 1]),
    (".hada_t2", &[2, 3, 1, 2]),
];
const LOKR: Parts = &[(".lokr_w1", &[2, 2]), (".lokr_w2", &[2, 3])];
const LOKR_FACTORS: Parts = &[
    (".lokr_w1_a", &[2, 1]),
    (".lokr_w1_b", &[1, 2]),
    (".lokr_w2_a", &[2, 5]),
    (".lokr_w2_b", &[5, 3]),
];
const LOKR_CORE: Parts = &[
    (".lokr_w1", &[2, 2]),
    (".lokr_w2_a", &[5, 2]),
    (".lokr_w2_b", &[7, 3]),
    (".lokr_t2", &[5, 7, 1, 1]),
];
const GLORA: Parts = &[
    (".a1.weight", &[6, 2]),
    (".a2.weight", &[2, 6]),
    (".b1.weight", &[4, 2]),
    (".b2.weight", &[2, 6]),
];
const GLORA_OLD: Parts = &[
    (".a1.weight", &[2, 6]),
    (".a2.weight", &[6, 2]),
    (".b1.weight", &[2, 6]),
    (".b2.weight", &[4, 2]),
];
const OFT: Parts = &[(".oft_blocks", &[2, 2, 2]), (".rescale", &[4, 1])];
const BOFT: Parts = &[(".oft_blocks", &[1, 2, 2, 2]), (".rescale", &[4, 1])];
const NORM_DIFF: Parts = &[(".w_norm", &[4, 6])];
const DIFF: Parts = &[(".diff", &[4, 6])];
const SET: Parts = &[(".set_weight", &[4, 6])];

#[test]
fn every_kind_and_layout_is_read_and_comes_back() {
    // parts, kind, shape where the patch tells it
    let cases = [
        (LORA, PatchKind::Lora, Some([4, 6])),
        (LOHA, PatchKind::Loha, Some([4, 6])),
        (LOHA_CORES, PatchKind::Loha, Some([4, 6])),
        (LOKR, PatchKind::Lokr, Some([4, 6])),
        (LOKR_FACTORS, PatchKind::Lokr, Some([4, 6])),
        (LOKR_CORE, PatchKind::Lokr, Some([4, 6])),
        (GLORA, PatchKind::Glora, Some([4, 6])),
        (GLORA_OLD, PatchKind::Glora, Some([4, 6])),
        (OFT, PatchKind::Oft, None),
        (BOFT, PatchKind::Boft, None),
        (NORM_DIFF, PatchKind::Diff, Some([4, 6])),
        (DIFF, PatchKind::Diff, Some([4, 6])),
        (SET, PatchKind::Set, Some([4, 6])),
    ];
    for (parts, kind, shape) in cases {
        let (set, report) = read(&patch(PREFIX, parts));
        let patch = &set.patches()[&target(WEIGHT)];
        assert_eq!((patch.kind(), patch.shape()), (kind, shape), "{parts:?}");
        assert_eq!(report.text_encoder_keys, parts.len());
        assert!(report.unmatched.is_empty() && report.superseded.is_empty(), "{report:?}");
        assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set, "{kind}");
    }
}

#[test]
fn of_several_kinds_on_one_weight_the_later_one_counts() {
    let order = [LORA, LOHA, LOKR, GLORA, OFT, NORM_DIFF, DIFF, SET];
    for (index, lesser) in order.iter().enumerate() {
        for winner in &order[index + 1..] {
            let entries = [patch(PREFIX, winner), patch(PREFIX, lesser)].concat();
            let (set, report) = read(&entries);
            assert_eq!(set, read(&patch(PREFIX, winner)).0, "{lesser:?} {winner:?}");
            assert_eq!(report.superseded, names(PREFIX, lesser), "{winner:?}");
            assert!(report.unmatched.is_empty(), "{report:?}");
        }
    }
}

#[test]
fn a_lesser_spelling_loses_with_any_kind() {
    let entries = [patch(LESSER, SET), patch(PREFIX, LORA)].concat();
    let (set, report) = read(&entries);
    assert_eq!(set, read(&patch(PREFIX, LORA)).0);
    assert_eq!(report.superseded, names(LESSER, SET));
}

#[test]
fn weight_and_bias_are_patched_apart() {
    let diff_b = |prefix: &str, value| float32(&format!("{prefix}.diff_b"), &[2], &[value; 2]);
    let entries =
        [patch(LESSER, LORA), vec![diff_b(LESSER, 0.25)], vec![diff_b(PREFIX, 0.5)]].concat();
    let (set, report) = read(&entries);
    assert_eq!(set.patches()[&target(WEIGHT)].kind(), PatchKind::Lora);
    assert_eq!(value(&set, BIAS), [0.5; 2]);
    assert_eq!(report.superseded, [format!("{LESSER}.diff_b")]);
    assert_eq!(report.targets, [target(BIAS), target(WEIGHT)]);
}

#[test]
fn a_norms_bias_counts_beside_its_weight_only() {
    let bias = "clip_l.transformer.text_model.final_layer_norm.bias";
    let tensor = |suffix: &str, value| float32(&format!("{NORM}{suffix}"), &[2], &[value; 2]);
    let both = [tensor(".w_norm", 0.25), tensor(".b_norm", 0.5)];
    let (set, _) = read(&both);
    assert_eq!((set.patches().len(), value(&set, bias)), (2, vec![0.5; 2]));

    let (set, report) = read(&[both.as_slice(), &[tensor(".diff_b", 1.0)]].concat());
    assert_eq!(value(&set, bias), [1.0; 2]);
    assert_eq!(report.superseded, [format!("{NORM}.b_norm")]);

    let (set, report) = read(&[tensor(".b_norm", 0.5), tensor(".diff", 1.0)]);
    assert_eq!(set.patches().len(), 1);
    assert_eq!(report.unmatched, [format!("{NORM}.b_norm")]);
}

#[test]
fn a_bias_that_the_module_does_not_have_is_unmatched() {
    let name = "lora_te1_text_projection";
    let entries = [patch(name, LORA), vec![float32(&format!("{name}.diff_b"), &[1], &[1.0])]];
    let (set, report) = read(&entries.concat());
    assert_eq!(set.patches().len(), 1);
    assert_eq!(report.unmatched, [format!("{name}.diff_b")]);
}

#[test]
fn alpha_and_dora_scale_belong_to_the_adapters_and_to_the_last_of_them() {
    let shared = [
        float32(&format!("{PREFIX}.alpha"), &[], &[3.0]),
        float32(&format!("{PREFIX}.dora_scale"), &[4, 1], &[0.5; 4]),
    ];
    for parts in [LORA, LOHA, LOHA_CORES, LOKR, LOKR_CORE, GLORA, GLORA_OLD, OFT, BOFT] {
        let (set, report) = read(&[patch(PREFIX, parts), shared.to_vec()].concat());
        let patch = &set.patches()[&target(WEIGHT)];
        assert_eq!(patch.alpha(), Some(3.0), "{parts:?}");
        assert_eq!(patch.dora_scale().unwrap().shape(), [4, 1], "{parts:?}");
        assert!(report.unmatched.is_empty(), "{report:?}");
        assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set);
    }
    let adapters = [patch(PREFIX, LORA), patch(PREFIX, LOHA), shared.to_vec()].concat();
    assert_eq!(read(&adapters).1.superseded, names(PREFIX, LORA));

    let (set, report) = read(&[patch(PREFIX, DIFF), shared.to_vec()].concat());
    assert_eq!(set, with_unmatched(&read(&patch(PREFIX, DIFF)).0, &shared));
    assert_eq!(report.unmatched, shared.map(|entry| entry.name));
}

#[test]
fn a_dora_scale_is_a_column_of_out_or_a_row_of_in() {
    let scaled = |parts, shape: &[usize]| {
        let scale = vec![0.5; shape.iter().product()];
        let scale = float32(&format!("{PREFIX}.dora_scale"), shape, &scale);
        read_lora(file(&[patch(PREFIX, parts), vec![scale]].concat()).as_slice())
    };
    for parts in [LORA, LOHA, LOKR, GLORA] {
        for shape in [[4, 1], [1, 6]] {
            assert!(scaled(parts, &shape).is_ok(), "{parts:?} {shape:?}");
        }
        for shape in [[1, 4], [6, 1], [4, 6], [1, 1]] {
            let error = scaled(parts, &shape).unwrap_err();
            assert!(matches!(error, AdapterError::Patch { .. }), "{error}");
            assert!(error.to_string().contains("expected [4, 1] or [1, 6]"), "{error}");
        }
        for shape in [&[4][..], &[], &[4, 1, 1, 1]] {
            let error = scaled(parts, shape).unwrap_err();
            assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
        }
    }
    for parts in [OFT, BOFT] {
        assert!(scaled(parts, &[1, 77]).is_ok() && scaled(parts, &[4, 1]).is_ok());
        assert!(scaled(parts, &[5, 1]).is_err() && scaled(parts, &[4, 2]).is_err());
    }
}

#[test]
fn a_whole_matrix_of_a_kronecker_product_counts_before_its_factors() {
    let entries = [patch(PREFIX, LOKR), patch(PREFIX, LOKR_FACTORS)].concat();
    let (set, report) = read(&entries);
    assert_eq!(report.unmatched, names(PREFIX, LOKR_FACTORS));
    let Patch::Kronecker(lokr) = &set.patches()[&target(WEIGHT)] else { panic!("{set:?}") };
    assert_eq!((lokr.rank(), lokr.scale().to_bits()), (None, 1.0_f64.to_bits()));
}

#[test]
fn an_orthogonal_patch_without_alpha_is_content_of_its_own() {
    for parts in [OFT, BOFT] {
        let without = read(&patch(PREFIX, parts)).0;
        let zero = float32(&format!("{PREFIX}.alpha"), &[], &[0.0]);
        let with = read(&[patch(PREFIX, parts), vec![zero]].concat()).0;
        assert_ne!(without.id(), with.id());
        assert_eq!(without.patches()[&target(WEIGHT)].alpha(), None);
    }
}

#[test]
fn a_glora_that_fits_both_layouts_has_no_shape_of_its_own() {
    let both: Parts = &[
        (".a1.weight", &[4, 6]),
        (".a2.weight", &[6, 4]),
        (".b1.weight", &[4, 6]),
        (".b2.weight", &[6, 4]),
    ];
    assert_eq!(read(&patch(PREFIX, both)).0.patches()[&target(WEIGHT)].shape(), None);
}

#[test]
fn a_missing_partner_is_named() {
    // parts, place of the absent one, suffix that the error names
    let cases = [
        (LOHA, 1, ".hada_w1_b"),
        (LOHA, 2, ".hada_w2_a"),
        (LOHA, 3, ".hada_w2_b"),
        (LOHA_CORES, 5, ".hada_t2"),
        (LOKR, 0, ".lokr_w1"),
        (LOKR, 1, ".lokr_w2"),
        (LOKR_FACTORS, 0, ".lokr_w1_a"),
        (LOKR_FACTORS, 1, ".lokr_w1_b"),
        (LOKR_FACTORS, 2, ".lokr_w2_a"),
        (LOKR_FACTORS, 3, ".lokr_w2_b"),
        (GLORA, 1, ".a2.weight"),
        (GLORA, 2, ".b1.weight"),
        (GLORA, 3, ".b2.weight"),
    ];
    for (parts, absent, suffix) in cases {
        let mut entries = patch(PREFIX, parts);
        entries.remove(absent);
        let error = read_lora(file(&entries).as_slice()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LoraRejected);
        let AdapterError::MissingPartner { key, missing } = error else { panic!("{error}") };
        assert_eq!(missing, format!("{PREFIX}{suffix}"));
        assert!(entries.iter().any(|entry| entry.name == key), "{key}");
    }
    let error = read_lora(file(&patch(PREFIX, &LOHA[..1])).as_slice()).unwrap_err();
    let expected =
        format!("`{PREFIX}.hada_w1_a` has no partner `{PREFIX}.hada_w1_b`: the file is incomplete");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn factors_without_their_core_have_shapes_that_do_not_fit() {
    for (parts, core) in [(LOHA_CORES, 4), (LOKR_CORE, 3)] {
        let mut entries = patch(PREFIX, parts);
        entries.remove(core);
        let error = read_lora(file(&entries).as_slice()).unwrap_err();
        assert!(matches!(error, AdapterError::Patch { .. }), "{error}");
    }
}

#[test]
fn a_large_square_weight_does_not_count_as_rank() {
    let square: Parts = &[
        (".a1.weight", &[768, 2]),
        (".a2.weight", &[2, 768]),
        (".b1.weight", &[768, 2]),
        (".b2.weight", &[2, 768]),
    ];
    assert_eq!(read(&patch(PREFIX, square)).0.patches().len(), 1);
}

#[test]
fn parts_without_the_one_that_names_their_kind_are_unmatched() {
    for parts in [&LOHA[1..], &LOHA_CORES[4..], &LOKR_FACTORS[1..2], &GLORA[1..], &OFT[1..]] {
        let (set, report) = read(&[patch(PREFIX, LORA), patch(PREFIX, parts)].concat());
        assert_eq!(report.unmatched, names(PREFIX, parts));
        assert_eq!(set.patches()[&target(WEIGHT)].kind(), PatchKind::Lora);
        let error = read_lora(file(&patch(PREFIX, parts)).as_slice()).unwrap_err();
        assert!(matches!(error, AdapterError::NothingMatches { .. }), "{error}");
    }
    let (_, report) = read(&[patch(PREFIX, LOHA), patch(PREFIX, &LOHA_CORES[5..])].concat());
    assert_eq!(report.unmatched, [format!("{PREFIX}.hada_t2")]);
}

#[test]
fn shapes_that_do_not_belong_together_are_refused() {
    let every =
        [LOHA, LOHA_CORES, LOKR_FACTORS, LOKR_CORE, GLORA, GLORA_OLD, OFT, BOFT, LOKR, DIFF, SET];
    for parts in every {
        for place in 0..parts.len() {
            let (suffix, shape) = parts[place];
            let variants =
                [vec![], [shape, &[1, 1, 1, 1]].concat(), vec![0; shape.len()], vec![1; 5]];
            for variant in variants {
                let error = with_shape(parts, place, &variant);
                assert_eq!(error.kind(), ErrorKind::LoraRejected, "{suffix} {variant:?}: {error}");
                assert!(error.to_string().contains(PREFIX), "{suffix} {variant:?}: {error}");
            }
        }
    }
    // part, shape that does not go with the others
    let cases: [(Parts, usize, &[usize], &str); 13] = [
        (LOHA, 1, &[3, 6], "w1_b has shape [3, 6]: expected [2, in]"),
        (LOHA, 3, &[3, 5], "w2_a · w2_b has shape [4, 5]: expected [4, 6]"),
        (LOHA_CORES, 4, &[2, 2, 2, 1], "t1 has shape [2, 2, 2, 1]: expected [2, 3, k, l]"),
        (LOHA_CORES, 5, &[2, 3], "t2 has shape [2, 3]: expected [2, 3, k, l]"),
        (LOKR_FACTORS, 3, &[4, 3], "w2_b has shape [4, 3]: expected [5, in]"),
        (LOKR_CORE, 3, &[7, 5, 1, 1], "t2 has shape [7, 5, 1, 1]: expected [5, 7, k, l]"),
        (GLORA, 0, &[5, 2], "a1 has shape [5, 2]: expected [6, 2]"),
        (GLORA, 2, &[4, 3], "b2 has shape [2, 6]: expected [3, in]"),
        (OFT, 0, &[2, 2, 3], "blocks has shape [2, 2, 3]: expected [n, b, b]"),
        (OFT, 1, &[1, 4], "rescale has shape [1, 4]: expected [4, 1]"),
        (BOFT, 0, &[1, 2, 2, 3], "blocks has shape [1, 2, 2, 3]: expected [m, n, b, b]"),
        (BOFT, 0, &[3, 2, 2, 2], "where 2^m times half of b divides n times b"),
        (BOFT, 0, &[64, 1, 1, 1], "where 2^m times half of b divides n times b"),
    ];
    for (parts, place, shape, message) in cases {
        let error = with_shape(parts, place, shape);
        assert!(matches!(error, AdapterError::Patch { .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_in_every_part() {
    for parts in [LOHA_CORES, LOKR, LOKR_CORE, GLORA, OFT, BOFT, NORM_DIFF, DIFF, SET] {
        for place in 0..parts.len() {
            let mut entries = patch(PREFIX, parts);
            entries[place].bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
            let name = entries[place].name.clone();
            let error = read_lora(file(&entries).as_slice()).unwrap_err();
            let found = if let AdapterError::Array { key, source } = &error {
                assert_eq!(*source, ArrayError::NotFinite { index: 1 });
                key
            } else if let AdapterError::Matrix { key, source } = &error {
                assert_eq!(*source, MatrixError::NotFinite { index: 1 });
                key
            } else {
                panic!("{error}")
            };
            assert_eq!(*found, name);
        }
    }
}

#[test]
fn other_element_types_are_refused_in_every_part() {
    for parts in [LOHA_CORES, LOKR_CORE, GLORA, OFT, BOFT, DIFF, SET] {
        for place in 0..parts.len() {
            let mut entries = patch(PREFIX, parts);
            entries[place].dtype = "I32";
            let error = read_lora(file(&entries).as_slice()).unwrap_err();
            assert!(matches!(error, AdapterError::UnsupportedDtype { .. }), "{error}");
        }
    }
}

#[test]
fn ranks_of_every_kind_have_the_limit() {
    // parts, their greatest rank
    for (parts, rank) in
        [(LOHA, 3), (LOHA_CORES, 3), (LOKR_FACTORS, 5), (LOKR_CORE, 7), (GLORA, 2), (GLORA_OLD, 2)]
    {
        let file = file(&patch(PREFIX, parts));
        let limits = |rank_max| Limits { rank_max, ..Limits::default() };
        let (set, _) = read_lora_with(file.as_slice(), &limits(rank)).unwrap();
        let error = read_lora_with(file.as_slice(), &limits(rank - 1)).unwrap_err();
        let canonical = PatchSet::from_bytes_with(&set.to_bytes(), &limits(rank - 1)).unwrap_err();
        for error in [error, canonical] {
            assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        }
    }
}

#[test]
fn trailing_ones_are_dropped_where_comfyui_flattens() {
    for (parts, place) in [(GLORA, 0), (GLORA, 1), (GLORA, 2), (GLORA, 3), (LOKR, 1)] {
        let mut entries = patch(PREFIX, parts);
        entries[place].shape.extend([1, 1]);
        assert_eq!(read(&entries).0.id(), read(&patch(PREFIX, parts)).0.id(), "{parts:?}");
    }
}

#[test]
fn a_patch_that_lost_is_checked_all_the_same() {
    let broken = entry(&format!("{PREFIX}.hada_w1_a"), "F32", &[1], vec![0; 4]);
    let error = read_lora(file(&[patch(PREFIX, SET), vec![broken]].concat()).as_slice());
    assert!(matches!(error, Err(AdapterError::MissingPartner { .. })), "{error:?}");
}

fn patch(prefix: &str, parts: &[(&str, &[usize])]) -> Vec<Entry> {
    let filled = |(suffix, shape): &(&str, &[usize])| {
        float32(&format!("{prefix}{suffix}"), shape, &vec![0.5; shape.iter().product()])
    };
    parts.iter().map(filled).collect()
}

/// The error of a patch whose part at `place` has another shape.
fn with_shape(parts: Parts, place: usize, shape: &[usize]) -> AdapterError {
    let mut entries = patch(PREFIX, parts);
    entries[place] =
        float32(&entries[place].name, shape, &vec![0.5; shape.iter().product::<usize>()]);
    match read_lora(file(&entries).as_slice()) {
        Err(error) => error,
        Ok((set, _)) => panic!("{parts:?} with {shape:?} at {place} became {set:?}"),
    }
}

fn names(prefix: &str, parts: &[(&str, &[usize])]) -> Vec<String> {
    let mut names: Vec<_> = parts.iter().map(|(suffix, _)| format!("{prefix}{suffix}")).collect();
    names.sort_unstable();
    names
}

fn with_unmatched(set: &PatchSet, entries: &[Entry]) -> PatchSet {
    let keys = entries.iter().map(|entry| entry.name.clone());
    PatchSet::new(set.patches().clone(), keys).unwrap()
}

#[track_caller]
fn read(entries: &[Entry]) -> (PatchSet, KeyReport) {
    read_lora(file(entries).as_slice()).unwrap()
}

fn target(name: &str) -> Target {
    name.parse().unwrap()
}

fn value(set: &PatchSet, name: &str) -> Vec<f32> {
    let patch = &set.patches()[&target(name)];
    let Patch::Diff(diff) = patch else { panic!("{patch:?}") };
    diff.value().to_f32()
}
