//! The broker's answers about itself: status, models and adapters.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::{
    AdapterId, ModelName, RequestId, WorkerName,
    reply::{
        ListLorasReply, ListModelsReply, LoraInfo, ModelInfo, ModelStatus, StatusReply,
        WorkerStatus,
    },
};

use crate::{Broker, peer::WorkerPeer, residency::Tier, workers::Worker};

impl Broker {
    /// How the farm is.
    pub(crate) fn status(&self, id: RequestId, now: Instant) -> StatusReply {
        let reasons = self.reasons_not_ready();
        let mut workers: Vec<_> = self
            .workers
            .iter()
            .map(|(peer, worker)| self.worker_status(peer, worker, now))
            .collect();
        workers.sort_by(|a, b| a.worker.cmp(&b.worker));
        StatusReply {
            id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: millis(now.saturating_duration_since(self.started)),
            ready: reasons.is_empty(),
            reasons,
            workers,
            queued: count(self.queue.len()),
            in_flight: count(self.in_flight.wanted()),
            loras: count(self.blobs.len()),
            lora_bytes: self.blobs.bytes(),
            counters: self.counters.clone(),
        }
    }

    /// Every model with the workers that serve it, by name and digest.
    pub(crate) fn models(&self, id: RequestId) -> ListModelsReply {
        let mut serving: BTreeMap<&ModelInfo, Vec<WorkerName>> = BTreeMap::new();
        for (_, worker) in self.workers.iter() {
            for model in &worker.models {
                serving.entry(model).or_default().push(worker.name.clone());
            }
        }
        let models = serving.into_iter().map(|(model, mut workers)| {
            workers.sort_unstable();
            let loaded = self.loaded(&model.name, &workers);
            ModelStatus { model: model.clone(), workers, loaded }
        });
        ListModelsReply { id, models: models.collect() }
    }

    /// Those of `workers` that have `model` in memory.
    fn loaded(&self, model: &ModelName, workers: &[WorkerName]) -> Vec<WorkerName> {
        let has = |worker: &&WorkerName| {
            let peer = self.workers.named(worker);
            peer.is_some_and(|peer| self.residency.has_model(peer, model))
        };
        workers.iter().filter(has).cloned().collect()
    }

    /// Every adapter that the store or a worker holds, by id.
    pub(crate) fn loras(&self, id: RequestId) -> ListLorasReply {
        let stored = self.blobs.iter().map(|blob| blob.adapter);
        let adapters: BTreeSet<_> = stored.chain(self.residency.adapters()).collect();
        ListLorasReply { id, loras: adapters.iter().map(|a| self.lora(a)).collect() }
    }

    /// Why encodes are not answered now; nothing when they are.
    fn reasons_not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Some(reason) = &self.draining {
            reasons.push(format!("the broker is draining: {reason}"));
        }
        if let Some(trouble) = &self.blob_trouble {
            reasons.push(format!("the blob store does not work: {trouble}"));
        }
        let serving = |worker: &Worker| !worker.draining && !worker.models.is_empty();
        if self.workers.iter().next().is_none() {
            reasons.push("no worker has announced itself".to_owned());
        } else if !self.workers.iter().any(|(_, worker)| serving(worker)) {
            reasons.push("every worker is draining or serves no model".to_owned());
            let draining = self.workers.iter().filter(|(_, worker)| worker.drain_reason.is_some());
            let draining = draining.map(|(_, w)| format!("worker {} drains", w.describe_drain()));
            reasons.extend(draining);
        }
        reasons
    }

    fn worker_status(&self, peer: WorkerPeer, worker: &Worker, now: Instant) -> WorkerStatus {
        let report = self.residency.report(peer);
        let number = |tier| count(report.map_or(0, |report| report.count(tier)));
        WorkerStatus {
            worker: worker.name.clone(),
            pid: worker.pid,
            device: worker.device.clone(),
            models: worker.models.iter().map(|model| model.name.clone()).collect(),
            loaded: report
                .map(|report| report.models.iter().cloned().collect())
                .unwrap_or_default(),
            resident: number(Tier::Device),
            host: number(Tier::Host),
            disk: number(Tier::Disk),
            in_flight: count(self.in_flight.load(peer)),
            draining: worker.draining,
            drain_reason: worker.drain_reason.clone(),
            prefetching: count(self.prefetches.count(peer)),
            silent_ms: millis(now.saturating_duration_since(worker.heard)),
        }
    }

    fn lora(&self, adapter: &AdapterId) -> LoraInfo {
        let blob = self.blobs.get(adapter);
        let holders = self.residency.holders(adapter).filter_map(|peer| self.workers.get(peer));
        let mut workers: Vec<_> = holders.map(|worker| worker.name.clone()).collect();
        workers.sort_unstable();
        LoraInfo {
            adapter: *adapter,
            bytes: blob.map_or(0, |blob| blob.bytes),
            label: blob.and_then(|blob| blob.label.clone()),
            stored: blob.is_some(),
            workers,
        }
    }
}

/// A count as the wire has it.
fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A duration as the wire has it.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
