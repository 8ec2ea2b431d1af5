//! Finished answers, kept for requests that ask the same again.
//!
//! The key is a digest of what a request means: its header without `id`, `budget_ms` and
//! `no_cache`, its attachments, and whose request it is. So an answer is given again only to a
//! request that is equal byte by byte; fields that this version does not know count as well.
//! Frames are kept as they came, not copied. What a name means may change: an answer says by which
//! model it was computed, and it counts only while a live worker serves that model.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{AdapterId, ModelDigest, ModelName, RequestDigest, RequestId};

use crate::raw_map::RawMap;

/// Fields of a request that do not change its answer.
const NO_MEANING: [&str; 3] = ["id", "budget_ms", "no_cache"];

/// The largest part of the cache that one answer may take.
const ANSWER_SHARE: usize = 4;

/// Bytes that an entry takes beside its frames, roughly.
const ENTRY_BYTES: usize = 512;

/// On whose behalf something is computed. There is one tenant until the farm knows principals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tenant(u32);

/// A reply that can be given to others than the one who asked.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The header, in which nothing is to be changed but the id.
    header: Bytes,
    attachments: Vec<Bytes>,
}

/// What an answer was computed by and from.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) model: ModelName,
    pub(crate) digest: ModelDigest,
    pub(crate) adapters: BTreeSet<AdapterId>,
}

/// A bounded cache of answers: the least recently used go first, and none gets old.
#[derive(Debug)]
pub(crate) struct Answers {
    entries: BTreeMap<RequestDigest, Entry>,
    by_use: BTreeSet<(u64, RequestDigest)>,
    by_age: BTreeSet<(Instant, RequestDigest)>,
    bytes: usize,
    bytes_max: usize,
    age_max: Duration,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    answer: Answer,
    origin: Origin,
    bytes: usize,
    last_used: u64,
    expires: Instant,
}

impl Tenant {
    /// The only tenant there is.
    pub(crate) const ONLY: Self = Self(0);
}

/// What a request means, and whether equal requests can be told by it: a header that cannot be
/// walked over stands for itself alone.
pub(crate) fn meaning(
    tenant: Tenant,
    header: &[u8],
    attachments: &[Bytes],
) -> (RequestDigest, bool) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&tenant.0.to_le_bytes());
    let map = RawMap::read(header, 0).filter(|map| map.end == header.len());
    if let Some(map) = &map {
        let meant = |key: &[u8]| !NO_MEANING.iter().any(|skipped| skipped.as_bytes() == key);
        let mut entries: Vec<_> = map.entries.iter().filter(|entry| meant(entry.key)).collect();
        entries.sort_by_key(|entry| entry.key);
        for entry in entries {
            update(&mut hasher, entry.key);
            update(&mut hasher, &header[entry.value.clone()]);
        }
    } else {
        update(&mut hasher, header);
    }
    // No entry has this length, so attachments are not taken for entries.
    hasher.update(&u64::MAX.to_le_bytes());
    for attachment in attachments {
        update(&mut hasher, attachment);
    }
    (RequestDigest::from_bytes(hasher.finalize().into()), map.is_some())
}

fn update(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}

impl Answer {
    /// A worker's reply; nothing when its header is no map with an id.
    pub(crate) fn new(header: Bytes, attachments: Vec<Bytes>) -> Option<Self> {
        RawMap::read(&header, 0)?.get("id")?;
        Some(Self { header, attachments })
    }

    /// The reply to the request that calls itself `id`.
    pub(crate) fn for_request(&self, id: &RequestId) -> Option<(Bytes, Vec<Bytes>)> {
        let map = RawMap::read(&self.header, 0)?;
        let header = map.with_text(&self.header, "id", id.as_str())?;
        Some((header.into(), self.attachments.clone()))
    }

    /// The same answer as the cache gives it: its receipt says so. Nothing without a receipt.
    fn cached(&self) -> Option<Self> {
        let receipt = RawMap::read(&self.header, 0)?.get("receipt")?;
        let receipt = RawMap::read(&self.header, receipt.start)?;
        let header = receipt.with_text(&self.header, "cache", "hit")?;
        Some(Self { header: header.into(), attachments: self.attachments.clone() })
    }

    fn bytes(&self) -> usize {
        ENTRY_BYTES + self.header.len() + self.attachments.iter().map(Bytes::len).sum::<usize>()
    }
}

impl Answers {
    /// An empty cache; one of no bytes keeps nothing.
    pub(crate) fn new(bytes_max: usize, age_max: Duration) -> Self {
        Self {
            entries: BTreeMap::new(),
            by_use: BTreeSet::new(),
            by_age: BTreeSet::new(),
            bytes: 0,
            bytes_max,
            age_max,
            uses: 0,
        }
    }

    /// Keeps an answer, if it is small enough and says what was done.
    pub(crate) fn insert(
        &mut self,
        key: RequestDigest,
        answer: &Answer,
        origin: Origin,
        now: Instant,
    ) {
        let bytes = answer.bytes();
        if bytes > self.bytes_max / ANSWER_SHARE {
            return;
        }
        let Some(answer) = answer.cached() else { return };
        self.remove(&key);
        self.forget_old(now);
        while self.bytes + bytes > self.bytes_max {
            let Some(&(_, oldest)) = self.by_use.first() else { break };
            self.remove(&oldest);
        }
        self.uses += 1;
        let entry =
            Entry { answer, origin, bytes, last_used: self.uses, expires: now + self.age_max };
        self.bytes += bytes;
        self.by_use.insert((self.uses, key));
        self.by_age.insert((entry.expires, key));
        self.entries.insert(key, entry);
    }

    /// The answer to an equal request, if the model that computed it is `served`.
    pub(crate) fn get(
        &mut self,
        key: &RequestDigest,
        served: impl FnOnce(&ModelName, ModelDigest) -> bool,
        now: Instant,
    ) -> Option<&Answer> {
        let entry = self.entries.get_mut(key)?;
        if entry.expires <= now || !served(&entry.origin.model, entry.origin.digest) {
            return None;
        }
        self.uses += 1;
        self.by_use.remove(&(entry.last_used, *key));
        self.by_use.insert((self.uses, *key));
        entry.last_used = self.uses;
        Some(&entry.answer)
    }

    /// Drops the answers that were computed with these adapters.
    pub(crate) fn forget_adapters(&mut self, adapters: &[AdapterId]) {
        let used =
            |entry: &Entry| adapters.iter().any(|adapter| entry.origin.adapters.contains(adapter));
        self.forget_where(used);
    }

    /// Drops the answers of models of this name that are another one than this.
    pub(crate) fn forget_others(&mut self, model: &ModelName, digest: ModelDigest) {
        self.forget_where(|entry| entry.origin.model == *model && entry.origin.digest != digest);
    }

    /// Drops answers that are too old.
    pub(crate) fn forget_old(&mut self, now: Instant) {
        while let Some(&(expires, key)) = self.by_age.first()
            && expires <= now
        {
            self.remove(&key);
        }
    }

    /// When the next answer is too old.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.by_age.first().map(|&(expires, _)| expires)
    }

    fn forget_where(&mut self, gone: impl Fn(&Entry) -> bool) {
        let gone = self.entries.iter().filter(|(_, entry)| gone(entry));
        let gone: Vec<_> = gone.map(|(&key, _)| key).collect();
        for key in gone {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &RequestDigest) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.bytes;
            self.by_use.remove(&(entry.last_used, *key));
            self.by_age.remove(&(entry.expires, *key));
        }
    }
}
