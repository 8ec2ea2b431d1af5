//! Which worker gets a request: filter, score, pick.
//!
//! The score is the estimated time until the answer: the work that a worker has already, loading
//! what it lacks, and computing. The lowest wins. So a worker that holds the adapters wins until
//! it is so busy that loading them elsewhere is faster; then the request spills over and the
//! adapter is replicated. A worker without a free slot takes part: waiting for it can be faster
//! than loading elsewhere.
//!
//! Workers with nearly the same score are told apart without chance. When an adapter is held
//! nowhere, rendezvous hashing of its id and the workers' names gives it its first home, the same
//! one at every broker. Otherwise two workers are drawn by the request's number and the less used
//! one wins, so that brokers that do not know of each other do not herd.
//!
//! [`RoutingTable`] is a view for fast decisions: what it says is fed from the tables that own the
//! truth. Nothing is allocated for a decision once its scratch space has grown.

mod ask;
mod lanes;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use protocol::{
    AdapterId, ModelDigest, ModelName,
    reply::{ModelInfo, Refusal},
    worker::Inventory,
};

use crate::{
    cost::{CostModel, Tier},
    outliers::Health,
    peer::WorkerPeer,
};
pub use ask::{Ask, Decision, Needed, ScoreUs, Verdict};
pub use lanes::{Busy, LaneInfo, Loading};
use lanes::{Lane, Lanes, Serving, first_u64};

/// Scores that are above the best by one part in so many, and by at most so many microseconds,
/// count as equal to it.
const SLACK_WARM: (u64, u64) = (32, 250);
/// The same for a request whose adapter has no home yet.
const SLACK_COLD: (u64, u64) = (8, 10_000);

/// The live workers as routing sees them.
#[derive(Debug)]
pub struct RoutingTable {
    lanes: Lanes,
    seed: u64,
    /// By lane: what loads of the request at hand cost less there. All zero between decisions.
    notes: Vec<Note>,
    noted: Vec<usize>,
    candidates: Vec<Scored>,
}

/// What a lane holds of the adapters that a request needs.
#[derive(Debug, Clone, Copy, Default)]
struct Note {
    saved_us: u64,
    extra_us: u64,
    /// Adapters held here that the blob store does not have.
    unstored: usize,
}

#[derive(Debug, Clone, Copy)]
struct Scored {
    /// Its place among those that serve the model.
    serving: usize,
    lane: usize,
    total_us: u64,
    free: bool,
}

/// What a request costs where none of its adapters is.
#[derive(Debug, Clone, Copy)]
struct Basis {
    compute_us: u64,
    loads_us: u64,
    unstored: usize,
    /// The first adapter that is held nowhere.
    cold: Option<AdapterId>,
}

/// One question to every worker.
#[derive(Debug, Clone, Copy)]
struct Query<'a> {
    ask: &'a Ask<'a>,
    basis: Basis,
    costs: &'a CostModel,
    filter: Filter,
    now_us: u64,
}

/// Whether workers that are left out for their failures are candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filter {
    Strict,
    Lenient,
}

impl Basis {
    /// The highest score that counts as equal to `best_us`.
    const fn close_us(&self, best_us: u64) -> u64 {
        let (part, most) = if self.cold.is_some() { SLACK_COLD } else { SLACK_WARM };
        let slack = best_us / part;
        best_us.saturating_add(if slack < most { slack } else { most })
    }
}

