//! The workers that announced themselves, and the models they serve.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::{ModelDigest, ModelName, WorkerName, reply::ModelInfo, worker::Ready};

use crate::peer::WorkerPeer;

/// Model names that are remembered after their workers left.
const KNOWN_MODELS_MAX: usize = 4096;

/// One live worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) name: WorkerName,
    pub(crate) epoch: u64,
    pub(crate) pid: u32,
    pub(crate) device: String,
    pub(crate) slots: usize,
    pub(crate) models: BTreeSet<ModelInfo>,
    pub(crate) draining: bool,
    /// Why it drains, if that was said.
    pub(crate) drain_reason: Option<String>,
    pub(crate) heard: Instant,
    /// Registered models that this process cannot serve: it is not asked again.
    pub(crate) refused: BTreeSet<ModelName>,
}

/// Live workers by connection.
#[derive(Debug, Default)]
pub(crate) struct Workers {
    live: BTreeMap<WorkerPeer, Worker>,
    /// Connections whose name was taken over by a newer process; they are not listened to.
    superseded: BTreeSet<WorkerPeer>,
    /// Every model that was ever served or registered, so that requests wait when its workers are
    /// away.
    known: BTreeMap<ModelName, BTreeSet<ModelDigest>>,
    first_ready: Option<Instant>,
}

/// How things stand with a model.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// A live worker serves it.
    Served,
    /// It was served or registered once and no live worker serves it now.
    Away,
    /// The name is known, with these digests, and the digest asked for is not.
    OtherDigest(BTreeSet<ModelDigest>),
    /// Nobody ever served it.
    Unknown,
}

impl Worker {
    /// The worker that `ready` describes.
    pub(crate) fn new(ready: &Ready, slots_max: usize, now: Instant) -> Self {
        let slots = usize::try_from(ready.slots).unwrap_or(usize::MAX).min(slots_max);
        Self {
            name: ready.worker.clone(),
            epoch: ready.epoch,
            pid: ready.pid,
            device: ready.device.clone(),
            slots,
            models: ready.models.iter().cloned().collect(),
            draining: ready.draining,
            drain_reason: None,
            heard: now,
            refused: BTreeSet::new(),
        }
    }

    /// Its name and why it drains.
    pub(crate) fn describe_drain(&self) -> String {
        match &self.drain_reason {
            Some(reason) => format!("`{}` ({reason})", self.name),
            None => format!("`{}`", self.name),
        }
    }

    /// Whether it serves the model, of that digest if one is given.
    pub(crate) fn serves(&self, model: &ModelName, digest: Option<ModelDigest>) -> bool {
        let matches =
            |info: &ModelInfo| info.name == *model && digest.is_none_or(|d| d == info.digest);
        self.models.iter().any(matches)
    }
}

impl Workers {
    /// Takes in a worker, in place of whatever was known of its connection.
    pub(crate) fn insert(&mut self, peer: WorkerPeer, worker: Worker, now: Instant) {
        self.first_ready.get_or_insert(now);
        self.superseded.remove(&peer);
        for model in &worker.models {
            self.expect(&model.name, model.digest);
        }
        self.live.insert(peer, worker);
    }

    /// Remembers a model that is served, or will be when its workers come.
    pub(crate) fn expect(&mut self, model: &ModelName, digest: ModelDigest) {
        if self.known.len() < KNOWN_MODELS_MAX || self.known.contains_key(model) {
            self.known.entry(model.clone()).or_default().insert(digest);
        }
    }

    /// A worker serves one more model, in place of what it served under the name.
    pub(crate) fn add_model(&mut self, peer: WorkerPeer, model: ModelInfo) {
        self.expect(&model.name, model.digest);
        if let Some(worker) = self.live.get_mut(&peer) {
            worker.refused.remove(&model.name);
            worker.models.retain(|known| known.name != model.name);
            worker.models.insert(model);
        }
    }

    /// The digests that live workers serve under this name.
    pub(crate) fn digests(&self, model: &ModelName) -> BTreeSet<ModelDigest> {
        let models = self.live.values().flat_map(|worker| &worker.models);
        models.filter(|info| info.name == *model).map(|info| info.digest).collect()
    }

    pub(crate) fn get(&self, peer: WorkerPeer) -> Option<&Worker> {
        self.live.get(&peer)
    }

    pub(crate) fn get_mut(&mut self, peer: WorkerPeer) -> Option<&mut Worker> {
        self.live.get_mut(&peer)
    }

    pub(crate) fn remove(&mut self, peer: WorkerPeer) -> Option<Worker> {
        self.live.remove(&peer)
    }

    /// Stops listening to a connection until it is closed.
    pub(crate) fn supersede(&mut self, peer: WorkerPeer) {
        self.superseded.insert(peer);
    }

    pub(crate) fn is_superseded(&self, peer: WorkerPeer) -> bool {
        self.superseded.contains(&peer)
    }

    /// Forgets that a connection was superseded: it is closed.
    pub(crate) fn forget_superseded(&mut self, peer: WorkerPeer) {
        self.superseded.remove(&peer);
    }

    /// The live worker of this name.
    pub(crate) fn named(&self, name: &WorkerName) -> Option<WorkerPeer> {
        self.live.iter().find(|(_, worker)| worker.name == *name).map(|(&peer, _)| peer)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (WorkerPeer, &Worker)> {
        self.live.iter().map(|(&peer, worker)| (peer, worker))
    }

    /// How things stand with a model.
    pub(crate) fn standing(&self, model: &ModelName, digest: Option<ModelDigest>) -> Standing {
        if self.live.values().any(|worker| worker.serves(model, digest)) {
            return Standing::Served;
        }
        match (self.known.get(model), digest) {
            (None, _) => Standing::Unknown,
            (Some(known), Some(digest)) if !known.contains(&digest) => {
                Standing::OtherDigest(known.clone())
            }
            // A digest that was replaced while its workers were away does not come back.
            (Some(_), Some(_)) if self.live.values().any(|worker| worker.serves(model, None)) => {
                Standing::OtherDigest(self.digests(model))
            }
            (Some(_), _) => Standing::Away,
        }
    }

    /// The names of all models that were ever served or registered.
    pub(crate) fn known_models(&self) -> impl Iterator<Item = &ModelName> {
        self.known.keys()
    }

    /// When the first worker announced itself.
    pub(crate) fn first_ready(&self) -> Option<Instant> {
        self.first_ready
    }

    /// Workers that were not heard for `silence`.
    pub(crate) fn silent(&self, silence: Duration, now: Instant) -> Vec<WorkerPeer> {
        let silent = self.live.iter().filter(|(_, worker)| worker.heard + silence <= now);
        silent.map(|(&peer, _)| peer).collect()
    }

    /// When the next worker counts as silent unless it is heard.
    pub(crate) fn next_silence(&self, silence: Duration) -> Option<Instant> {
        self.live.values().map(|worker| worker.heard + silence).min()
    }
}
