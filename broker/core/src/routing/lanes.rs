//! The workers as routing sees them: in a row by number, by model, and by what they hold.
//!
//! A lane keeps its number as long as its worker lives; numbers are used again.

use std::collections::BTreeMap;

use protocol::{
    AdapterId, ModelDigest, ModelName, WorkerName, limits, reply::ModelInfo, worker::Inventory,
};

use super::Ask;
use crate::{cost::Tier, outliers::Health, peer::WorkerPeer};

/// The speed of a worker that is neither slow nor fast.
const SPEED_ONE: u64 = 1024;

/// How much slower or faster than the average a worker may count.
const SPEED_MIN: f64 = 1.0 / 64.0;
const SPEED_MAX: f64 = 64.0;

/// Weight of a new observation in a worker's speed.
const SPEED_ALPHA: f64 = 0.1;

/// What a worker announced of itself.
#[derive(Debug, Clone, Copy)]
pub struct LaneInfo<'a> {
    /// Its name.
    pub name: &'a WorkerName,
    /// The models that it serves.
    pub models: &'a [ModelInfo],
    /// Requests that it takes at once.
    pub slots: usize,
    /// Whether it takes no new requests.
    pub draining: bool,
}

/// The work that a worker has. Times are microseconds on the broker's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Busy {
    /// Slots that are taken.
    pub taken: usize,
    /// When it is done with everything, if the estimates are right.
    pub free_at_us: u64,
    /// The least that is still to be done, should the estimates be wrong.
    pub floor_us: u64,
}

/// What a worker has to load for a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loading {
    /// The only place that adapters come from, and their bytes; nothing when there are several.
    pub from: Option<(Tier, u64)>,
    /// Whether anything is loaded, the model included.
    pub any: bool,
}

/// One worker.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) peer: WorkerPeer,
    pub(super) free_at_us: u64,
    pub(super) floor_us: u64,
    /// Work of requests that wait for this worker.
    pub(super) pledged_us: u64,
    /// Time that it takes for what takes the average 1024.
    speed: u64,
    pub(super) slots: usize,
    pub(super) taken: usize,
    pub(super) draining: bool,
    /// Whether it is kept for a request that has to run alone.
    pub(super) kept: bool,
    pub(super) health: Health,
    /// The number of the request that it was given last.
    pub(super) last_used: u64,
    pub(super) name_hash: u64,
}

/// That a lane serves a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Serving {
    pub(super) lane: usize,
    pub(super) digest: ModelDigest,
    pub(super) bytes: u64,
    pub(super) loaded: bool,
}

#[derive(Debug, Default)]
pub(super) struct Lanes {
    row: Vec<Option<Lane>>,
    /// By lane.
    names: Vec<WorkerName>,
    unused: Vec<usize>,
    by_peer: BTreeMap<WorkerPeer, usize>,
    by_model: BTreeMap<ModelName, Vec<Serving>>,
    holders: BTreeMap<AdapterId, Vec<(usize, Tier)>>,
    /// By lane: the adapters that it holds, each in the nearest tier.
    held: Vec<BTreeMap<AdapterId, Tier>>,
    /// Whether anything was pledged.
    pledged: bool,
    given: u64,
}

impl Lane {
    /// Work that is still to be done.
    pub(super) fn backlog_us(&self, now_us: u64) -> u64 {
        self.free_at_us.saturating_sub(now_us).max(self.floor_us)
    }

    /// The same with what waits for it.
    pub(super) fn queue_us(&self, now_us: u64) -> u64 {
        self.backlog_us(now_us).saturating_add(self.pledged_us)
    }

    pub(super) fn is_free(&self) -> bool {
        let slots = if self.health == Health::Probing { self.slots.min(1) } else { self.slots };
        self.taken < slots && !self.draining && !self.kept
    }

    /// What takes the average `us`.
    pub(super) const fn scaled_us(&self, us: u64) -> u64 {
        us.saturating_mul(self.speed) / SPEED_ONE
    }

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate, and the speed is positive and bounded"
    )]
    pub(super) fn observe_speed(&mut self, us: f64, average_us: u64) {
        let ratio = us / average_us.max(1) as f64;
        if ratio.is_finite() {
            let ratio = ratio.clamp(SPEED_MIN, SPEED_MAX) * SPEED_ONE as f64;
            let speed = self.speed as f64;
            self.speed = (speed + SPEED_ALPHA * (ratio - speed)).round() as u64;
        }
    }
}

