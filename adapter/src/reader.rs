//! From a LoRA file in any spelling to an adapter: which keys are taken, and the tensors they name.
//!
//! Keys with one prefix make a [`Group`], and of all patches that the groups make of one target the
//! last one counts. Everything is decided from the header; only then are the tensors of the patches
//! that remain read.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    container::Container,
    error::{AdapterError, nothing_matches},
    group::Group,
    key::{names_text_encoder, resolve},
    limits::Limits,
    parts::Parts,
    patch_set::PatchSet,
    source::ByteSource,
    suffix,
    target::Target,
    tensor::Tensor,
};

/// What became of every key of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyReport {
    /// The weights and biases that the file patches, in order.
    pub targets: Vec<Target>,
    /// Text-encoder keys that no rule takes, in order; they have no effect.
    pub unmatched: Vec<String>,
    /// Keys whose weight the file also names in a spelling or patches in a kind that wins, in order;
    /// they have no effect.
    pub superseded: Vec<String>,
    /// How many keys name a text encoder.
    pub text_encoder_keys: usize,
    /// How many keys belong to something else: the image model, bundled embeddings.
    pub ignored_keys: usize,
}

impl KeyReport {
    /// Whether any key names a text encoder.
    pub fn has_text_encoder_keys(&self) -> bool {
        self.text_encoder_keys > 0
    }
}

/// Reads the text-encoder part of a LoRA file, with the default limits.
///
/// A file without text-encoder keys gives an empty adapter. Where several spellings name one
/// weight, one wins as in ComfyUI: `text_encoder.`, then `lora_te1_`, then `lora_te_`, then
/// `text_encoders.`; for `clip_g` `text_encoder_2.`, then `lora_te2_`, then `text_encoders.`. Where
/// one prefix has patches of several kinds, the last of these wins: `LoRA`, `LoHa`, `LoKr`,
/// `GLoRA`, OFT or BOFT, `w_norm`, `diff`, `set_weight`; and of a bias `b_norm`, `diff_b`.
///
/// # Errors
///
/// The container is broken or over a limit; a text-encoder key asks for another shape of its weight
/// (`reshape_weight`); a tensor of a patch is missing, misshapen or not finite; or there are
/// text-encoder keys and none patches a known weight.
pub fn read_lora<S: ByteSource + ?Sized>(
    source: &S,
) -> Result<(PatchSet, KeyReport), AdapterError> {
    read_lora_with(source, &Limits::default())
}

/// As [`read_lora`], with limits of the caller's.
///
/// # Errors
///
/// As [`read_lora`].
pub fn read_lora_with<S: ByteSource + ?Sized>(
    source: &S,
    limits: &Limits,
) -> Result<(PatchSet, KeyReport), AdapterError> {
    let file = Container::open(source, limits)?;
    let plan = plan(&file, limits)?;
    let mut patches = BTreeMap::new();
    for (target, parts) in &plan.patches {
        patches.insert(target.clone(), parts.read(&file)?);
    }
    let set = PatchSet::new(patches, plan.unmatched.iter().map(|key| (*key).to_owned()))?;
    let report = KeyReport {
        targets: set.patches().keys().cloned().collect(),
        unmatched: set.unmatched().to_vec(),
        superseded: plan.superseded(),
        text_encoder_keys: plan.text_encoder_keys,
        ignored_keys: file.header().tensors.len() - plan.text_encoder_keys,
    };
    Ok((set, report))
}

/// What to do with every key, decided from names, types and shapes alone.
#[derive(Default)]
struct Plan<'f> {
    patches: BTreeMap<Target, Parts<'f>>,
    unmatched: Vec<&'f str>,
    /// Keys of all patches, also of those that lost.
    taken: BTreeSet<&'f str>,
    text_encoder_keys: usize,
}

fn plan<'f, S: ByteSource + ?Sized>(
    file: &'f Container<'_, S>,
    limits: &Limits,
) -> Result<Plan<'f>, AdapterError> {
    let mut plan = Plan::default();
    let mut groups = plan.group(file)?.into_values().collect::<Vec<_>>();
    // Stable, so that of two prefixes the spelling alone decides.
    groups.sort_by_key(|group| group.spelling);
    for group in groups {
        plan.add(&group, limits)?;
    }
    if plan.patches.is_empty() && plan.text_encoder_keys > 0 {
        return Err(nothing_matches(plan.text_encoder_keys, plan.unmatched.iter().copied()));
    }
    Ok(plan)
}

impl<'f> Plan<'f> {
    /// Sorts the keys into groups by prefix, and those without a group into unmatched or ignored.
    fn group<S: ByteSource + ?Sized>(
        &mut self,
        file: &'f Container<'_, S>,
    ) -> Result<BTreeMap<&'f str, Group<'f>>, AdapterError> {
        let mut groups: BTreeMap<&str, Group<'_>> = BTreeMap::new();
        for (key, info) in &file.header().tensors {
            if !names_text_encoder(key) {
                continue;
            }
            self.text_encoder_keys += 1;
            let resolved = suffix::split(key)
                .and_then(|(prefix, suffix)| Some((prefix, suffix, resolve(prefix)?)));
            let Some((prefix, suffix, (target, spelling))) = resolved else {
                self.unmatched.push(key);
                continue;
            };
            if suffix == suffix::RESHAPE {
                return Err(AdapterError::UnsupportedReshape { key: key.clone() });
            }
            let new = || Group { prefix, target, spelling, tensors: BTreeMap::new() };
            groups.entry(prefix).or_insert_with(new).tensors.insert(suffix, Tensor { key, info });
        }
        Ok(groups)
    }

    /// Makes the patches of `group`, in place of those that lesser groups made.
    fn add(&mut self, group: &Group<'f>, limits: &Limits) -> Result<(), AdapterError> {
        for (target, parts) in group.patches()? {
            parts.check(limits)?;
            self.taken.extend(parts.keys());
            self.patches.insert(target, parts);
        }
        let keys = group.tensors.values().map(|tensor| tensor.key);
        self.unmatched.extend(keys.filter(|key| !self.taken.contains(key)));
        Ok(())
    }

    /// Keys of patches that lost, except those that they shared with one that won.
    fn superseded(&self) -> Vec<String> {
        let used: BTreeSet<_> = self.patches.values().flat_map(Parts::keys).collect();
        self.taken.difference(&used).map(|key| (*key).to_owned()).collect()
    }
}
