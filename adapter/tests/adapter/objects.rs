//! Adapters made of ComfyUI's patch objects: the same as those made of files, and typed refusals.

use std::collections::BTreeMap;

use luna_adapter::{
    AdapterError, Array, CanonicalError, Element, ErrorKind, Factor, FileError, Limits, Matrix,
    ObjectError, ObjectReport, Patch, PatchKind, PatchObject, PatchSet, TensorView, read_lora,
    read_objects, read_objects_with,
};
use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::{
    canonical::any_set,
    files::{file, pair, seeded},
};

const FC1: &str = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight";
const BIAS: &str = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.bias";

/// Enough elements for the shapes below.
const HALVES: [u8; 2048] = [0x38; 2048];
const ABSENT: Element<'static> = Element::Absent;

#[test]
fn objects_and_files_of_one_content_are_one_adapter() {
    let of_both = [
        "kohya",
        "kohya_f16",
        "peft",
        "diffusers",
        "loha",
        "lokr",
        "dora",
        "diff",
        "set",
        "glora",
        "oft",
        "boft",
        "mid",
    ];
    let names = of_both.iter().flat_map(|name| [format!("sd15/{name}"), format!("sdxl/{name}")]);
    for name in names.chain(["sdxl/proj".to_owned(), "sdxl/sd1names".to_owned()]) {
        let bytes = seeded(&name);
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (set, report) = with_objects(&tensors, |objects| read_objects(objects).unwrap());
        let (from_file, key_report) = read_lora(bytes.as_slice()).unwrap();
        assert_eq!(set.id(), from_file.id(), "{name}");
        assert_eq!(set, from_file, "{name}");
        assert_eq!((report.targets, report.unmatched), (key_report.targets, Vec::new()), "{name}");
        // Each patch of the image model has an up and a down and no effect here.
        let images = key_report.ignored_keys / 2;
        assert_eq!(report.foreign, images, "{name}");
    }
}

#[test]
fn a_kohya_file_its_peft_spelling_and_objects_are_one_adapter() {
    let kohya = pair(
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        [".lora_up.weight", ".lora_down.weight"],
        0.5,
    );
    let peft = pair(
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        [".lora_B.weight", ".lora_A.weight"],
        0.5,
    );
    let ids = [&kohya, &peft].map(|pair| read_lora(file(pair).as_slice()).unwrap().0.id());
    let [up, down] = [&kohya[0], &kohya[1]].map(|entry| {
        let view = TensorView { dtype: "float32", shape: &entry.shape, bytes: &entry.bytes };
        Element::Tensor(view)
    });
    let objects = [lora(&[up, down, ABSENT, ABSENT, ABSENT, ABSENT])];
    assert_eq!(ids, [read(&objects).0.id(); 2]);
}

#[test]
fn foreign_targets_are_counted_and_not_looked_into() {
    let broken = vec![Element::Other("list"); 9];
    let foreign = [
        "diffusion_model.input_blocks.1.1.proj_in.weight",
        "t5xxl.transformer.shared.weight",
        "clip_l.logit_scale",
    ];
    let mut objects =
        foreign.map(|target| PatchObject { target, ..object("config", broken.clone()) }).to_vec();
    assert_eq!(read(&objects).1, ObjectReport { foreign: 3, ..ObjectReport::default() });
    assert!(read(&objects).0.is_empty());
    objects.push(diff(halves(&[2, 2])));
    assert_eq!((read(&objects).0.patches().len(), read(&objects).1.foreign), (1, 3));
}

#[test]
fn targets_that_no_model_has_are_unmatched() {
    let stray = ["clip_l.transformer.text_model.encoder.layers.99.mlp.fc1.weight", "clip_g.x"];
    let mut objects = stray.map(|target| PatchObject { target, ..diff(halves(&[1])) }).to_vec();
    let error = read_objects(&objects).unwrap_err();
    assert!(matches!(error, AdapterError::NothingMatches { count: 2, .. }), "{error}");
    // ComfyUI keeps offsets apart from names.
    let sliced = format!("{FC1}[0:0:1]");
    objects.push(PatchObject { target: &sliced, ..diff(halves(&[1])) });
    objects.push(diff(halves(&[2, 2])));
    let (set, report) = read(&objects);
    assert_eq!(report.unmatched, [stray[1], &sliced, stray[0]]);
    assert_eq!((set.unmatched(), set.patches().len()), (report.unmatched.as_slice(), 1));
}

