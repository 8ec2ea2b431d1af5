//! What the end of a key says: which kind of patch it belongs to, and which part of it.

use crate::patch::PatchKind;

/// One spelling of the two matrices of a low-rank patch.
#[derive(Debug)]
pub(crate) struct Pair {
    /// Suffix of the [out, rank] matrix.
    pub(crate) up: &'static str,
    /// Suffix of the [rank, in] matrix.
    pub(crate) down: &'static str,
    /// Suffix of the [rank, rank, 1, 1] matrix between them, in the spelling that has one.
    pub(crate) mid: Option<&'static str>,
}

/// The spellings in the order in which they are tried; the first whose `up` is there is taken.
pub(crate) const PAIRS: [Pair; 7] = [
    Pair { up: ".lora_up.weight", down: ".lora_down.weight", mid: Some(".lora_mid.weight") },
    Pair { up: "_lora.up.weight", down: "_lora.down.weight", mid: None },
    Pair { up: ".lora_B.weight", down: ".lora_A.weight", mid: None },
    Pair { up: ".lora.up.weight", down: ".lora.down.weight", mid: None },
    Pair { up: ".lora_B", down: ".lora_A", mid: None },
    Pair { up: ".lora_linear_layer.up.weight", down: ".lora_linear_layer.down.weight", mid: None },
    Pair { up: ".lora_B.default.weight", down: ".lora_A.default.weight", mid: None },
];

/// Suffix of the scalar that scales a patch.
pub(crate) const ALPHA: &str = ".alpha";
/// Suffix of the magnitudes of a weight-decomposed patch.
pub(crate) const DORA_SCALE: &str = ".dora_scale";
/// Suffix of the shape that a `LoRA` asks its weight to have.
pub(crate) const RESHAPE: &str = ".reshape_weight";
/// Suffix of a norm's weight difference.
pub(crate) const NORM: &str = ".w_norm";
/// Suffix of a norm's bias difference, which counts beside [`NORM`] only.
pub(crate) const NORM_BIAS: &str = ".b_norm";
/// Suffix of a weight's difference.
pub(crate) const DIFF: &str = ".diff";
/// Suffix of a bias's difference.
pub(crate) const DIFF_BIAS: &str = ".diff_b";
/// Suffix of a weight that replaces the model's.
pub(crate) const SET: &str = ".set_weight";

/// Suffixes that stand alone or beside those of any kind.
const SINGLE: [&str; 8] = [ALPHA, DORA_SCALE, RESHAPE, NORM, NORM_BIAS, DIFF, DIFF_BIAS, SET];

const LOHA: [(&str, &str); 6] = [
    ("w1_a", ".hada_w1_a"),
    ("w1_b", ".hada_w1_b"),
    ("w2_a", ".hada_w2_a"),
    ("w2_b", ".hada_w2_b"),
    ("t1", ".hada_t1"),
    ("t2", ".hada_t2"),
];
const LOKR: [(&str, &str); 7] = [
    ("w1", ".lokr_w1"),
    ("w1_a", ".lokr_w1_a"),
    ("w1_b", ".lokr_w1_b"),
    ("w2", ".lokr_w2"),
    ("w2_a", ".lokr_w2_a"),
    ("w2_b", ".lokr_w2_b"),
    ("t2", ".lokr_t2"),
];
const GLORA: [(&str, &str); 4] =
    [("a1", ".a1.weight"), ("a2", ".a2.weight"), ("b1", ".b1.weight"), ("b2", ".b2.weight")];
const ORTHOGONAL: [(&str, &str); 2] = [("blocks", ".oft_blocks"), ("rescale", ".rescale")];

/// Parts and suffixes of a kind that has one spelling, without those that all kinds share.
pub(crate) fn suffixes(kind: PatchKind) -> &'static [(&'static str, &'static str)] {
    match kind {
        PatchKind::Loha => &LOHA,
        PatchKind::Lokr => &LOKR,
        PatchKind::Glora => &GLORA,
        PatchKind::Oft | PatchKind::Boft => &ORTHOGONAL,
        // The first has many spellings, the next two a single tensor, and files have none of the rest.
        PatchKind::Lora
        | PatchKind::Diff
        | PatchKind::Set
        | PatchKind::ModelAsLora
        | PatchKind::Unchanged => &[],
    }
}

/// Splits `key` into what names a weight and the suffix, if the suffix is one of any kind.
pub(crate) fn split(key: &str) -> Option<(&str, &'static str)> {
    all().find_map(|suffix| key.strip_suffix(suffix).map(|prefix| (prefix, suffix)))
}

/// Every suffix. None of them is the end of another one.
fn all() -> impl Iterator<Item = &'static str> {
    let of_pairs =
        PAIRS.iter().flat_map(|pair| [Some(pair.up), Some(pair.down), pair.mid]).flatten();
    let of_kinds = PatchKind::ALL
        .into_iter()
        .flat_map(|kind| suffixes(kind).iter().map(|(_, suffix)| *suffix));
    of_pairs.chain(of_kinds).chain(SINGLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suffix_is_found_and_leaves_the_prefix() {
        for suffix in all() {
            assert_eq!(split(&format!("a.b{suffix}")), Some(("a.b", suffix)));
        }
        for key in ["a.b", "a.b.weight", "a.lora_up", "alpha", "", "a.lora_mid", "a.lokr_t1"] {
            assert_eq!(split(key), None, "`{key}`");
        }
    }

    #[test]
    fn no_suffix_is_the_end_of_another_one() {
        for suffix in all() {
            assert!(all().all(|other| other == suffix || !other.ends_with(suffix)), "{suffix}");
        }
    }
}
