//! Models that are registered while the farm runs.
//!
//! A registered name stands for one digest: that of the first worker that read the files. A worker
//! that serves something else under the name is not used for it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use protocol::{
    Envelope, ErrorCode, Failure, ModelDigest, ModelName, WorkerName, limits,
    reply::{ModelInfo, RegisterModelReply, WorkerFailure},
    request::{ModelFile, RegisterModel},
    worker::{Ready, Registered},
};

use super::{clients::read, millis};
use crate::{
    Broker,
    blob::BlobOp,
    command::Notice,
    jobs::Purpose,
    peer::WorkerPeer,
    registrations::{ModelSpec, NoRegistration, Outcome, Registration, RegistrationRoom, Waiter},
    requests::ReplyTo,
};

impl Broker {
    /// A client wants a model served: every worker is asked, and the client is answered once.
    pub(super) fn register_model(
        &mut self,
        from: &ReplyTo,
        envelope: &Envelope,
        now: Instant,
    ) -> Result<(), Failure> {
        if let Some(reason) = &self.draining {
            return Err(self.overloaded(&format!("the broker is draining: {reason}")));
        }
        let RegisterModel { name, family, files, budget_ms, .. } = read(envelope)?;
        let spec = ModelSpec { name, family, files };
        check_files(&spec)?;
        let budget = self.budget(budget_ms)?;
        self.check_held(&spec)?;
        let workers = self.takers();
        if workers.is_empty() {
            return Err(self.overloaded("no worker is there that could serve the model"));
        }
        let limits = self.limits();
        let room = RegistrationRoom {
            known: limits.registrations_max,
            open: limits.registrations_open_max,
            waiting: limits.registrations_waiting_max,
        };
        self.registrations.admit(&spec, room).map_err(|error| self.no_registration(&error))?;
        for blob in blobs(&spec) {
            self.model_files.touch(&blob);
        }
        let waiter = Waiter { reply_to: from.clone(), budget, deadline: now + budget };
        for (peer, register) in self.registrations.question(&spec, &workers, waiter) {
            self.tell(peer, &register);
        }
        Ok(())
    }

    /// A worker serves a model that it was asked to serve, or says why not.
    pub(super) fn worker_registered(
        &mut self,
        peer: WorkerPeer,
        registered: Registered,
        now: Instant,
    ) {
        let Registered { epoch, ticket, model, failure } = registered;
        let Some(worker) = self.workers.get(peer).filter(|worker| worker.epoch == epoch) else {
            return;
        };
        let worker = worker.name.clone();
        // An unknown ticket is of an earlier broker or connection; the worker's next `ready` tells.
        let Some(spec) = self.registrations.answered(peer, ticket) else { return };
        let answer = match (model, failure) {
            (Some(model), None) => self.accept(&worker, &spec, model),
            (None, Some(failure)) => Err(failure),
            _ => Err(Failure::new(ErrorCode::Internal, "the worker gave no answer, or two")),
        };
        match &answer {
            Ok(model) => self.serve(peer, &worker, spec.clone(), model.clone(), now),
            Err(failure) => self.not_served(peer, &worker, &spec.name, failure, now),
        }
        self.note_answer((peer, &worker), &spec.name, answer);
        self.dispatch(now);
    }

    /// A worker is gone or has reconnected: what it was asked is answered for it.
    pub(super) fn registrations_lost(&mut self, peer: WorkerPeer, worker: &WorkerName) {
        for name in self.registrations.remove_worker(peer) {
            let message = format!("worker `{worker}` left before it served model `{name}`");
            let failure = Failure::new(ErrorCode::WorkerLost, message);
            self.note_answer((peer, worker), &name, Err(failure));
        }
    }

    /// Asks a worker for the registered models that it does not serve.
    pub(super) fn ask_for_missing(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.get(peer).filter(|worker| !worker.draining) else { return };
        let lacks = |name: &ModelName| {
            !worker.refused.contains(name) && !worker.models.iter().any(|m| m.name == *name)
        };
        let registered = self.registrations.all().filter(|known| lacks(&known.spec.name));
        let specs: Vec<_> = registered.map(|known| known.spec.clone()).collect();
        for spec in specs {
            if let Some(register) = self.registrations.ask(peer, &spec) {
                self.tell(peer, &register);
            }
        }
    }

    /// Leaves out what a worker serves under a registered name although it is another model.
    pub(super) fn apply_registrations(&mut self, peer: WorkerPeer) {
        let Some(worker) = self.workers.get_mut(peer) else { return };
        let mut conflicts = Vec::new();
        for model in &worker.models {
            match self.registrations.known(&model.name) {
                Some(known) if known.digest != model.digest => {
                    conflicts.push(Notice::ModelConflict {
                        worker: worker.name.clone(),
                        model: model.name.clone(),
                        found: model.digest,
                        registered: known.digest,
                    });
                }
                _ => {}
            }
        }
        for notice in conflicts {
            if let Notice::ModelConflict { model, found, .. } = &notice {
                worker.models.retain(|info| info.name != *model || info.digest != *found);
                worker.refused.insert(model.clone());
            }
            self.commands.push_back(crate::Command::Notice(notice));
        }
        self.routes.set_models(peer, &worker.models);
    }