#[test]
fn patches_that_no_file_has_are_taken() {
    let patch_of = |object: PatchObject<'_>| {
        let (set, _) = read(&[object]);
        assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set);
        set.into_patches().into_iter().next().unwrap()
    };
    assert_eq!(patch_of(diff(ABSENT)).1, Patch::Unchanged);
    let on_bias = PatchObject { target: BIAS, ..diff(ABSENT) };
    assert_eq!(patch_of(on_bias).0.to_string(), BIAS);
    let other = object("model_as_lora", vec![halves(&[2, 2])]);
    assert_eq!(patch_of(other).1.kind(), PatchKind::ModelAsLora);
    let unpadded = object("diff", vec![halves(&[2, 2]), Element::PadWeight(false)]);
    assert_eq!(patch_of(unpadded), patch_of(diff(halves(&[2, 2]))));
}

#[test]
fn an_offset_is_the_slice_of_its_target() {
    let at = |offset| PatchObject { offset: Some(offset), ..diff(halves(&[2, 2])) };
    let (set, report) = read(&[at([0, 2, 2]), at([0, 0, 2])]);
    let names: Vec<_> = report.targets.iter().map(ToString::to_string).collect();
    assert_eq!(names, [format!("{FC1}[0:0:2]"), format!("{FC1}[0:2:2]")]);
    assert_eq!(set.patches().len(), 2);

    for offset in [[-1, 0, 2], [0, -2, 2], [0, 0, -1], [0, 0, 0], [4, 0, 1], [0, i64::MAX, 1]] {
        let error = read_objects(&[at(offset)]).unwrap_err();
        let is_offset =
            matches!(error, AdapterError::Object { source: ObjectError::Offset(_), .. });
        assert!(is_offset, "{error}");
        let [dim, start, length] = offset;
        assert!(error.to_string().contains(&format!("`[{dim}:{start}:{length}]`")), "{error}");
    }
    for objects in [
        [at([0, 0, 2]), at([0, 1, 2])],
        [at([0, 0, 2]), at([0, 0, 2])],
        [at([1, 0, 2]), at([0; 3])],
    ] {
        let error = read_objects(&objects).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LoraRejected, "{error}");
    }
    let twice = [diff(halves(&[2, 2])), diff(ABSENT)];
    let error = read_objects(&twice).unwrap_err();
    assert!(matches!(error, AdapterError::Overlap { .. }), "{error}");
}

#[test]
fn what_comfyui_does_not_look_at_is_left_out() {
    let number = |value| Element::Scalar(value);
    let (whole, broken) = (halves(&[2, 2]), halves(&[7]));
    let factors = [broken; 5];
    let lokr = [&[whole, whole, number(3.0)], factors.as_slice(), &[ABSENT]].concat();
    let alone = [&[whole, whole, number(3.0)], [ABSENT; 6].as_slice()].concat();
    assert_eq!(read(&[object("lokr", lokr)]).0, read(&[object("lokr", alone)]).0);

    let loha = |t2| object("loha", vec![whole, whole, ABSENT, whole, whole, ABSENT, t2, ABSENT]);
    assert_eq!(read(&[loha(broken)]).0, read(&[loha(ABSENT)]).0);
}

