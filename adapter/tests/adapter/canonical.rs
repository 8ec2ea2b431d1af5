//! The canonical form: exact bytes, round trips, and nothing else accepted.

use std::collections::BTreeMap;

use luna_adapter::{
    AdapterError, Array, Boft, CanonicalError, Diff, ErrorKind, Factor, Glora, Hadamard, Kronecker,
    Limits, LowRank, Matrix, ModelAsLora, Oft, Patch, PatchKind, PatchSet, SetWeight, Slice,
    Target, read_lora,
};
use proptest::prelude::*;
use protocol::{AdapterId, Component, Dtype};
use safetensors::SafeTensors;

use crate::files::{seeded, with_header};

const TARGET: &str = "clip_l.transformer.text_projection.weight";

#[test]
fn the_layout_is_the_documented_one() {
    let bytes = small_set().to_bytes();
    let header = concat!(
        r#"{"__metadata__":{"format":"luna-adapter/1","unmatched":"te_a\nte_bb"},"#,
        r#""clip_l.transformer.text_projection.weight/lora.alpha":{"data_offsets":[0,8],"dtype":"F64","shape":[]},"#,
        r#""clip_l.transformer.text_projection.weight/lora.down":{"data_offsets":[8,16],"dtype":"F32","shape":[1,2]},"#,
        r#""clip_l.transformer.text_projection.weight/lora.up":{"data_offsets":[16,18],"dtype":"BF16","shape":[1,1]}}"#,
    );
    let padded = format!("{header:<0$}", header.len().next_multiple_of(8));
    let data = [
        &0.5_f64.to_le_bytes()[..],
        &1.0_f32.to_le_bytes(),
        &(-2.0_f32).to_le_bytes(),
        &[0x80, 0x3f],
    ];
    assert_eq!(bytes, with_header(&padded, &data.concat()));
    assert_eq!(small_set().id(), AdapterId::of(&bytes));
}

#[test]
fn the_reference_reader_takes_canonical_bytes() {
    let bytes = small_set().to_bytes();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 3);
    assert_eq!(tensors.tensor(&format!("{TARGET}/lora.down")).unwrap().shape(), [1, 2]);
}

#[test]
fn every_seeded_adapter_comes_back_from_its_bytes() {
    for name in [
        "sd15/kohya",
        "sd15/kohya_f16",
        "sd15/mid",
        "sdxl/boft",
        "sdxl/diff",
        "sdxl/diffusers",
        "sdxl/dora",
        "sdxl/glora",
        "sdxl/loha",
        "sdxl/lokr",
        "sdxl/oft",
        "sdxl/peft",
        "sdxl/proj",
        "sdxl/set",
    ] {
        let (set, _) = read_lora(seeded(name).as_slice()).unwrap();
        let bytes = set.to_bytes();
        assert_eq!(set.id(), AdapterId::of(&bytes), "{name}");
        assert_eq!(PatchSet::from_bytes(&bytes).unwrap(), set, "{name}");
    }
}

