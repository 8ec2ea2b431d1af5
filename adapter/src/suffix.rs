//! What the end of a key says: which kind of patch it belongs to, and which part of it.

use std::fmt;

/// The ways in which LoRA-like files change a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PatchKind {
    /// Low-rank product: `up · down`, in any spelling.
    Lora,
    /// `LoRA` on a weight that is enlarged first (`reshape_weight`).
    ReshapedLora,
    /// Weight-decomposed: any other kind with a `dora_scale`.
    Dora,
    /// Hadamard product of two low-rank products.
    Loha,
    /// Kronecker product.
    Lokr,
    /// Generalised `LoRA`, with a part that depends on the weight.
    Glora,
    /// Orthogonal fine-tuning, block-diagonal.
    Oft,
    /// Orthogonal fine-tuning, butterfly factors.
    Boft,
    /// A full difference of a weight (`diff`).
    Diff,
    /// A full difference of a bias (`diff_b`).
    DiffBias,
    /// A full difference of a norm's weight or bias (`w_norm`, `b_norm`).
    Norm,
    /// A weight that replaces the model's (`set_weight`).
    Set,
}

impl fmt::Display for PatchKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora => "LoRA",
            Self::ReshapedLora => "LoRA with reshape_weight",
            Self::Dora => "DoRA",
            Self::Loha => "LoHa",
            Self::Lokr => "LoKr",
            Self::Glora => "GLoRA",
            Self::Oft => "OFT",
            Self::Boft => "BOFT",
            Self::Diff => "full weight difference (diff)",
            Self::DiffBias => "bias difference (diff_b)",
            Self::Norm => "norm difference (w_norm, b_norm)",
            Self::Set => "weight replacement (set_weight)",
        })
    }
}

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

/// Suffix of orthogonal blocks: 3-D for OFT, 4-D for BOFT.
const ORTHOGONAL_BLOCKS: &str = ".oft_blocks";
const BUTTERFLY_DIMENSIONS: usize = 4;

/// Suffixes of the other kinds. None of them is the end of another one.
const OTHER_KINDS: [(&str, PatchKind); 26] = [
    (".reshape_weight", PatchKind::ReshapedLora),
    (".dora_scale", PatchKind::Dora),
    (".hada_w1_a", PatchKind::Loha),
    (".hada_w1_b", PatchKind::Loha),
    (".hada_w2_a", PatchKind::Loha),
    (".hada_w2_b", PatchKind::Loha),
    (".hada_t1", PatchKind::Loha),
    (".hada_t2", PatchKind::Loha),
    (".lokr_w1", PatchKind::Lokr),
    (".lokr_w1_a", PatchKind::Lokr),
    (".lokr_w1_b", PatchKind::Lokr),
    (".lokr_w2", PatchKind::Lokr),
    (".lokr_w2_a", PatchKind::Lokr),
    (".lokr_w2_b", PatchKind::Lokr),
    (".lokr_t2", PatchKind::Lokr),
    (".a1.weight", PatchKind::Glora),
    (".a2.weight", PatchKind::Glora),
    (".b1.weight", PatchKind::Glora),
    (".b2.weight", PatchKind::Glora),
    (ORTHOGONAL_BLOCKS, PatchKind::Oft),
    (".rescale", PatchKind::Oft),
    (".diff", PatchKind::Diff),
    (".diff_b", PatchKind::DiffBias),
    (".w_norm", PatchKind::Norm),
    (".b_norm", PatchKind::Norm),
    (".set_weight", PatchKind::Set),
];

/// Splits `key` into what names a weight and the suffix, if the suffix is one of any kind.
pub(crate) fn split(key: &str) -> Option<(&str, &'static str)> {
    let of_pairs =
        PAIRS.iter().flat_map(|pair| [Some(pair.up), Some(pair.down), pair.mid]).flatten();
    let of_others = OTHER_KINDS.iter().map(|(suffix, _)| *suffix);
    of_pairs
        .chain([ALPHA])
        .chain(of_others)
        .find_map(|suffix| key.strip_suffix(suffix).map(|prefix| (prefix, suffix)))
}

/// The kind that `suffix` belongs to, unless it is one of a plain `LoRA`'s.
/// `dimensions` is the number of dimensions of the tensor.
pub(crate) fn other_kind(suffix: &str, dimensions: usize) -> Option<PatchKind> {
    let (_, kind) = OTHER_KINDS.into_iter().find(|(other, _)| *other == suffix)?;
    let is_butterfly = suffix == ORTHOGONAL_BLOCKS && dimensions == BUTTERFLY_DIMENSIONS;
    Some(if is_butterfly { PatchKind::Boft } else { kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suffix_is_found_and_leaves_the_prefix() {
        let pairs =
            PAIRS.iter().flat_map(|pair| [Some(pair.up), Some(pair.down), pair.mid]).flatten();
        for suffix in pairs.chain([ALPHA]).chain(OTHER_KINDS.iter().map(|(suffix, _)| *suffix)) {
            assert_eq!(split(&format!("a.b{suffix}")), Some(("a.b", suffix)));
        }
        for key in ["a.b", "a.b.weight", "a.lora_up", "alpha", "", "a.lora_mid"] {
            assert_eq!(split(key), None, "`{key}`");
        }
    }

    #[test]
    fn orthogonal_blocks_are_told_apart_by_their_dimensions() {
        assert_eq!(other_kind(".oft_blocks", 3), Some(PatchKind::Oft));
        assert_eq!(other_kind(".oft_blocks", 4), Some(PatchKind::Boft));
        assert_eq!(other_kind(".lora_up.weight", 2), None);
    }
}