#[test]
fn objects_that_are_not_patches_are_refused_by_name() {
    let (up, down, one) = (halves(&[4, 2]), halves(&[2, 3]), Element::Scalar(1.0));
    let lora = |changes: &[(usize, Element<'static>)]| {
        let mut weights = [up, down, one, ABSENT, ABSENT, ABSENT];
        for (place, element) in changes {
            weights[*place] = *element;
        }
        lora(&weights)
    };
    let float64 = TensorView { dtype: "float64", shape: &[4, 2], bytes: &HALVES[..64] };
    let short = TensorView { dtype: "float16", shape: &[4, 2], bytes: &HALVES[..14] };
    let nan = TensorView { dtype: "float16", shape: &[1], bytes: &[0, 0x7e] };
    let rejected = ErrorKind::LoraRejected;
    let unsupported = ErrorKind::Unsupported;
    let cases = [
        (object("config", vec![]), unsupported, "kind `config` is not known"),
        (object("none", vec![]), unsupported, "kind `none` is not known"),
        (object("lora", vec![up, down]), rejected, "LoRA has 2 weights: expected 6"),
        (object("diff", vec![]), rejected, "has 0 weights: expected 1"),
        (object("set", vec![up, up]), rejected, "has 2 weights: expected 1"),
        (object("set", vec![ABSENT]), rejected, "/set.value` is missing"),
        (lora(&[(0, ABSENT)]), rejected, "/lora.up` is missing"),
        (lora(&[(0, one)]), rejected, "up is a number: expected a tensor"),
        (lora(&[(1, Element::PadWeight(true))]), rejected, "down is a dict: expected a tensor"),
        (lora(&[(2, Element::Other("a str"))]), rejected, "alpha is a str: expected a number"),
        (lora(&[(2, Element::Scalar(f64::NAN))]), rejected, "alpha must be one finite number"),
        (lora(&[(2, up)]), rejected, "expected a single number"),
        (lora(&[(3, halves(&[2, 2]))]), rejected, "expected [rank, rank, 1, 1]"),
        (lora(&[(3, halves(&[2, 1, 2, 1]))]), rejected, "expected [rank, rank, 1, 1]"),
        (lora(&[(4, halves(&[4]))]), rejected, "expected two dimensions"),
        (lora(&[(5, Element::Other("a list"))]), unsupported, "is a reshape_weight key"),
        (lora(&[(1, halves(&[3, 3]))]), rejected, "up [4, 2] and down [3, 3] do not fit"),
        (lora(&[(0, Element::Tensor(float64))]), unsupported, "elements of type float64"),
        (lora(&[(0, Element::Tensor(short))]), rejected, "does not fit its data offsets"),
        (diff(Element::Tensor(nan)), rejected, "element 0 is not finite"),
        (diff(halves(&[1; 5])), rejected, "expected one to four dimensions"),
        (object("diff", vec![up, Element::PadWeight(true)]), unsupported, "pad_weight is set"),
        (object("diff", vec![up, one]), rejected, "pad_weight is not a dict"),
        (PatchObject { target: BIAS, ..lora(&[]) }, rejected, "is not a weight"),
        (object("oft", vec![halves(&[1, 2, 2, 2]), ABSENT, ABSENT, ABSENT]), rejected, "blocks"),
    ];
    for (object, kind, message) in cases {
        let error = read_objects(&[object]).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.kind(), kind, "{error}");
    }
    let missing = read_objects(&[lora(&[(0, ABSENT)])]).unwrap_err();
    assert!(matches!(missing, AdapterError::Canonical(CanonicalError::MissingPart { .. })));
}

#[test]
fn limits_hold_for_objects_before_any_tensor_is_copied() {
    let shapes = |rank| [[1, rank], [rank, 1]];
    let (small, largest, large) = (shapes(2), shapes(512), shapes(513));
    let rank = |[up, down]: &[[usize; 2]; 2], limits: Limits| {
        let object = lora(&[halves(up), halves(down), ABSENT, ABSENT, ABSENT, ABSENT]);
        read_objects_with(&[object], &limits)
    };
    assert!(rank(&largest, Limits::default()).is_ok());
    let error = rank(&large, Limits::default()).unwrap_err();
    assert!(matches!(error, AdapterError::RankTooLarge { rank: 513, limit: 512, .. }), "{error}");

    let error = rank(&small, Limits { tensors_max: 1, ..Limits::default() }).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::TooManyTensors { limit: 1 })), "{error}");
    let error = rank(&small, Limits { file_bytes_max: 7, ..Limits::default() }).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::TooLarge { bytes: 8, limit: 7 })));
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

proptest! {
    #[test]
    fn any_adapter_comes_back_from_its_objects(set in any_set()) {
        let owned: Vec<_> = set.patches().values().map(tuple_of).collect();
        let names: Vec<_> = set.patches().keys().map(|target| target.whole().to_string()).collect();
        let offsets = set.patches().keys().map(|target| {
            let index = |size| i64::try_from(size).unwrap();
            target.slice().map(|s| [index(s.dim()), index(s.start()), index(s.length())])
        });
        let objects: Vec<_> = names.iter().zip(offsets).zip(&owned).map(|((target, offset), (kind, slots))| {
            let weights = slots.iter().map(Slot::element).collect();
            PatchObject { target, offset, kind, weights }
        }).collect();
        let patches = read(&objects).0.into_patches();
        prop_assert_eq!(patches, set.into_patches());
    }
}

/// An element that owns what it holds.
enum Slot {
    Absent,
    Scalar(f64),
    Tensor(String, Vec<usize>, Vec<u8>),
}

impl Slot {
    fn element(&self) -> Element<'_> {
        match self {
            Self::Absent => Element::Absent,
            Self::Scalar(value) => Element::Scalar(*value),
            Self::Tensor(dtype, shape, bytes) => {
                Element::Tensor(TensorView { dtype, shape, bytes })
            }
        }
    }
}