    /// What `ready` lists although the worker was refused for the name, and the name stands for
    /// another model. What it served all along, it goes on serving.
    pub(super) fn rejected_models(
        &self,
        ready: &Ready,
        refused: &BTreeSet<ModelName>,
    ) -> BTreeSet<ModelInfo> {
        let known = self.workers.named(&ready.worker).and_then(|peer| self.workers.get(peer));
        let is_rejected = |model: &&ModelInfo| {
            refused.contains(&model.name)
                // What differs from a registration is told as a conflict by `apply_registrations`.
                && self.registrations.known(&model.name).is_none_or(|k| k.digest == model.digest)
                && !known.is_some_and(|worker| worker.models.contains(*model))
                && self.digest_of(&model.name) != Some(model.digest)
        };
        ready.models.iter().filter(is_rejected).cloned().collect()
    }

    /// What was registered before the start.
    pub(super) fn registration_found(&mut self, registration: Registration) {
        self.workers.expect(&registration.spec.name, registration.digest);
        self.registrations.remember(registration);
    }

    /// Answers clients whose time is over, and asks workers again that could not serve a model.
    pub(super) fn expire_registrations(&mut self, now: Instant) {
        let workers = &self.workers;
        let late = |peer, waiter: &Waiter| {
            let worker = workers.get(peer)?.name.clone();
            let message = format!(
                "worker `{worker}` did not answer within {} ms and may still read the model: ask again",
                waiter.budget.as_millis()
            );
            let failure = Failure::new(ErrorCode::DeadlineExceeded, message);
            Some(WorkerFailure { worker, failure })
        };
        for (waiter, outcome) in self.registrations.expired(now, late) {
            self.answer_registration(&waiter.reply_to, outcome);
        }
        for (peer, _) in self.registrations.due_retries(now) {
            self.ask_for_missing(peer);
        }
    }

    /// What a worker read, if it is the model that the name stands for.
    fn accept(
        &self,
        worker: &WorkerName,
        spec: &ModelSpec,
        model: ModelInfo,
    ) -> Result<ModelInfo, Failure> {
        if model.name != spec.name || model.family != spec.family {
            let message = format!(
                "worker `{worker}` answered with model `{}` of family {} instead of `{}` of family {}",
                model.name, model.family, spec.name, spec.family
            );
            return Err(Failure::new(ErrorCode::Internal, message));
        }
        match self.digest_of(&spec.name) {
            Some(digest) if digest != model.digest => {
                let message = format!(
                    "worker `{worker}` read digest `{}` for model `{}`, which stands for `{digest}`: \
                     register it under another name, or have the same files on every machine",
                    model.digest, spec.name
                );
                Err(Failure::new(ErrorCode::InvalidRequest, message))
            }
            _ => Ok(model),
        }
    }

    /// The digest that a name stands for, unless it is free.
    fn digest_of(&self, name: &ModelName) -> Option<ModelDigest> {
        let question = self.registrations.asking(name);
        if let Some((_, first)) = question.and_then(|question| question.serving.first()) {
            return Some(first.digest);
        }
        let known = self.registrations.known(name).map(|known| known.digest);
        let served = self.workers.digests(name);
        match known {
            Some(known) if served.contains(&known) => Some(known),
            // What no worker serves may be registered anew, but only by somebody who asks for it.
            Some(known) if served.is_empty() && question.is_none() => Some(known),
            _ => served.first().copied(),
        }
    }

    /// A worker serves a model from now on, and the name stands for it.
    fn serve(
        &mut self,
        peer: WorkerPeer,
        worker: &WorkerName,
        spec: ModelSpec,
        model: ModelInfo,
        now: Instant,
    ) {
        let name = spec.name.clone();
        let is_asked_for = self.registrations.asking(&name).is_some();
        let digest = model.digest;
        self.answers.forget_others(&name, digest);
        self.workers.add_model(peer, model);
        if let Some(worker) = self.workers.get(peer) {
            self.routes.set_models(peer, &worker.models);
        }
        if !is_asked_for && self.registrations.known(&name).is_some_and(|k| k.digest == digest) {
            return;
        }
        if self.registrations.remember(Registration { spec, digest }) {
            self.notice(Notice::ModelRegistered { model: name, digest, worker: worker.clone() });
            let registrations = self.registrations.all().cloned().collect();
            self.give_job(BlobOp::Remember { registrations }, Purpose::Remember, None, now);
            let peers: Vec<_> = self.workers.iter().map(|(peer, _)| peer).collect();
            for peer in peers {
                self.apply_registrations(peer);
                self.ask_for_missing(peer);
            }
        }
    }

