//! What a worker tells the broker: who it is, what it holds, and answers.

use bytes::Bytes;
use protocol::{
    ErrorCode, ErrorReply, Failure, RequestId, WorkerName, frames, header,
    worker::{Alive, Done, Inventory, Ready},
};
use worker_core::DispatchId;

use super::{Running, journal::Journal};
use crate::env::Env;

impl Running {
    pub(super) fn name(&self) -> WorkerName {
        self.owner.0.to_string().parse().expect("a plain word")
    }

    pub(super) fn fail(
        &self,
        dispatch: DispatchId,
        id: Option<RequestId>,
        failure: Failure,
        env: &mut Env,
    ) {
        let code = failure.code;
        let reply: ErrorReply = failure.into_reply(id);
        self.done(dispatch, Some(code), vec![header::write(&reply).into()], env);
    }

    pub(super) fn done(
        &self,
        dispatch: DispatchId,
        failed: Option<ErrorCode>,
        reply: Vec<Bytes>,
        env: &mut Env,
    ) {
        let done = Done { epoch: self.epoch, dispatch: dispatch.0, failed, ..Done::default() };
        let frames = frames::frames(&done, reply);
        // A `done` that comes twice is allowed: the broker forgets a dispatch with the first.
        if env.random.chance(env.plan.duplicates) {
            self.dealer.send(frames.clone(), env);
        }
        self.dealer.send(frames, env);
    }

    pub(super) fn announce(&mut self, journal: &Journal, env: &mut Env) {
        let ready = Ready {
            worker: self.name(),
            epoch: self.epoch,
            pid: self.owner.1,
            version: "0".to_owned(),
            device: "none".to_owned(),
            slots: u32::try_from(self.slots).expect("a small number"),
            models: self.models.values().cloned().collect(),
            revision: self.scheduler.revision(),
            inventory: self.inventory(),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: self.leaving.is_some(),
            died_with: journal.deaths(env.now),
        };
        self.announced_revision = Some(ready.revision);
        self.dealer.send(frames::frames(&ready, Vec::new()), env);
    }

    pub(super) fn alive(&mut self, env: &mut Env) {
        let revision = self.scheduler.revision();
        let changed = self.announced_revision != Some(revision);
        let alive = Alive {
            epoch: self.epoch,
            revision,
            inventory: changed.then(|| self.inventory()),
            resident_digest: Some(self.inventory().digest()),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            prefetching: self.scheduler.prefetching().collect(),
            draining: self.leaving.is_some(),
            drain_reason: None,
        };
        if self.dealer.send(frames::frames(&alive, Vec::new()), env) {
            self.announced_revision = Some(revision);
        }
    }

    pub(super) fn inventory(&self) -> Inventory {
        let registry = self.scheduler.registry();
        Inventory {
            device: registry.on_device().collect(),
            host: registry.on_host().collect(),
            disk: registry.on_disk().collect(),
            models: self.scheduler.models().loaded().cloned().collect(),
        }
    }
}
