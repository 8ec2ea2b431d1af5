//! All keys of one prefix: which patches they ask for, of the weight and of its bias.
//!
//! `ComfyUI` tries one kind after the other, and each that it finds replaces the one before. So the
//! patches of a group are listed in that order and the last one counts.

use std::collections::BTreeMap;

use crate::{
    error::AdapterError,
    key::Spelling,
    parts::{self, MissingPart, Parts, drop_unused},
    patch::PatchKind,
    suffix::{self, PAIRS},
    target::Target,
    tensor::Tensor,
};

/// Dimensions of the blocks of OFT, and of BOFT.
const BLOCK_DIMENSIONS: usize = 3;
const BUTTERFLY_DIMENSIONS: usize = 4;

/// All keys of one prefix that names a weight.
pub(crate) struct Group<'f> {
    pub(crate) prefix: &'f str,
    pub(crate) target: Target,
    pub(crate) spelling: Spelling,
    /// By suffix.
    pub(crate) tensors: BTreeMap<&'static str, Tensor<'f>>,
}

impl<'f> Group<'f> {
    /// The patches of the weight and of its bias, each to replace those before it.
    pub(crate) fn patches(&self) -> Result<Vec<(Target, Parts<'f>)>, AdapterError> {
        let of_weight = self.of_weight()?.into_iter().map(|parts| (self.target.clone(), parts));
        let bias = self.target.bias();
        let of_bias = bias
            .into_iter()
            .flat_map(|bias| self.of_bias().into_iter().map(move |parts| (bias.clone(), parts)));
        Ok(of_weight.chain(of_bias).collect())
    }

    fn of_weight(&self) -> Result<Vec<Parts<'f>>, AdapterError> {
        let adapters =
            [self.low_rank()?, self.loha()?, self.lokr()?, self.glora()?, self.orthogonal()?];
        let whole = [
            self.whole(PatchKind::Diff, suffix::NORM),
            self.whole(PatchKind::Diff, suffix::DIFF),
            self.whole(PatchKind::Set, suffix::SET),
        ];
        Ok(adapters.into_iter().chain(whole).flatten().collect())
    }

    fn of_bias(&self) -> Vec<Parts<'f>> {
        let norm = self
            .tensors
            .contains_key(suffix::NORM)
            .then(|| self.whole(PatchKind::Diff, suffix::NORM_BIAS));
        norm.into_iter().chain([self.whole(PatchKind::Diff, suffix::DIFF_BIAS)]).flatten().collect()
    }

    /// The first pair of a low-rank patch whose `up` is there.
    fn low_rank(&self) -> Result<Option<Parts<'f>>, AdapterError> {
        let Some(pair) = PAIRS.iter().find(|pair| self.tensors.contains_key(pair.up)) else {
            return Ok(None);
        };
        if let Some(mid) = pair.mid.and_then(|mid| self.tensors.get(mid)) {
            mid.check_mid()?;
        }
        let mut spelling = vec![(parts::UP, pair.up), (parts::DOWN, pair.down)];
        spelling.extend(pair.mid.map(|mid| (parts::MID, mid)));
        self.adapter(PatchKind::Lora, &spelling, self.found(&spelling)).map(Some)
    }

    fn loha(&self) -> Result<Option<Parts<'f>>, AdapterError> {
        let spelling = suffix::suffixes(PatchKind::Loha);
        let mut found = self.found(spelling);
        if !found.contains_key("w1_a") {
            return Ok(None);
        }
        drop_unused(PatchKind::Loha, &mut found);
        self.adapter(PatchKind::Loha, spelling, found).map(Some)
    }

    fn lokr(&self) -> Result<Option<Parts<'f>>, AdapterError> {
        let spelling = suffix::suffixes(PatchKind::Lokr);
        let mut found = self.found(spelling);
        if !["w1", "w2", "w1_a", "w2_a"].iter().any(|part| found.contains_key(part)) {
            return Ok(None);
        }
        drop_unused(PatchKind::Lokr, &mut found);
        self.adapter(PatchKind::Lokr, spelling, found).map(Some)
    }

    fn glora(&self) -> Result<Option<Parts<'f>>, AdapterError> {
        let spelling = suffix::suffixes(PatchKind::Glora);
        let found = self.found(spelling);
        if !found.contains_key("a1") {
            return Ok(None);
        }
        self.adapter(PatchKind::Glora, spelling, found).map(Some)
    }

    /// OFT and BOFT have the same keys; the blocks' dimensions tell them apart.
    fn orthogonal(&self) -> Result<Option<Parts<'f>>, AdapterError> {
        let spelling = suffix::suffixes(PatchKind::Oft);
        let found = self.found(spelling);
        let Some(blocks) = found.get("blocks") else { return Ok(None) };
        let kind = match blocks.info.shape.len() {
            BLOCK_DIMENSIONS => PatchKind::Oft,
            BUTTERFLY_DIMENSIONS => PatchKind::Boft,
            _ => return Err(blocks.wrong_shape("three dimensions for OFT, or four for BOFT")),
        };
        self.adapter(kind, spelling, found).map(Some)
    }

    /// A patch that holds every element in the one tensor of `suffix`.
    fn whole(&self, kind: PatchKind, suffix: &str) -> Option<Parts<'f>> {
        let tensor = *self.tensors.get(suffix)?;
        Parts::new(kind, self.prefix.to_owned(), BTreeMap::from([(parts::VALUE, tensor)])).ok()
    }

    /// The tensors of `spelling` that are there, by part.
    fn found(
        &self,
        spelling: &[(&'static str, &'static str)],
    ) -> BTreeMap<&'static str, Tensor<'f>> {
        let tensor = |suffix: &str| self.tensors.get(suffix).copied();
        spelling.iter().filter_map(|(part, suffix)| Some((*part, tensor(suffix)?))).collect()
    }

    /// The patch of `tensors`, with what tensors of all kinds share.
    fn adapter(
        &self,
        kind: PatchKind,
        spelling: &[(&'static str, &'static str)],
        mut tensors: BTreeMap<&'static str, Tensor<'f>>,
    ) -> Result<Parts<'f>, AdapterError> {
        let first = tensors.values().next().map_or(self.prefix, |tensor| tensor.key).to_owned();
        let shared = [(parts::ALPHA, suffix::ALPHA), (parts::DORA_SCALE, suffix::DORA_SCALE)];
        tensors.extend(self.found(&shared));
        Parts::new(kind, self.prefix.to_owned(), tensors).map_err(|MissingPart(missing)| {
            let suffix = spelling.iter().find(|(part, _)| *part == missing).map_or("", |(_, s)| s);
            AdapterError::MissingPartner { key: first, missing: format!("{}{suffix}", self.prefix) }
        })
    }
}
