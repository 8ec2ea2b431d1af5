//! Adapters on their way to workers before requests need them: on a client's wish, after an upload,
//! and away from a worker that drains.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use protocol::{
    AdapterId, ErrorCode, Failure, ModelName, WorkerName, limits,
    reply::{WarmAdapter, WarmReply},
    request::Warm,
    worker::Prefetch,
};

use super::{
    encodes::{needed, unknown_lora},
    micros,
};
use crate::{
    Broker, cost::Shape, peer::WorkerPeer, requests::ReplyTo, routing::Ask, warms::Warming,
};

/// A worker to which requests with an adapter go, or would go next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Home {
    peer: WorkerPeer,
    /// Whether it has a slot free.
    free: bool,
}

impl Broker {
    /// Has workers bring adapters into memory, and answers who has them: at once, or when they are
    /// there.
    pub(super) fn warm(
        &mut self,
        from: &ReplyTo,
        request: Warm,
        now: Instant,
    ) -> Result<(), Failure> {
        if let Some(reason) = &self.draining {
            return Err(self.overloaded(&format!("the broker is draining: {reason}")));
        }
        self.check_warm(&request)?;
        let Some(model) = request.model.or_else(|| self.most_served()) else {
            return Err(self.overloaded("no worker is there that could hold the adapters"));
        };
        let count = usize::try_from(request.workers).unwrap_or(usize::MAX);
        let mut wishes: BTreeMap<WorkerPeer, Vec<AdapterId>> = BTreeMap::new();
        for &adapter in &request.adapters {
            for home in self.homes(adapter, &model, count, now) {
                wishes.entry(home.peer).or_default().push(adapter);
            }
        }
        self.tell_prefetch(wishes, now);
        let budget_ms = request.budget_ms.unwrap_or(0).min(limits::BUDGET_MS_MAX);
        let warming = Warming {
            reply_to: from.clone(),
            adapters: request.adapters,
            deadline: now + Duration::from_millis(u64::from(budget_ms)),
        };
        if warming.deadline <= now || self.is_warm(&warming) {
            self.answer_warm(&warming);
        } else {
            self.warms.insert(warming);
        }
        Ok(())
    }

    /// Has the first homes of an adapter that was just uploaded fetch it, unless they have better
    /// things to do.
    pub(super) fn fan_out(&mut self, adapter: AdapterId, now: Instant) {
        let count = self.limits().fan_out;
        if count == 0 || self.draining.is_some() {
            return;
        }
        let Some(model) = self.most_served() else { return };
        let homes = self.homes(adapter, &model, count, now);
        let idle = homes.into_iter().filter(|home| home.free);
        self.tell_prefetch(idle.map(|home| (home.peer, vec![adapter])).collect(), now);
    }

    /// Has the next home of an adapter fetch it, because `leaving` goes; says whether there is one.
    pub(super) fn pass_on(
        &mut self,
        adapter: AdapterId,
        model: &ModelName,
        leaving: WorkerPeer,
        now: Instant,
    ) -> bool {
        let homes = self.homes(adapter, model, 1, now);
        let next = homes.into_iter().find(|home| home.peer != leaving);
        if let Some(home) = next {
            self.tell_prefetch(BTreeMap::from([(home.peer, vec![adapter])]), now);
        }
        next.is_some()
    }

    /// What a worker has by now is no longer being fetched.
    pub(super) fn note_prefetched(&mut self, peer: WorkerPeer) {
        let residency = &self.residency;
        self.prefetches.arrived(peer, |adapter| residency.has_in_memory(peer, adapter));
    }

    /// Answers clients whose adapters are there, or whose time is over.
    pub(super) fn answer_warms(&mut self, now: Instant) {
        let mut warms = std::mem::take(&mut self.warms);
        let over = warms.take(|warming| warming.deadline <= now || self.is_warm(warming));
        self.warms = warms;
        for warming in over {
            self.answer_warm(&warming);
        }
    }

    /// Answers all of them, because the broker drains.
    pub(super) fn answer_all_warms(&mut self) {
        for warming in self.warms.take(|_| true) {
            self.answer_warm(&warming);
        }
    }