impl Lanes {
    pub(super) fn insert(&mut self, peer: WorkerPeer, info: LaneInfo<'_>) {
        let known = self.find(peer).map(|lane| (lane.last_used, lane.speed));
        let (last_used, speed) = known.unwrap_or((0, SPEED_ONE));
        self.remove(peer);
        let lane = Lane {
            peer,
            free_at_us: 0,
            floor_us: 0,
            pledged_us: 0,
            speed,
            slots: info.slots,
            taken: 0,
            draining: info.draining,
            kept: false,
            health: Health::Well,
            last_used,
            name_hash: hash(info.name),
        };
        let index = self.unused.pop().unwrap_or(self.row.len());
        if index == self.row.len() {
            self.row.push(None);
            self.held.push(BTreeMap::new());
            self.names.push(info.name.clone());
        }
        self.names[index] = info.name.clone();
        self.row[index] = Some(lane);
        self.by_peer.insert(peer, index);
        self.set_models(peer, info.models);
    }

    /// Replaces the models that a worker serves.
    pub(super) fn set_models<'a>(
        &mut self,
        peer: WorkerPeer,
        models: impl IntoIterator<Item = &'a ModelInfo>,
    ) {
        let Some(&index) = self.by_peer.get(&peer) else { return };
        let loaded = self.stop_serving(index);
        for model in models {
            let ModelInfo { digest, bytes, .. } = *model;
            let loaded = loaded.contains(&digest);
            let serving = Serving { lane: index, digest, bytes, loaded };
            self.by_model.entry(model.name.clone()).or_default().push(serving);
        }
    }

    pub(super) fn remove(&mut self, peer: WorkerPeer) {
        let Some(index) = self.by_peer.remove(&peer) else { return };
        self.row[index] = None;
        self.unused.push(index);
        self.stop_serving(index);
        for adapter in std::mem::take(&mut self.held[index]).into_keys() {
            self.let_go(index, &adapter);
        }
    }

    pub(super) fn set_inventory(
        &mut self,
        peer: WorkerPeer,
        inventory: &Inventory,
        expected: impl IntoIterator<Item = AdapterId>,
    ) {
        let Some(&index) = self.by_peer.get(&peer) else { return };
        let Inventory { device, host, disk, models } = inventory;
        let tiers = [(disk, Tier::Disk), (host, Tier::Host), (device, Tier::Device)];
        // The nearest tier is written last, and what is nearest is kept when there is too much.
        let listed = tiers.iter().rev().flat_map(|(adapters, _)| adapters.iter());
        let far = listed.count().saturating_sub(limits::INVENTORY_ADAPTERS_MAX);
        let listed = tiers.iter().flat_map(|&(adapters, tier)| {
            adapters.iter().rev().map(move |&adapter| (adapter, tier))
        });
        let mut held: BTreeMap<_, _> = listed.skip(far).collect();
        held.extend(expected.into_iter().map(|adapter| (adapter, Tier::Device)));
        self.replace_held(index, held);
        for (name, serving) in &mut self.by_model {
            for serving in serving.iter_mut().filter(|serving| serving.lane == index) {
                serving.loaded = models.contains(name);
            }
        }
    }

    /// Notes that a lane will have what a request needs, and that it was used.
    pub(super) fn given(&mut self, peer: WorkerPeer, ask: &Ask<'_>) {
        let Some(&index) = self.by_peer.get(&peer) else { return };
        self.given += 1;
        let given = self.given;
        if let Some(lane) = self.row[index].as_mut() {
            lane.last_used = given;
        }
        for needed in ask.adapters {
            self.hold(index, needed.adapter, Tier::Device);
        }
        let serving = self.by_model.get_mut(&ask.shape.model).into_iter().flatten();
        for serving in serving.filter(|serving| serving.lane == index) {
            serving.loaded = true;
        }
    }

    pub(super) fn clear_pledges(&mut self) {
        if std::mem::take(&mut self.pledged) {
            self.row.iter_mut().flatten().for_each(|lane| lane.pledged_us = 0);
        }
    }

    pub(super) fn pledge(&mut self, peer: WorkerPeer, us: u64) {
        self.pledged = true;
        if let Some(lane) = self.by_peer(peer) {
            lane.pledged_us = lane.pledged_us.saturating_add(us);
        }
    }

    pub(super) fn by_peer(&mut self, peer: WorkerPeer) -> Option<&mut Lane> {
        let index = *self.by_peer.get(&peer)?;
        self.row[index].as_mut()
    }

    pub(super) fn find(&self, peer: WorkerPeer) -> Option<&Lane> {
        self.row[*self.by_peer.get(&peer)?].as_ref()
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> &Lane {
        self.row[index].as_ref().expect("what serves a model or holds an adapter is alive")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Lane)> {
        self.row.iter().enumerate().filter_map(|(index, lane)| Some((index, lane.as_ref()?)))
    }

    /// The tier in which a lane holds an adapter.
    pub(super) fn tier(&self, peer: WorkerPeer, adapter: &AdapterId) -> Option<Tier> {
        self.held[*self.by_peer.get(&peer)?].get(adapter).copied()
    }

    /// The lanes that serve a model of this name.
    pub(super) fn serving(&self, model: &ModelName) -> &[Serving] {
        self.by_model.get(model).map_or(&[], Vec::as_slice)
    }

    pub(super) fn name(&self, index: usize) -> &WorkerName {
        &self.names[index]
    }

    /// The lanes that hold an adapter anywhere.
    pub(super) fn holders(&self, adapter: &AdapterId) -> &[(usize, Tier)] {
        self.holders.get(adapter).map_or(&[], Vec::as_slice)
    }

    /// Numbers that lanes may have are below this.
    pub(super) fn len(&self) -> usize {
        self.row.len()
    }

    /// Takes a lane out of those that serve models; says which it had in memory.
    fn stop_serving(&mut self, index: usize) -> Vec<ModelDigest> {
        let mut loaded = Vec::new();
        self.by_model.retain(|_, serving| {
            serving.retain(|serving| {
                let stays = serving.lane != index;
                if !stays && serving.loaded {
                    loaded.push(serving.digest);
                }
                stays
            });
            !serving.is_empty()
        });
        loaded
    }

    fn replace_held(&mut self, index: usize, held: BTreeMap<AdapterId, Tier>) {
        let old = std::mem::take(&mut self.held[index]);
        for adapter in old.keys().filter(|adapter| !held.contains_key(*adapter)) {
            self.let_go(index, adapter);
        }
        for (&adapter, &tier) in &held {
            match old.get(&adapter) {
                Some(&before) if before == tier => {}
                Some(_) => {
                    self.let_go(index, &adapter);
                    self.holders.entry(adapter).or_default().push((index, tier));
                }
                None => self.holders.entry(adapter).or_default().push((index, tier)),
            }
        }
        self.held[index] = held;
    }

    fn hold(&mut self, index: usize, adapter: AdapterId, tier: Tier) {
        match self.held[index].insert(adapter, tier) {
            Some(before) if before == tier => return,
            Some(_) => self.let_go(index, &adapter),
            None => {}
        }
        self.holders.entry(adapter).or_default().push((index, tier));
    }

    fn let_go(&mut self, index: usize, adapter: &AdapterId) {
        if let Some(holders) = self.holders.get_mut(adapter) {
            holders.retain(|&(lane, _)| lane != index);
            if holders.is_empty() {
                self.holders.remove(adapter);
            }
        }
    }
}

/// The same for a name at every broker.
fn hash(name: &WorkerName) -> u64 {
    first_u64(blake3::hash(name.as_str().as_bytes()).as_bytes())
}

/// The first eight bytes of a digest.
pub(super) fn first_u64(digest: &[u8; 32]) -> u64 {
    digest.iter().take(8).fold(0, |number, &byte| (number << 8) | u64::from(byte))
}
