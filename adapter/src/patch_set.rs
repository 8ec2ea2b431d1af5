//! An adapter: patches by target, and the keys of its file that no rule took.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::{AdapterError, clip},
    key::is_listable,
    limits::UNMATCHED_KEYS_MAX,
    patch::Patch,
    target::Target,
};

/// The text-encoder part of one LoRA-like file in the form that has an identity.
///
/// Strengths are no part of it. Unmatched keys are, so that every receipt can list them; a file
/// without such keys has the digest of the same patches from anywhere else.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PatchSet {
    patches: BTreeMap<Target, Patch>,
    unmatched: Vec<String>,
}

impl PatchSet {
    /// The adapter of these patches and of these `unmatched` text-encoder keys, in any order.
    ///
    /// # Errors
    ///
    /// A patch on a bias that is of a kind for weights only (all but [`Patch::Diff`],
    /// [`Patch::Set`], [`Patch::ModelAsLora`] and [`Patch::Unchanged`]), two targets that overlap,
    /// more than [`UNMATCHED_KEYS_MAX`] keys, or a key that is not 1 to [`crate::KEY_BYTES_MAX`]
    /// visible ASCII characters without quotes and backslashes.
    pub fn new(
        patches: BTreeMap<Target, Patch>,
        unmatched: impl IntoIterator<Item = String>,
    ) -> Result<Self, AdapterError> {
        let misplaced =
            |(target, patch): &(&Target, &Patch)| !target.is_weight() && !patch.kind().fits_bias();
        if let Some((target, patch)) = patches.iter().find(misplaced) {
            let target = target.to_string();
            return Err(AdapterError::NotAWeight { target, kind: patch.kind() });
        }
        if let Some((first, second)) = overlap(&patches) {
            let [first, second] = [first, second].map(Target::to_string);
            return Err(AdapterError::Overlap { first, second });
        }
        let unmatched: BTreeSet<String> = unmatched.into_iter().collect();
        if unmatched.len() > UNMATCHED_KEYS_MAX {
            return Err(AdapterError::TooManyUnmatched);
        }
        if let Some(key) = unmatched.iter().find(|key| !is_listable(key)) {
            return Err(AdapterError::Key { key: clip(key) });
        }
        Ok(Self { patches, unmatched: unmatched.into_iter().collect() })
    }

    /// The patches by target.
    pub fn patches(&self) -> &BTreeMap<Target, Patch> {
        &self.patches
    }

    /// The patches by target, without a copy.
    pub fn into_patches(self) -> BTreeMap<Target, Patch> {
        self.patches
    }

    /// Keys that name a text encoder and that no rule took, in order and without repetition.
    pub fn unmatched(&self) -> &[String] {
        &self.unmatched
    }

    /// Whether nothing is patched.
    pub fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }
}

/// The first two targets that overlap.
///
/// Targets of one parameter are neighbours: first the whole, then slices by dimension and start. If
/// any two of them overlap, two neighbours do.
fn overlap(patches: &BTreeMap<Target, Patch>) -> Option<(&Target, &Target)> {
    patches.keys().zip(patches.keys().skip(1)).find(|(first, second)| first.overlaps(second))
}

#[cfg(test)]
mod tests {
    use protocol::Dtype;

    use super::*;
    use crate::{Array, Diff, LowRank, Matrix};

    #[test]
    fn unmatched_keys_are_sorted_and_unique() {
        let keys = ["te_b", "te_a", "te_b"].map(String::from);
        assert_eq!(PatchSet::new(BTreeMap::new(), keys).unwrap().unmatched(), ["te_a", "te_b"]);
    }

    #[test]
    fn more_unmatched_keys_than_the_limit_are_refused() {
        let keys = |count| (0..count).map(|index| format!("te_{index}"));
        assert!(PatchSet::new(BTreeMap::new(), keys(UNMATCHED_KEYS_MAX)).is_ok());
        let error = PatchSet::new(BTreeMap::new(), keys(UNMATCHED_KEYS_MAX + 1)).unwrap_err();
        assert!(matches!(error, AdapterError::TooManyUnmatched), "{error}");
    }

    #[test]
    fn a_key_that_json_would_escape_is_refused() {
        for key in ["", "te a", "te\"a", "te\\a", "te\na", "té", &"x".repeat(513)] {
            let error = PatchSet::new(BTreeMap::new(), [key.to_owned()]).unwrap_err();
            assert!(matches!(error, AdapterError::Key { .. }), "{error}");
        }
    }

    #[test]
    fn a_low_rank_patch_on_a_bias_is_refused() {
        let target: Target = "clip_l.transformer.text_model.final_layer_norm.bias".parse().unwrap();
        let one = Matrix::new(Dtype::Float16, 1, 1, vec![0, 0]).unwrap();
        let patch = Patch::LowRank(LowRank::new(one.clone(), one, None, None).unwrap());
        let error = PatchSet::new(BTreeMap::from([(target, patch)]), []).unwrap_err();
        assert!(matches!(error, AdapterError::NotAWeight { .. }), "{error}");
        let expected = "`clip_l.transformer.text_model.final_layer_norm.bias` is not a weight: LoRA needs a parameter that ends in `.weight`";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn slices_side_by_side_are_taken_and_overlaps_are_named() {
        let set = |slices: &[&str]| {
            let target = |slice: &&str| {
                format!("clip_l.transformer.text_projection.weight{slice}").parse().unwrap()
            };
            let patches = slices.iter().map(|slice| (target(slice), Patch::Unchanged)).collect();
            PatchSet::new(patches, [])
        };
        assert_eq!(set(&["[0:4:4]", "[0:0:4]", "[0:9:1]"]).unwrap().patches().len(), 3);
        for slices in [
            &["", "[0:4:4]"][..],
            &["[0:0:4]", "[0:3:1]"],
            &["[0:0:9]", "[0:1:1]", "[0:2:1]"],
            &["[0:0:1]", "[0:1:1]", "[1:0:1]"],
        ] {
            let error = set(slices).unwrap_err();
            assert!(matches!(error, AdapterError::Overlap { .. }), "{error}");
        }
        let expected = "`clip_l.transformer.text_projection.weight` and `clip_l.transformer.text_projection.weight[1:2:3]` overlap, and the patches of one adapter have no order: put them into two adapters";
        assert_eq!(set(&["[1:2:3]", ""]).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_full_difference_on_a_bias_is_taken() {
        let target: Target = "clip_l.transformer.text_model.final_layer_norm.bias".parse().unwrap();
        let value = Array::new(Dtype::Float16, &[1], vec![0, 0]).unwrap();
        let patches = BTreeMap::from([(target, Patch::Diff(Diff::new(value)))]);
        assert_eq!(PatchSet::new(patches, []).unwrap().patches().len(), 1);
    }
}