    /// A worker cannot serve a model, for now or for good.
    fn not_served(
        &mut self,
        peer: WorkerPeer,
        worker: &WorkerName,
        name: &ModelName,
        failure: &Failure,
        now: Instant,
    ) {
        if failure.code.is_retryable() {
            let advice = failure.retry_after_ms.map(|ms| Duration::from_millis(ms.into()));
            let pause = self.limits().registration_retry.max(advice.unwrap_or_default());
            return self.registrations.retry(peer, name.clone(), now + pause);
        }
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.refused.insert(name.clone());
        }
        if self.registrations.asking(name).is_none() {
            let (worker, model, failure) = (worker.clone(), name.clone(), failure.clone());
            self.notice(Notice::RegistrationFailed { worker, model, failure });
        }
    }

    fn note_answer(
        &mut self,
        worker: (WorkerPeer, &WorkerName),
        name: &ModelName,
        answer: Result<ModelInfo, Failure>,
    ) {
        if let Some(question) = self.registrations.note(worker, name, answer) {
            for waiter in question.waiters {
                let (serving, failed) = (question.serving.clone(), question.failed.clone());
                self.answer_registration(&waiter.reply_to, Outcome { serving, failed });
            }
        }
    }

    fn answer_registration(&mut self, to: &ReplyTo, outcome: Outcome) {
        let Outcome { serving, failed } = outcome;
        let mut workers: Vec<_> = serving.iter().map(|(worker, _)| worker.clone()).collect();
        workers.sort_unstable();
        match (serving.into_iter().next(), failed.first()) {
            (Some((_, model)), _) => {
                let reply = RegisterModelReply { id: to.id.clone(), model, workers, failed };
                self.reply(to, &reply);
            }
            (None, Some(first)) => self.fail(to, first.failure.clone()),
            (None, None) => {
                let failure = self.overloaded("the workers left before they served the model");
                self.fail(to, failure);
            }
        }
    }

    /// The workers that may be asked to serve a model.
    fn takers(&self) -> Vec<WorkerPeer> {
        let takers = self.workers.iter().filter(|(_, worker)| !worker.draining);
        takers.map(|(peer, _)| peer).collect()
    }

    fn budget(&self, asked_ms: Option<u32>) -> Result<Duration, Failure> {
        let budget_ms = asked_ms.unwrap_or_else(|| millis(self.limits().budget_default));
        if budget_ms > limits::BUDGET_MS_MAX {
            let max = limits::BUDGET_MS_MAX;
            let message = format!("`budget_ms` is {budget_ms}: at most {max} is accepted");
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        if budget_ms == 0 {
            let message = "the time budget of 0 ms ran out while the request was arriving";
            return Err(Failure::new(ErrorCode::DeadlineExceeded, message));
        }
        Ok(Duration::from_millis(u64::from(budget_ms)))
    }

    fn check_held(&self, spec: &ModelSpec) -> Result<(), Failure> {
        match blobs(spec).find(|blob| !self.model_files.contains(blob)) {
            Some(blob) => {
                let message = format!(
                    "the farm does not hold file `{blob}`: upload it with format `model` first"
                );
                Err(Failure::new(ErrorCode::InvalidRequest, message))
            }
            None => Ok(()),
        }
    }

    fn no_registration(&self, error: &NoRegistration) -> Failure {
        match error {
            NoRegistration::Known(_) => Failure::new(ErrorCode::TooLarge, error.to_string()),
            NoRegistration::Open(_) | NoRegistration::Waiting(_) | NoRegistration::OtherSpec(_) => {
                self.overloaded(&error.to_string())
            }
        }
    }
}

/// Refuses files that no model of the family can be made of.
fn check_files(spec: &ModelSpec) -> Result<(), Failure> {
    let invalid = |message| Err(Failure::new(ErrorCode::InvalidRequest, message));
    let (count, max) = (spec.files.len(), spec.family.components().len());
    if count == 0 || count > max {
        return invalid(format!(
            "`files` has {count} entries: expected 1 to {max} for family {}",
            spec.family
        ));
    }
    for file in &spec.files {
        let ModelFile::Path(path) = file else { continue };
        if path.len() > limits::PATH_BYTES_MAX {
            let message = format!(
                "the path `{path:.80}…` has {} bytes: at most {} are accepted",
                path.len(),
                limits::PATH_BYTES_MAX
            );
            return Err(Failure::new(ErrorCode::TooLarge, message));
        }
        if !path.starts_with('/') || path.contains('\0') {
            return invalid(format!(
                "the path `{path:.80}` is not absolute: name the file as the workers see it"
            ));
        }
    }
    Ok(())
}

/// The uploaded files that a model is made of.
fn blobs(spec: &ModelSpec) -> impl Iterator<Item = protocol::BlobDigest> {
    spec.files.iter().filter_map(|file| match file {
        ModelFile::Blob(blob) => Some(*blob),
        ModelFile::Path(_) => None,
    })
}