impl RoutingTable {
    /// No workers. Ties are broken by `seed` and the requests' numbers.
    pub fn new(seed: u64) -> Self {
        Self {
            lanes: Lanes::default(),
            seed,
            notes: Vec::new(),
            noted: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// The worker that the request goes to or waits for; nothing when none can do it.
    pub fn decide(&mut self, ask: &Ask<'_>, costs: &CostModel, now_us: u64) -> Option<Decision> {
        let basis = self.note_loads(ask, costs);
        // A worker that keeps failing is better than none, and so is one that came back.
        let decision = [Filter::Strict, Filter::Lenient].into_iter().find_map(|filter| {
            let query = Query { ask, basis, costs, filter, now_us };
            self.score_all(&query);
            self.pick(&query)
        });
        self.clear_notes();
        decision
    }

    /// What [`decide`](Self::decide) goes by: a verdict on every worker, by name.
    pub fn explain(&mut self, ask: &Ask<'_>, costs: &CostModel, now_us: u64) -> Vec<Verdict> {
        let basis = self.note_loads(ask, costs);
        let asked = |serving: &&Serving| ask.digest.is_none_or(|asked| asked == serving.digest);
        let serving = self.lanes.serving(&ask.shape.model).iter().filter(asked);
        let serving: BTreeMap<usize, &Serving> = serving.map(|s| (s.lane, s)).collect();
        let query = Query { ask, basis, costs, filter: Filter::Strict, now_us };
        let mut verdicts: Vec<_> = self
            .lanes
            .iter()
            .map(|(index, lane)| {
                let score = match serving.get(&index) {
                    None => Err(Refusal::NotServed),
                    Some(serving) => self.judge(serving, &query),
                };
                let worker = self.lanes.name(index).clone();
                Verdict { worker, peer: lane.peer, free: lane.is_free(), score }
            })
            .collect();
        self.clear_notes();
        verdicts.sort_by(|a, b| a.worker.cmp(&b.worker));
        verdicts
    }

    /// Whether a worker serves the model, of that digest if one is given.
    pub fn serves(&self, model: &ModelName, digest: Option<ModelDigest>) -> bool {
        let serving = self.lanes.serving(model);
        serving.iter().any(|serving| digest.is_none_or(|asked| asked == serving.digest))
    }

    /// Whether a worker holds an adapter anywhere.
    pub fn holds(&self, peer: WorkerPeer, adapter: &AdapterId) -> bool {
        self.lanes.tier(peer, adapter).is_some()
    }

    /// Whether a worker that serves the model has a slot free and takes new requests.
    pub fn has_room(&self, model: &ModelName) -> bool {
        self.lanes.serving(model).iter().any(|serving| self.lanes.get(serving.lane).is_free())
    }

    /// How many workers serve the model and take new requests, and when the first of them is done
    /// with what it has.
    pub fn capacity(&self, model: &ModelName, now_us: u64) -> (usize, u64) {
        let open = self.lanes.serving(model).iter().map(|serving| self.lanes.get(serving.lane));
        let open = open.filter(|lane| !lane.draining && lane.slots > 0);
        open.fold((0, u64::MAX), |(count, soonest), lane| {
            (count + 1, soonest.min(lane.backlog_us(now_us)))
        })
    }

    /// Takes in a worker, in place of whatever was known of its connection.
    pub fn insert(&mut self, peer: WorkerPeer, info: LaneInfo<'_>) {
        self.lanes.insert(peer, info);
    }

    /// Replaces the models that a worker serves.
    pub fn set_models<'a>(
        &mut self,
        peer: WorkerPeer,
        models: impl IntoIterator<Item = &'a ModelInfo>,
    ) {
        self.lanes.set_models(peer, models);
    }

    /// Forgets a worker.
    pub fn remove(&mut self, peer: WorkerPeer) {
        self.lanes.remove(peer);
    }

    /// Replaces what a worker holds. What work in hand needs counts as held: `expected` adapters
    /// and models are being loaded, whatever the report says.
    pub fn set_inventory(
        &mut self,
        peer: WorkerPeer,
        inventory: &Inventory,
        expected: impl IntoIterator<Item = AdapterId>,
    ) {
        self.lanes.set_inventory(peer, inventory, expected);
    }

    /// Notes that a worker was given the request: it will have what it lacks.
    pub fn given(&mut self, peer: WorkerPeer, ask: &Ask<'_>) {
        self.lanes.given(peer, ask);
    }

    /// Replaces what is known of the work that a worker has.
    pub fn set_busy(&mut self, peer: WorkerPeer, busy: Busy) {
        if let Some(lane) = self.lanes.by_peer(peer) {
            lane.taken = busy.taken;
            lane.free_at_us = busy.free_at_us;
            lane.floor_us = busy.floor_us;
        }
    }

    /// What is known of the work that a worker has.
    #[cfg(test)]
    pub(crate) fn busy(&self, peer: WorkerPeer) -> Option<Busy> {
        let lane = self.lanes.find(peer)?;
        let (taken, free_at_us, floor_us) = (lane.taken, lane.free_at_us, lane.floor_us);
        Some(Busy { taken, free_at_us, floor_us })
    }

    /// Notes whether a worker takes new requests.
    pub fn set_draining(&mut self, peer: WorkerPeer, draining: bool) {
        if let Some(lane) = self.lanes.by_peer(peer) {
            lane.draining = draining;
        }
    }

    /// Notes whether a worker is kept for a request that has to run alone.
    pub fn set_kept(&mut self, peer: WorkerPeer, kept: bool) {
        if let Some(lane) = self.lanes.by_peer(peer) {
            lane.kept = kept;
        }
    }

    /// Notes how far a worker is trusted.
    pub fn set_health(&mut self, peer: WorkerPeer, health: Health) {
        if let Some(lane) = self.lanes.by_peer(peer) {
            lane.health = health;
        }
    }

    /// Learns how a worker's device compares with the average: it took `us` for what was estimated
    /// at `estimate_us`.
    pub fn observe_speed(&mut self, peer: WorkerPeer, us: f64, estimate_us: u64) {
        if let Some(lane) = self.lanes.by_peer(peer) {
            lane.observe_speed(us, estimate_us);
        }
    }

    /// Notes that a request waits for a worker, so that later ones stand behind it.
    pub fn pledge(&mut self, peer: WorkerPeer, us: u64) {
        self.lanes.pledge(peer, us);
    }

    /// Forgets all pledges.
    pub fn clear_pledges(&mut self) {
        self.lanes.clear_pledges();
    }

    /// Whether it is worth waiting for a worker: it is well, and has no slot free.
    pub fn is_worth_waiting(&self, peer: WorkerPeer) -> bool {
        let worth = |lane: &Lane| !lane.draining && lane.health == Health::Well && !lane.is_free();
        self.lanes.find(peer).is_some_and(worth)
    }

    /// What a worker will have to load for a request, by what is known now.
    pub fn loading(&self, decision: &Decision, adapters: &[Needed]) -> Loading {
        let mut bytes = [0; 4];
        for needed in adapters {
            let tier = self.lanes.tier(decision.peer, &needed.adapter).unwrap_or(Tier::Broker);
            bytes[tier as usize] += needed.stored_bytes.unwrap_or(0);
        }
        let tiers = [Tier::Host, Tier::Disk, Tier::Broker];
        let mut from = tiers.into_iter().filter(|&tier| bytes[tier as usize] > 0);
        let only = from.next().filter(|_| from.next().is_none() && decision.score.model == 0);
        let any = decision.score.load > 0 || decision.score.model > 0;
        Loading { from: only.map(|tier| (tier, bytes[tier as usize])), any }
    }

    /// Sums up what the adapters cost to load, and notes for every holder what it has of them.
    fn note_loads(&mut self, ask: &Ask<'_>, costs: &CostModel) -> Basis {
        self.notes.resize(self.lanes.len(), Note::default());
        let mut basis =
            Basis { compute_us: costs.compute_us(ask.shape), loads_us: 0, unstored: 0, cold: None };
        for needed in ask.adapters {
            let bytes = needed.stored_bytes.unwrap_or(0);
            let tiers = [Tier::Device, Tier::Host, Tier::Disk, Tier::Broker];
            let [device, host, disk, broker] = tiers.map(|tier| costs.load_us(tier, bytes));
            if needed.stored_bytes.is_some() {
                basis.loads_us = basis.loads_us.saturating_add(broker);
            } else {
                basis.unstored += 1;
            }
            let holders = self.lanes.holders(&needed.adapter);
            if holders.is_empty() {
                basis.cold = basis.cold.or(Some(needed.adapter));
            }
            for &(lane, tier) in holders {
                let here = [device, host, disk, broker][tier as usize];
                let note = &mut self.notes[lane];
                if needed.stored_bytes.is_some() {
                    note.saved_us += broker.saturating_sub(here);
                } else {
                    note.unstored += 1;
                    note.extra_us += here;
                }
                self.noted.push(lane);
            }
        }
        basis
    }

    fn clear_notes(&mut self) {
        for lane in self.noted.drain(..) {
            self.notes[lane] = Note::default();
        }
    }

    /// Scores every worker that passes the filter, and keeps those that are close to the best.
    fn score_all(&mut self, query: &Query<'_>) {
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        let mut bound_us = u64::MAX;
        for (index, serving) in self.lanes.serving(&query.ask.shape.model).iter().enumerate() {
            let Ok(score) = self.judge(serving, query) else { continue };
            let total_us = score.total();
            if total_us <= bound_us {
                bound_us = bound_us.min(query.basis.close_us(total_us));
                let free = self.lanes.get(serving.lane).is_free();
                candidates.push(Scored { serving: index, lane: serving.lane, total_us, free });
            }
        }
        candidates.retain(|scored| scored.total_us <= bound_us);
        if candidates.iter().any(|scored| scored.free) {
            candidates.retain(|scored| scored.free);
        }
        self.candidates = candidates;
    }

    /// The filter and the score of one worker; the only place where either is made.
    #[inline]
    fn judge(&self, serving: &Serving, query: &Query<'_>) -> Result<ScoreUs, Refusal> {
        let Query { ask, basis, costs, filter, now_us } = query;
        let lane = self.lanes.get(serving.lane);
        let note = self.notes[serving.lane];
        if ask.digest.is_some_and(|asked| asked != serving.digest) {
            return Err(Refusal::NotServed);
        }
        if lane.draining {
            return Err(Refusal::Draining);
        }
        if lane.slots == 0 {
            return Err(Refusal::NoSlots);
        }
        if lane.kept {
            return Err(Refusal::Isolated);
        }
        if note.unstored < basis.unstored {
            return Err(Refusal::LacksAdapter);
        }
        if *filter == Filter::Strict {
            if lane.health == Health::Ejected {
                return Err(Refusal::Ejected);
            }
            if ask.died_on.contains(&lane.peer) {
                return Err(Refusal::DiedHere);
            }
        }
        let model = if serving.loaded { 0 } else { costs.load_us(Tier::Disk, serving.bytes) };
        Ok(ScoreUs {
            queue: lane.queue_us(*now_us),
            load: basis.loads_us.saturating_sub(note.saved_us).saturating_add(note.extra_us),
            model,
            compute: lane.scaled_us(basis.compute_us),
        })
    }

    /// Of the candidates that are close to the best, the one that hashing says.
    fn pick(&self, query: &Query<'_>) -> Option<Decision> {
        let chosen = match query.basis.cold {
            Some(adapter) => self.first_home(self.candidates.iter(), &adapter),
            None => self.less_used_of_two(self.candidates.iter(), query.ask.number),
        }?;
        let serving = self.lanes.serving(&query.ask.shape.model).get(chosen.serving)?;
        let score = self.judge(serving, query).ok()?;
        let peer = self.lanes.get(chosen.lane).peer;
        Some(Decision { peer, free: chosen.free, score })
    }

    /// Rendezvous hashing: the highest hash of adapter and worker wins.
    fn first_home<'a>(
        &self,
        equals: impl Iterator<Item = &'a Scored>,
        adapter: &AdapterId,
    ) -> Option<&'a Scored> {
        let adapter = first_u64(adapter.as_bytes());
        equals.max_by_key(|scored| mix(adapter ^ self.lanes.get(scored.lane).name_hash))
    }

    /// Draws two by the request's number; the emptier and less recently used one wins.
    fn less_used_of_two<'a>(
        &self,
        equals: impl Iterator<Item = &'a Scored>,
        number: u64,
    ) -> Option<&'a Scored> {
        let salt = mix(self.seed ^ number);
        let mut drawn: [Option<(u64, &Scored)>; 2] = [None, None];
        for scored in equals {
            let ticket = mix(salt ^ self.lanes.get(scored.lane).name_hash);
            match drawn {
                [first, _] if first.is_none_or(|(least, _)| ticket < least) => {
                    drawn = [Some((ticket, scored)), first];
                }
                [first, second] if second.is_none_or(|(least, _)| ticket < least) => {
                    drawn = [first, Some((ticket, scored))];
                }
                _ => {}
            }
        }
        let drawn = drawn.into_iter().flatten().map(|(_, scored)| scored);
        drawn.min_by_key(|scored| {
            let lane = self.lanes.get(scored.lane);
            (lane.taken, lane.last_used, lane.peer)
        })
    }
}

/// The finalizer of `SplitMix64`: spreads consecutive numbers over all 64 bits, one to one.
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