    /// The model that most workers serve that take requests.
    pub(super) fn most_served(&self) -> Option<ModelName> {
        let mut served: BTreeMap<&ModelName, usize> = BTreeMap::new();
        let open = self.workers.iter().filter(|(_, worker)| !worker.draining);
        for model in open.flat_map(|(_, worker)| &worker.models) {
            *served.entry(&model.name).or_default() += 1;
        }
        let most = served.into_iter().max_by_key(|&(name, count)| (count, Reverse(name)));
        most.map(|(name, _)| name.clone())
    }

    fn check_warm(&self, request: &Warm) -> Result<(), Failure> {
        let count = request.adapters.len();
        if count > limits::WARM_ADAPTERS_MAX {
            let max = limits::WARM_ADAPTERS_MAX;
            let message =
                format!("`adapters` has {count} entries: at most {max} are warmed at once");
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        if request.workers == 0 {
            let message = "`workers` is 0: name at least 1, or leave it out";
            return Err(Failure::new(ErrorCode::InvalidRequest, message));
        }
        if let Some(unknown) = request.adapters.iter().find(|adapter| !self.is_known(adapter)) {
            return Err(unknown_lora(unknown));
        }
        if let Some(model) = request.model.as_ref().filter(|model| !self.routes.serves(model, None))
        {
            return Err(self.unknown_model(model));
        }
        let waiting = self.warms.len();
        if waiting >= self.limits().warms_waiting_max {
            let reason = format!("{waiting} clients wait for adapters, which is the limit");
            return Err(self.overloaded(&reason));
        }
        Ok(())
    }

    /// At most `count` workers for requests with `adapter`: first those that have it in memory, then
    /// the one that routing takes next, then the others by their estimates.
    fn homes(
        &mut self,
        adapter: AdapterId,
        model: &ModelName,
        count: usize,
        now: Instant,
    ) -> Vec<Home> {
        let shape = Shape { model: model.clone(), chunks: 1, stack: true };
        let adapters = needed(&self.blobs, [&adapter]);
        let ask = Ask {
            shape: &shape,
            digest: None,
            adapters: &adapters,
            died_on: &[],
            number: self.tasks.next_number(),
        };
        let now_us = micros(now.saturating_duration_since(self.started));
        let Some(next) = self.routes.decide(&ask, &self.costs, now_us) else { return Vec::new() };
        let next = Home { peer: next.peer, free: next.free };
        if count == 1 && self.residency.holders(&adapter).next().is_none() {
            return vec![next];
        }
        let verdicts = self.routes.explain(&ask, &self.costs, now_us);
        let open = verdicts.into_iter().filter_map(|verdict| {
            let score = verdict.score.ok()?;
            let home = Home { peer: verdict.peer, free: verdict.free };
            let holds = self.residency.has_in_memory(home.peer, &adapter);
            Some(((!holds, home != next, score.total()), home))
        });
        let mut homes: Vec<_> = open.collect();
        homes.sort_by_key(|(key, _)| *key);
        homes.into_iter().map(|(_, home)| home).take(count).collect()
    }

    /// Tells workers what to fetch, unless they have it or fetch it already.
    fn tell_prefetch(&mut self, wishes: BTreeMap<WorkerPeer, Vec<AdapterId>>, now: Instant) {
        for (peer, mut adapters) in wishes {
            adapters.retain(|adapter| {
                !self.residency.has_in_memory(peer, adapter)
                    && self.prefetches.tell(peer, *adapter, now)
            });
            for adapter in &adapters {
                self.blobs.touch(adapter);
            }
            if !adapters.is_empty() {
                self.tell(peer, &Prefetch { adapters });
            }
        }
    }

    fn is_warm(&self, warming: &Warming) -> bool {
        let fetched = |adapter| self.prefetches.fetchers(adapter).next().is_some();
        !warming.adapters.iter().any(fetched)
    }

    fn answer_warm(&mut self, warming: &Warming) {
        let names = |peers: &mut dyn Iterator<Item = WorkerPeer>| {
            let mut names: Vec<WorkerName> =
                peers.filter_map(|peer| Some(self.workers.get(peer)?.name.clone())).collect();
            names.sort_unstable();
            names
        };
        let adapters = warming.adapters.iter().map(|adapter| WarmAdapter {
            adapter: *adapter,
            held: names(&mut self.residency.holders(adapter)),
            fetching: names(&mut self.prefetches.fetchers(adapter)),
        });
        let id = warming.reply_to.id.clone();
        let reply = WarmReply { id, adapters: adapters.collect() };
        self.reply(&warming.reply_to, &reply);
    }
}