/// The kind and the tuple of a patch, as ComfyUI 0.3.64 has them.
fn tuple_of(patch: &Patch) -> (&'static str, Vec<Slot>) {
    let alpha = || patch.alpha().map_or(Slot::Absent, Slot::Scalar);
    let dora = || optional(patch.dora_scale());
    match patch {
        Patch::LowRank(p) => {
            let mid = p.mid().map_or(Slot::Absent, |mid| {
                let shape = [mid.shape().as_slice(), &[1, 1]].concat();
                Slot::Tensor(mid.dtype().to_string(), shape, mid.bytes().to_vec())
            });
            let slots = vec![matrix(p.up()), matrix(p.down()), alpha(), mid, dora(), Slot::Absent];
            ("lora", slots)
        }
        Patch::Hadamard(p) => {
            let (first, second) = ([p.w1_a(), p.w1_b()], [p.w2_a(), p.w2_b()]);
            let mut slots = first.map(matrix).into_iter().chain([alpha()]).collect::<Vec<_>>();
            slots.extend(second.map(matrix));
            slots.extend([p.t1(), p.t2()].map(|core| core.map_or(Slot::Absent, array)));
            slots.push(dora());
            ("loha", slots)
        }
        Patch::Kronecker(p) => {
            let ([w1, w1_a, w1_b], [w2, w2_a, w2_b]) = (factor(p.w1()), factor(p.w2()));
            let t2 = p.t2().map_or(Slot::Absent, array);
            ("lokr", vec![w1, w2, alpha(), w1_a, w1_b, w2_a, w2_b, t2, dora()])
        }
        Patch::Glora(p) => {
            let matrices = [p.a1(), p.a2(), p.b1(), p.b2()].map(matrix);
            ("glora", matrices.into_iter().chain([alpha(), dora()]).collect())
        }
        Patch::Oft(p) => {
            let rescale = p.rescale().map_or(Slot::Absent, array);
            ("oft", vec![array(p.blocks()), rescale, alpha(), dora()])
        }
        Patch::Boft(p) => {
            let rescale = p.rescale().map_or(Slot::Absent, array);
            ("boft", vec![array(p.blocks()), rescale, alpha(), dora()])
        }
        Patch::Diff(p) => ("diff", vec![array(p.value())]),
        Patch::Set(p) => ("set", vec![array(p.value())]),
        Patch::ModelAsLora(p) => ("model_as_lora", vec![array(p.value())]),
        Patch::Unchanged => ("diff", vec![Slot::Absent]),
    }
}

fn matrix(matrix: &Matrix) -> Slot {
    Slot::Tensor(matrix.dtype().to_string(), matrix.shape().to_vec(), matrix.bytes().to_vec())
}

fn optional(scale: Option<&Matrix>) -> Slot {
    scale.map_or(Slot::Absent, matrix)
}

fn array(array: &Array) -> Slot {
    Slot::Tensor(array.dtype().to_string(), array.shape().to_vec(), array.bytes().to_vec())
}

/// The whole matrix, or its two factors.
fn factor(factor: &Factor) -> [Slot; 3] {
    match factor {
        Factor::Full(whole) => [matrix(whole), Slot::Absent, Slot::Absent],
        Factor::LowRank { a, b } => [Slot::Absent, matrix(a), matrix(b)],
    }
}

fn read(objects: &[PatchObject<'_>]) -> (PatchSet, ObjectReport) {
    read_objects(objects).unwrap()
}

fn object<'a>(kind: &'a str, weights: Vec<Element<'a>>) -> PatchObject<'a> {
    PatchObject { target: FC1, offset: None, kind, weights }
}

fn lora<'a>(weights: &[Element<'a>; 6]) -> PatchObject<'a> {
    object("lora", weights.to_vec())
}

fn diff(value: Element<'_>) -> PatchObject<'_> {
    object("diff", vec![value])
}

/// A tensor of 0.5 in f16.
fn halves(shape: &[usize]) -> Element<'_> {
    let bytes = &HALVES[..2 * shape.iter().product::<usize>()];
    Element::Tensor(TensorView { dtype: "float16", shape, bytes })
}