#[test]
fn the_same_content_written_otherwise_is_refused() {
    let good = small_set().to_bytes();
    let (header, data) = split(&good);
    let header = header.trim_end();
    let variants = [
        (header.to_owned(), "no padding"),
        (format!("{header}{}", " ".repeat(16)), "too much padding"),
        (header.replacen(',', ", ", 1), "a space"),
        (header.replace(r"te_a\nte_bb", r"te_bb\nte_a"), "unmatched keys out of order"),
        (header.replace(r"te_a\nte_bb", r"te_a\nte_a"), "an unmatched key twice"),
        (header.replace("te_a", r"te\u005fa"), "an escape"),
        (header.replace(r#"{"format""#, r#"{"author":"me","format""#), "more metadata"),
        (
            header.replace(
                r#""format":"luna-adapter/1","#,
                r#""format":"x","format":"luna-adapter/1","#,
            ),
            "a mark twice",
        ),
        (header.replace(r#","unmatched":"te_a\nte_bb""#, ""), "no list of unmatched keys"),
        (
            header.replace(
                r#""data_offsets":[0,8],"dtype":"F64""#,
                r#""dtype":"F64","data_offsets":[0,8]"#,
            ),
            "field order",
        ),
        (header.replace(r#""shape":[1,1]"#, r#""shape":[1,1,1]"#), "a deeper shape"),
        (header.replace(r#""shape":[]"#, r#""shape":[1]"#), "alpha as a vector"),
    ];
    for (header, what) in variants {
        let error = PatchSet::from_bytes(&with_header(&header, data)).unwrap_err();
        let refused = matches!(error, AdapterError::Canonical(CanonicalError::NotCanonical { .. }));
        assert!(refused, "{what}: {error}");
    }
}

#[test]
fn tensors_in_another_order_are_refused() {
    let good = small_set().to_bytes();
    let (header, data) = split(&good);
    let swapped = header.replace("[8,16]", "[10,18]").replace("[16,18]", "[8,10]");
    let data = [&data[..8], &data[16..], &data[8..16]].concat();
    let error = PatchSet::from_bytes(&with_header(&swapped, &data)).unwrap_err();
    assert!(
        matches!(error, AdapterError::Canonical(CanonicalError::NotCanonical { .. })),
        "{error}"
    );
}

#[test]
fn what_is_not_an_adapter_is_refused_by_name() {
    let good = small_set().to_bytes();
    let (header, data) = split(&good);
    let refusal = |from: &str, to: &str| {
        assert!(header.contains(from), "`{from}`");
        PatchSet::from_bytes(&with_header(&header.replace(from, to), data)).unwrap_err()
    };
    let cases = [
        (
            refusal("luna-adapter/1", "luna-adapter/2"),
            ErrorKind::Unsupported,
            "marked as `luna-adapter/2`",
        ),
        (refusal("luna-adapter/1", "pt"), ErrorKind::LoraRejected, "marked as `pt`"),
        (refusal("lora.alpha", "vera.alpha"), ErrorKind::Unsupported, "update Luna"),
        (refusal("lora.alpha", "lora.gamma"), ErrorKind::Unsupported, "update Luna"),
        (refusal("lora.alpha", "alpha"), ErrorKind::Unsupported, "update Luna"),
        (refusal("lora.alpha", "loha.alpha"), ErrorKind::LoraRejected, "is of another kind"),
        (
            refusal("/lora.alpha", ".lora.alpha"),
            ErrorKind::LoraRejected,
            "is not `TARGET/KIND.PART`",
        ),
        (refusal("/lora.up", "/lora.mid"), ErrorKind::LoraRejected, "/lora.up` is missing"),
        (
            refusal("clip_l", "clip_x"),
            ErrorKind::LoraRejected,
            "is not a parameter of a text encoder",
        ),
        (
            refusal("text_projection.weight", "text_model.final_layer_norm.bias"),
            ErrorKind::LoraRejected,
            "is not a weight",
        ),
        (
            refusal(r#""F64","shape":[]"#, r#""I64","shape":[]"#),
            ErrorKind::LoraRejected,
            "alpha must be one finite number",
        ),
        (refusal("te_a", "te a"), ErrorKind::LoraRejected, "key `te a` is not usable"),
        (
            refusal("weight/lora.alpha", "weight[0:0:1]/lora.alpha"),
            ErrorKind::LoraRejected,
            "is missing",
        ),
        (
            refusal("weight/", "weight[0:00:1]/"),
            ErrorKind::LoraRejected,
            "is not a parameter of a text encoder",
        ),
    ];
    for (error, kind, message) in cases {
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.kind(), kind, "{error}");
    }
    let lora_file = PatchSet::from_bytes(&seeded("sd15/kohya")).unwrap_err();
    assert!(
        matches!(lora_file, AdapterError::Canonical(CanonicalError::Format { .. })),
        "{lora_file}"
    );
}

#[test]
fn limits_hold_for_canonical_bytes() {
    let limits = Limits { rank_max: 3, ..Limits::default() };
    let bytes = read_lora(seeded("sd15/peft").as_slice()).unwrap().0.to_bytes();
    let error = PatchSet::from_bytes_with(&bytes, &limits).unwrap_err();
    assert!(matches!(error, AdapterError::RankTooLarge { rank: 4, limit: 3, .. }), "{error}");
}

#[test]
fn a_patch_that_changes_nothing_has_a_mark_without_elements() {
    let set = on_bias(Patch::Unchanged);
    let bytes = set.to_bytes();
    let header = concat!(
        r#"{"__metadata__":{"format":"luna-adapter/1","unmatched":""},"#,
        r#""clip_g.transformer.text_model.final_layer_norm.bias/none.mark":{"data_offsets":[0,0],"dtype":"F32","shape":[0]}}"#,
    );
    assert_eq!(bytes, with_header(&format!("{header:<0$}", header.len().next_multiple_of(8)), &[]));
    assert_eq!(PatchSet::from_bytes(&bytes).unwrap(), set);
    assert_eq!(set.patches().values().next().unwrap().kind(), PatchKind::Unchanged);
}

#[test]
fn a_slice_is_part_of_the_name_and_overlaps_are_refused() {
    let slices = ["[0:768:768]", "[0:0:768]"];
    let target = |slice: &str| format!("{TARGET}{slice}").parse::<Target>().unwrap();
    let patches = slices.map(|slice| (target(slice), Patch::Unchanged));
    let set = PatchSet::new(BTreeMap::from(patches), []).unwrap();
    let bytes = set.to_bytes();
    let (header, _) = split(&bytes);
    assert!(header.contains(&format!("\"{TARGET}[0:768:768]/none.mark\"")), "{header}");
    assert_eq!(PatchSet::from_bytes(&bytes).unwrap(), set);

    let crossing = header.replace("[0:768:768]", "[0:767:768]");
    let error = PatchSet::from_bytes(&with_header(&crossing, &[])).unwrap_err();
    assert!(matches!(error, AdapterError::Overlap { .. }), "{error}");
}

#[test]
fn a_mark_with_elements_or_of_another_type_is_refused() {
    let good = on_bias(Patch::Unchanged).to_bytes();
    let (header, _) = split(&good);
    for (shape, data) in [("[1]", &[0; 4][..]), ("[]", &[0; 4]), ("[0,1]", &[]), ("[0,0]", &[])] {
        let changed =
            header.replace("[0]", shape).replace("[0,0],", &format!("[0,{}],", data.len()));
        let error = PatchSet::from_bytes(&with_header(&changed, data)).unwrap_err();
        assert!(matches!(error, AdapterError::Shape { .. }), "{shape}: {error}");
    }
    for (dtype, kind) in [("F16", ErrorKind::LoraRejected), ("I64", ErrorKind::Unsupported)] {
        let changed = header.replace("F32", dtype);
        let error = PatchSet::from_bytes(&with_header(&changed, &[])).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[test]
fn the_weight_of_another_model_is_content_of_its_own() {
    let value = Array::new(Dtype::Float16, &[2], vec![0, 0x3c, 0, 0]).unwrap();
    let sets = [
        on_bias(Patch::ModelAsLora(ModelAsLora::new(value.clone()))),
        on_bias(Patch::Diff(Diff::new(value.clone()))),
        on_bias(Patch::Set(SetWeight::new(value))),
    ];
    assert!(sets[0].id() != sets[1].id() && sets[0].id() != sets[2].id());
    let bytes = sets[0].to_bytes();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let name = "clip_g.transformer.text_model.final_layer_norm.bias/model_as_lora.value";
    assert_eq!(tensors.tensor(name).unwrap().shape(), [2]);
    assert_eq!(PatchSet::from_bytes(&bytes).unwrap(), sets[0]);
}

#[test]
fn numbers_and_types_are_checked_in_canonical_bytes_too() {
    let good = small_set().to_bytes();
    let (header, data) = split(&good);
    // place of the number, its bytes, the tensor that the error names
    let cases: [(usize, &[u8], &str); 4] = [
        (0, &f64::NAN.to_le_bytes(), "/lora.alpha` is NaN"),
        (0, &f64::INFINITY.to_le_bytes(), "/lora.alpha` is inf"),
        (12, &f32::NEG_INFINITY.to_le_bytes(), "/lora.down`: element 1 is not finite"),
        (16, &[0xc0, 0x7f], "/lora.up`: element 0 is not finite"),
    ];
    for (place, number, message) in cases {
        let mut data = data.to_vec();
        data[place..place + number.len()].copy_from_slice(number);
        let error = PatchSet::from_bytes(&with_header(header, &data)).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.kind(), ErrorKind::LoraRejected);
    }
    let integers = header.replace(r#""F32""#, r#""I32""#);
    let error = PatchSet::from_bytes(&with_header(&integers, data)).unwrap_err();
    assert!(matches!(error, AdapterError::UnsupportedDtype { .. }), "{error}");
}

#[test]
fn a_million_unmatched_keys_are_refused() {
    let keys = "a\\n".repeat(1_000_000) + "a";
    let header =
        format!(r#"{{"__metadata__":{{"format":"luna-adapter/1","unmatched":"{keys}"}}}}"#);
    let error = PatchSet::from_bytes(&with_header(&header, &[])).unwrap_err();
    assert!(matches!(error, AdapterError::TooManyUnmatched), "{error}");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

proptest! {
    #[test]
    fn any_adapter_comes_back_from_its_bytes(set in any_set()) {
        let bytes = set.to_bytes();
        prop_assert_eq!(set.id(), AdapterId::of(&bytes));
        let back = PatchSet::from_bytes(&bytes).unwrap();
        prop_assert_eq!(back.to_bytes(), bytes);
        prop_assert_eq!(back, set);
    }

    #[test]
    fn different_adapters_have_different_bytes(one in any_set(), other in any_set()) {
        prop_assert_eq!(one == other, one.to_bytes() == other.to_bytes());
    }

    #[test]
    fn one_changed_byte_is_refused_or_is_another_adapter(set in any_set(), place: prop::sample::Index, flip in 1_u8..) {
        let mut bytes = set.to_bytes();
        let place = place.index(bytes.len());
        bytes[place] ^= flip;
        if let Ok(other) = PatchSet::from_bytes(&bytes) {
            prop_assert_eq!(other.to_bytes(), bytes);
            prop_assert_ne!(other, set);
        }
    }
}

fn on_bias(patch: Patch) -> PatchSet {
    let bias = "clip_g.transformer.text_model.final_layer_norm.bias";
    PatchSet::new(BTreeMap::from([(bias.parse().unwrap(), patch)]), []).unwrap()
}

/// One patch of rank 1, with every feature but `mid`, and two unmatched keys.
fn small_set() -> PatchSet {
    let up = Matrix::new(Dtype::Bfloat16, 1, 1, vec![0x80, 0x3f]).unwrap();
    let down = [1.0_f32.to_le_bytes(), (-2.0_f32).to_le_bytes()].concat();
    let down = Matrix::new(Dtype::Float32, 1, 2, down).unwrap();
    let patch = Patch::LowRank(LowRank::new(up, down, None, Some(0.5)).unwrap());
    let patches = BTreeMap::from([(TARGET.parse::<Target>().unwrap(), patch)]);
    PatchSet::new(patches, ["te_bb", "te_a"].map(String::from)).unwrap()
}

fn split(file: &[u8]) -> (&str, &[u8]) {
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length).try_into().unwrap());
    (std::str::from_utf8(header).unwrap(), data)
}

/// Up to three patches of any kinds, on weights and slices of them.
pub(crate) fn any_set() -> impl Strategy<Value = PatchSet> {
    let patches = prop::collection::btree_map(any_target(), any_patch(), 0..4);
    let unmatched = prop::collection::vec("te_[a-z0-9._]{0,8}", 0..4);
    (patches, unmatched).prop_map(|(mut patches, unmatched)| {
        // A whole parameter and a slice of it never meet in one adapter.
        let whole: Vec<_> = patches.keys().filter(|t| t.slice().is_none()).cloned().collect();
        patches.retain(|target, _| target.slice().is_none() || !whole.contains(&target.whole()));
        PatchSet::new(patches, unmatched).unwrap()
    })
}

fn any_target() -> impl Strategy<Value = Target> {
    let component = prop::sample::select(vec![Component::ClipL, Component::ClipG]);
    let module = prop::sample::select(vec!["mlp.fc1", "self_attn.q_proj", "layer_norm1"]);
    // Slices of one place do not overlap with those of another.
    let slice = prop::option::of(0..5_usize);
    (component, 0..32, module, slice).prop_map(|(component, layer, module, slice)| {
        let parameter = format!("text_model.encoder.layers.{layer}.{module}.weight");
        let target = Target::new(component, &parameter).unwrap();
        match slice {
            Some(place) => target.with_slice(Slice::new(0, 10 * place, 10 - place).unwrap()),
            None => target,
        }
    })
}

/// A patch of any kind.
fn any_patch() -> impl Strategy<Value = Patch> {
    let alpha = prop::option::of(prop::num::f64::NORMAL | prop::num::f64::ZERO);
    let sizes = (1..4_usize, 1..4_usize, 1..4_usize);
    (sizes, alpha, any::<[bool; 2]>()).prop_flat_map(
        |((rows, rank, cols), alpha, [first, second])| {
            prop_oneof![
                any_low_rank([rows, rank, cols], first, alpha),
                any_hadamard([rows, rank, cols], first, alpha),
                any_kronecker([rows, rank, cols], [first, second], alpha),
                any_glora([rows, rank, cols], first, alpha),
                any_rotation([rows, rank], [first, second], alpha),
                any_array(vec![rows, rank, cols]).prop_map(|value| Patch::Diff(Diff::new(value))),
                any_array(vec![rows]).prop_map(|value| Patch::Set(SetWeight::new(value))),
                any_array(vec![rows, cols])
                    .prop_map(|value| Patch::ModelAsLora(ModelAsLora::new(value))),
                Just(Patch::Unchanged),
            ]
        },
    )
}

fn any_low_rank(
    [rows, rank, cols]: [usize; 3],
    has_mid: bool,
    alpha: Option<f64>,
) -> impl Strategy<Value = Patch> {
    let mid = optional(has_mid, any_matrix(rank, rank));
    let scale = prop::option::of(any_matrix(rows, 1));
    (any_matrix(rows, rank), any_matrix(rank, cols), mid, scale).prop_map(
        move |(up, down, mid, scale)| {
            let patch = LowRank::new(up, down, mid, alpha).unwrap();
            Patch::LowRank(match scale {
                Some(scale) => patch.with_dora_scale(scale).unwrap(),
                None => patch,
            })
        },
    )
}

fn any_hadamard(
    [rows, rank, cols]: [usize; 3],
    has_cores: bool,
    alpha: Option<f64>,
) -> impl Strategy<Value = Patch> {
    let [a_rows, a_cols] = if has_cores { [rank, rows] } else { [rows, rank] };
    let pair = move || [any_matrix(a_rows, a_cols).boxed(), any_matrix(rank, cols).boxed()];
    let core = move || any_array(vec![rank, rank, 2, 1]);
    let cores = optional(has_cores, [core(), core()]);
    (pair(), pair(), cores, any_matrix(rows, 1)).prop_map(move |(w1, w2, cores, scale)| {
        let patch = Hadamard::new(w1, w2, cores, alpha).unwrap();
        Patch::Hadamard(patch.with_dora_scale(scale).unwrap())
    })
}

fn any_kronecker(
    [rows, rank, cols]: [usize; 3],
    [is_full, has_core]: [bool; 2],
    alpha: Option<f64>,
) -> impl Strategy<Value = Patch> {
    let [a_rows, a_cols] = if has_core { [rank, rows] } else { [rows, rank] };
    let full = any_matrix(rows, cols).prop_map(Factor::Full).boxed();
    let factors = |a_rows, a_cols| {
        let pair = (any_matrix(a_rows, a_cols), any_matrix(rank, cols));
        pair.prop_map(|(a, b)| Factor::LowRank { a, b }).boxed()
    };
    let core = optional(has_core && !is_full, any_array(vec![rank, rank, 1, 2]));
    let w2 = if is_full { full.clone() } else { factors(a_rows, a_cols) };
    (prop_oneof![full, factors(rows, rank)], w2, core).prop_map(move |(w1, w2, core)| {
        Patch::Kronecker(Kronecker::new(w1, w2, core, alpha).unwrap())
    })
}

fn any_glora(
    [rows, rank, cols]: [usize; 3],
    is_old: bool,
    alpha: Option<f64>,
) -> impl Strategy<Value = Patch> {
    let a = [any_matrix(cols, rank).boxed(), any_matrix(rank, cols).boxed()];
    let b = [any_matrix(rows, rank).boxed(), any_matrix(rank, cols).boxed()];
    (a, b).prop_map(move |([a1, a2], [b1, b2])| {
        let (a, b) = if is_old { ([a2, a1], [b2, b1]) } else { ([a1, a2], [b1, b2]) };
        Patch::Glora(Glora::new(a, b, alpha).unwrap())
    })
}

fn any_rotation(
    [count, pairs]: [usize; 2],
    [is_butterfly, has_rescale]: [bool; 2],
    alpha: Option<f64>,
) -> impl Strategy<Value = Patch> {
    let size = 2 * pairs;
    let mut shape = vec![count, size, size];
    if is_butterfly {
        shape.insert(0, 1);
    }
    let rescale = optional(has_rescale, any_array(vec![count * size, 1]));
    (any_array(shape), rescale, any_matrix(1, 5)).prop_map(move |(blocks, rescale, scale)| {
        if is_butterfly {
            Patch::Boft(Boft::new(blocks, rescale, alpha).unwrap())
        } else {
            let patch = Oft::new(blocks, rescale, alpha).unwrap();
            Patch::Oft(patch.with_dora_scale(scale).unwrap())
        }
    })
}

fn optional<S: Strategy>(is_there: bool, strategy: S) -> impl Strategy<Value = Option<S::Value>>
where
    S::Value: Clone,
{
    strategy.prop_map(move |value| is_there.then_some(value))
}

fn any_matrix(rows: usize, cols: usize) -> impl Strategy<Value = Matrix> {
    let dtype = prop::sample::select(vec![Dtype::Float32, Dtype::Float16, Dtype::Bfloat16]);
    dtype.prop_flat_map(move |dtype| {
        // 0x3f.. in the upper byte is finite in every type.
        let bytes = prop::collection::vec(0_u8..0x40, rows * cols * dtype.bytes());
        bytes.prop_map(move |bytes| Matrix::new(dtype, rows, cols, bytes).unwrap())
    })
}

fn any_array(shape: Vec<usize>) -> impl Strategy<Value = Array> {
    any_matrix(1, shape.iter().product())
        .prop_map(move |row| Array::new(row.dtype(), &shape, row.bytes().to_vec()).unwrap())
}
