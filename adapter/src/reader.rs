//! From a LoRA file in any spelling to an adapter: which keys are taken, and the tensors they name.
//!
//! Keys with one prefix make a *group*, and a group makes at most one patch. Everything is decided
//! from the header; only then are the tensors of the patches that remain read.

use std::collections::BTreeMap;

use crate::{
    container::Container,
    error::{AdapterError, clip},
    key::{Spelling, names_text_encoder, resolve},
    limits::Limits,
    patch::{LowRank, Patch, check_low_rank},
    patch_set::PatchSet,
    source::ByteSource,
    suffix::{self, PAIRS},
    target::Target,
    tensor::Tensor,
};

/// Keys that an error shows as examples.
const EXAMPLES_MAX: usize = 5;

/// What became of every key of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyReport {
    /// The weights that the file patches, in order.
    pub targets: Vec<Target>,
    /// Text-encoder keys that no rule takes, in order; they have no effect.
    pub unmatched: Vec<String>,
    /// Keys whose weight the file also names in a spelling that wins, in order; they have no effect.
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
/// `text_encoders.`; for `clip_g` `text_encoder_2.`, then `lora_te2_`, then `text_encoders.`.
///
/// # Errors
///
/// The container is broken or over a limit; a text-encoder key is of a kind other than `LoRA`; a
/// needed tensor is incomplete, misshapen or not finite; or there are text-encoder keys and none
/// names a known weight.
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
    for (target, (_, planned)) in &plan.patches {
        patches.insert(target.clone(), planned.read(&file)?);
    }
    let set = PatchSet::new(patches, plan.unmatched.iter().map(|key| (*key).to_owned()))?;
    let mut superseded: Vec<_> = plan.superseded.iter().map(|key| (*key).to_owned()).collect();
    superseded.sort_unstable();
    let report = KeyReport {
        targets: set.patches().keys().cloned().collect(),
        unmatched: set.unmatched().to_vec(),
        superseded,
        text_encoder_keys: plan.text_encoder_keys,
        ignored_keys: file.header().tensors.len() - plan.text_encoder_keys,
    };
    Ok((set, report))
}

/// What to do with every key, decided from names, types and shapes alone.
#[derive(Default)]
struct Plan<'f> {
    patches: BTreeMap<Target, (Spelling, PlannedPatch<'f>)>,
    unmatched: Vec<&'f str>,
    superseded: Vec<&'f str>,
    text_encoder_keys: usize,
}

/// All keys of one prefix that names a weight.
struct Group<'f> {
    prefix: &'f str,
    target: Target,
    spelling: Spelling,
    /// By suffix.
    tensors: BTreeMap<&'static str, Tensor<'f>>,
}

/// A low-rank patch whose tensors are known to belong together.
struct PlannedPatch<'f> {
    prefix: &'f str,
    up: (Tensor<'f>, [usize; 2]),
    down: (Tensor<'f>, [usize; 2]),
    mid: Option<(Tensor<'f>, [usize; 2])>,
    alpha: Option<Tensor<'f>>,
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
        plan.add(group, limits)?;
    }
    if plan.patches.is_empty() && plan.text_encoder_keys > 0 {
        let examples = plan.unmatched.iter().take(EXAMPLES_MAX).map(|key| clip(key)).collect();
        return Err(AdapterError::NothingMatches { count: plan.text_encoder_keys, examples });
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
            if let Some(kind) = suffix::other_kind(suffix, info.shape.len()) {
                return Err(AdapterError::UnsupportedKind { kind, key: key.clone() });
            }
            let new = || Group { prefix, target, spelling, tensors: BTreeMap::new() };
            groups.entry(prefix).or_insert_with(new).tensors.insert(suffix, Tensor { key, info });
        }
        Ok(groups)
    }

    /// Makes a patch of `group`, in place of one that a lesser spelling made.
    fn add(&mut self, mut group: Group<'f>, limits: &Limits) -> Result<(), AdapterError> {
        let planned = group.take_patch(limits)?;
        self.unmatched.extend(group.tensors.values().map(|tensor| tensor.key));
        let Some(planned) = planned else { return Ok(()) };
        if let Some((_, loser)) = self.patches.insert(group.target, (group.spelling, planned)) {
            self.superseded.extend(loser.keys());
        }
        Ok(())
    }
}

impl<'f> Group<'f> {
    /// Takes the tensors of the first pair whose `up` is there; what stays behind is unmatched.
    fn take_patch(&mut self, limits: &Limits) -> Result<Option<PlannedPatch<'f>>, AdapterError> {
        let Some(pair) = PAIRS.iter().find(|pair| self.tensors.contains_key(pair.up)) else {
            return Ok(None);
        };
        let Some((up, down)) = self.tensors.remove(pair.up).zip(self.tensors.remove(pair.down))
        else {
            let [key, missing] =
                [pair.up, pair.down].map(|suffix| format!("{}{suffix}", self.prefix));
            return Err(AdapterError::MissingPartner { key, missing });
        };
        let mid = pair.mid.and_then(|suffix| self.tensors.remove(suffix));
        let alpha = self.tensors.remove(suffix::ALPHA);
        PlannedPatch::new(self.prefix, [up, down], mid, alpha, limits).map(Some)
    }
}

impl<'f> PlannedPatch<'f> {
    fn new(
        prefix: &'f str,
        [up, down]: [Tensor<'f>; 2],
        mid: Option<Tensor<'f>>,
        alpha: Option<Tensor<'f>>,
        limits: &Limits,
    ) -> Result<Self, AdapterError> {
        for tensor in [Some(up), Some(down), mid].into_iter().flatten() {
            tensor.dtype()?;
        }
        let up = (up, up.flattened()?);
        let down = (down, down.flattened()?);
        let mid = mid.map(with_mid_shape).transpose()?;
        check_low_rank(prefix, [up.1, down.1], mid.map(|(_, shape)| shape), limits)?;
        Ok(Self { prefix, up, down, mid, alpha })
    }

    fn keys(&self) -> impl Iterator<Item = &'f str> {
        let mid = self.mid.map(|(tensor, _)| tensor);
        [Some(self.up.0), Some(self.down.0), mid, self.alpha]
            .into_iter()
            .flatten()
            .map(|tensor| tensor.key)
    }

    fn read<S: ByteSource + ?Sized>(&self, file: &Container<'_, S>) -> Result<Patch, AdapterError> {
        let matrix = |(tensor, shape): (Tensor<'f>, _)| tensor.read_matrix(file, shape);
        let mid = self.mid.map(matrix).transpose()?;
        let alpha = self.alpha.map(|alpha| alpha.read_alpha(file)).transpose()?;
        LowRank::new(matrix(self.up)?, matrix(self.down)?, mid, alpha)
            .map(Patch::LowRank)
            .map_err(|source| AdapterError::LowRank { key: self.prefix.to_owned(), source })
    }
}

/// A `mid` of a linear weight is [rank, rank, 1, 1]; a real kernel belongs to a convolution.
fn with_mid_shape(mid: Tensor<'_>) -> Result<(Tensor<'_>, [usize; 2]), AdapterError> {
    match *mid.info.shape.as_slice() {
        [rows, cols, 1, 1] => Ok((mid, [rows, cols])),
        _ => Err(mid.wrong_shape("[rank, rank, 1, 1]")),
    }
}