/// Calls `use_objects` with what ComfyUI's `load_lora` makes of a seeded file.
fn with_objects<R>(file: &SafeTensors<'_>, use_objects: impl FnOnce(&[PatchObject<'_>]) -> R) -> R {
    let mut groups: BTreeMap<&str, BTreeMap<&str, _>> = BTreeMap::new();
    for (name, tensor) in file.iter() {
        let at = ENDINGS.iter().find_map(|ending| name.find(ending)).unwrap();
        groups.entry(&name[..at]).or_default().insert(&name[at..], tensor);
    }
    let targets: Vec<_> = groups.keys().map(|prefix| target_of(prefix)).collect();
    let biases: Vec<_> = targets.iter().map(|name| name.replace(".weight", ".bias")).collect();
    let mut objects = Vec::new();
    for ((group, target), bias) in groups.values().zip(&targets).zip(&biases) {
        let element = |suffix: &str| match (suffix, group.get(suffix)) {
            (_, None) => ABSENT,
            (".alpha", Some(alpha)) => {
                Element::Scalar(f32::from_le_bytes(alpha.data().try_into().unwrap()).into())
            }
            (_, Some(view)) => {
                let is_half = view.dtype() == safetensors::Dtype::F16;
                let dtype = if is_half { "float16" } else { "float32" };
                Element::Tensor(TensorView { dtype, shape: view.shape(), bytes: view.data() })
            }
        };
        for (kind, slots) in TUPLES {
            let dimensions = group.get(".oft_blocks").map(|blocks| blocks.shape().len());
            let is_other = dimensions.is_some_and(|d| d != if *kind == "oft" { 3 } else { 4 });
            let is_there = slots.iter().any(|slot| *slot != ".alpha" && group.contains_key(slot));
            if is_there && !is_other {
                let target =
                    if slots[0].ends_with("_b") || slots[0] == ".b_norm" { bias } else { target };
                let weights = slots.iter().map(|slot| element(slot)).collect();
                objects.push(PatchObject { target, offset: None, kind, weights });
            }
        }
    }
    use_objects(&objects)
}

/// The tuples of ComfyUI 0.3.64 by the suffixes of the seeded files.
const TUPLES: &[(&str, &[&str])] = &[
    (
        "lora",
        &[".lora_up.weight", ".lora_down.weight", ".alpha", ".lora_mid.weight", ".dora_scale", ""],
    ),
    ("lora", &[".lora_B.weight", ".lora_A.weight", ".alpha", "", "", ""]),
    ("lora", &["_lora.up.weight", "_lora.down.weight", ".alpha", "", "", ""]),
    ("lora", &[".lora.up.weight", ".lora.down.weight", ".alpha", "", "", ""]),
    (
        "lora",
        &[".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", ".alpha", "", "", ""],
    ),
    ("lora", &[".lora_B.default.weight", ".lora_A.default.weight", ".alpha", "", "", ""]),
    ("lora", &[".lora_B", ".lora_A", ".alpha", "", "", ""]),
    ("loha", &[".hada_w1_a", ".hada_w1_b", ".alpha", ".hada_w2_a", ".hada_w2_b", "", "", ""]),
    (
        "lokr",
        &[
            ".lokr_w1",
            ".lokr_w2",
            ".alpha",
            ".lokr_w1_a",
            ".lokr_w1_b",
            ".lokr_w2_a",
            ".lokr_w2_b",
            "",
            "",
        ],
    ),
    ("glora", &[".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".alpha", ""]),
    ("oft", &[".oft_blocks", ".rescale", ".alpha", ""]),
    ("boft", &[".oft_blocks", ".rescale", ".alpha", ""]),
    ("diff", &[".diff"]),
    ("diff", &[".w_norm"]),
    ("diff", &[".diff_b"]),
    ("diff", &[".b_norm"]),
    ("set", &[".set_weight"]),
];

/// Where a suffix begins.
const ENDINGS: &[&str] = &[
    "_lora.", ".lora", ".alpha", ".dora", ".hada", ".lokr", ".a1.", ".a2.", ".b1.", ".b2.", ".oft",
    ".rescale", ".diff", ".w_norm", ".b_norm", ".set",
];

/// The internal name for the beginning of a seeded file's keys.
fn target_of(prefix: &str) -> String {
    if prefix.starts_with("lora_unet_") {
        return "diffusion_model.input_blocks.1.1.proj_in.weight".to_owned();
    }
    if let Some(internal) = prefix.strip_prefix("text_encoders.") {
        return format!("{internal}.weight");
    }
    let is_clip_g = prefix.starts_with("lora_te2_") || prefix.starts_with("text_encoder_2.");
    let component = if is_clip_g { "clip_g" } else { "clip_l" };
    let module = &prefix[prefix.find("text_").unwrap()..];
    let module = module.strip_prefix("text_encoder.").unwrap_or(module);
    let module = module.strip_prefix("text_encoder_2.").unwrap_or(module);
    let dotted = [
        ("text_model_encoder_layers_", "text_model.encoder.layers."),
        ("_mlp_", ".mlp."),
        ("_self_attn_", ".self_attn."),
    ];
    let module = dotted.iter().fold(module.to_owned(), |name, (from, to)| name.replace(from, to));
    format!("{component}.transformer.{module}.weight")
}
