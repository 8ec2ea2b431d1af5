//! Models that clients registered: what is remembered of them, which workers are being asked to
//! serve them, and which clients wait for the outcome.
//!
//! ```text
//!  register_model ──▶ asked ─── every worker answered or left ──▶ answered, remembered if served
//!                       │
//!                       └────── deadline ──▶ answered with what is known; the asking goes on
//!  remembered ── a worker lacks it ──▶ asked again ──▶ served
//!                       ▲                 ├── for now not ──▶ retried
//!                       └─────────────────┘   lasting ──▶ left alone until the worker restarts
//! ```
//!
//! One worker is asked once at a time for one name. Clients that register the same model at the
//! same time wait for the same answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use protocol::{
    BlobDigest, Family, ModelDigest, ModelName, RequestId, WorkerName,
    reply::{ModelInfo, WorkerFailure},
    request::ModelFile,
    worker::Register,
};
use serde::{Deserialize, Serialize};

use crate::{
    peer::{ClientPeer, WorkerPeer},
    requests::ReplyTo,
};

/// What workers are asked to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// What people call it.
    pub name: ModelName,
    /// Which components it has.
    pub family: Family,
    /// Where its files are.
    pub files: Vec<ModelFile>,
}

/// A model that was registered: its name stands for this digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// What workers are asked to serve.
    #[serde(flatten)]
    pub spec: ModelSpec,
    /// The digest that the first worker read.
    pub digest: ModelDigest,
}

/// A client that waits for the outcome.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) reply_to: ReplyTo,
    pub(crate) budget: Duration,
    pub(crate) deadline: Instant,
}

/// What is known of a model that clients wait for.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) spec: ModelSpec,
    pub(crate) waiters: Vec<Waiter>,
    /// Workers that have not answered.
    open: BTreeSet<WorkerPeer>,
    /// Workers that serve it, the first to answer first.
    pub(crate) serving: Vec<(WorkerName, ModelInfo)>,
    /// Workers that cannot, the first to answer first.
    pub(crate) failed: Vec<WorkerFailure>,
}

/// One worker that is being asked.
#[derive(Debug)]
struct Ask {
    worker: WorkerPeer,
    spec: ModelSpec,
}

/// Registrations, asks and questions.
#[derive(Debug)]
pub(crate) struct Registrations {
    known: BTreeMap<ModelName, Registration>,
    asked: BTreeMap<u64, Ask>,
    questions: BTreeMap<ModelName, Question>,
    retries: BTreeMap<(WorkerPeer, ModelName), Instant>,
    next: u64,
}

/// How many registrations there may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RegistrationRoom {
    pub(crate) known: usize,
    pub(crate) open: usize,
    pub(crate) waiting: usize,
}

/// Why a model cannot be registered now.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRegistration {
    #[error("{0} models are registered, which is the limit")]
    Known(usize),
    #[error("workers are asked to serve {0} models, which is the limit")]
    Open(usize),
    #[error("{0} clients wait for models to be served, which is the limit")]
    Waiting(usize),
    #[error("model `{0}` is being registered with another family or other files")]
    OtherSpec(ModelName),
}

impl Registrations {
    /// Nothing is registered; tickets are counted from `first`.
    pub(crate) fn new(first: u64) -> Self {
        Self {
            known: BTreeMap::new(),
            asked: BTreeMap::new(),
            questions: BTreeMap::new(),
            retries: BTreeMap::new(),
            next: first,
        }
    }

    /// Whether one more client may wait for `spec`.
    pub(crate) fn admit(
        &self,
        spec: &ModelSpec,
        room: RegistrationRoom,
    ) -> Result<(), NoRegistration> {
        let mut asked = self.asked.values().filter(|ask| ask.spec.name == spec.name);
        let question = self.questions.get(&spec.name);
        if asked.any(|ask| ask.spec != *spec) || question.is_some_and(|q| q.spec != *spec) {
            return Err(NoRegistration::OtherSpec(spec.name.clone()));
        }
        if !self.known.contains_key(&spec.name) && self.known.len() >= room.known {
            return Err(NoRegistration::Known(self.known.len()));
        }
        let waiting = self.questions.values().map(|question| question.waiters.len()).sum();
        if waiting >= room.waiting {
            return Err(NoRegistration::Waiting(waiting));
        }
        let names = self.asked.values().map(|ask| &ask.spec.name).chain(self.questions.keys());
        let names: BTreeSet<_> = names.collect();
        if !names.contains(&spec.name) && names.len() >= room.open {
            return Err(NoRegistration::Open(names.len()));
        }
        Ok(())
    }

    /// Lets a client wait for the answers of `workers`, or for those that others wait for already.
    /// Returns what is to be sent.
    pub(crate) fn question(
        &mut self,
        spec: &ModelSpec,
        workers: &[WorkerPeer],
        waiter: Waiter,
    ) -> Vec<(WorkerPeer, Register)> {
        if let Some(question) = self.questions.get_mut(&spec.name) {
            question.waiters.push(waiter);
            return Vec::new();
        }
        let question = Question {
            spec: spec.clone(),
            waiters: vec![waiter],
            open: workers.iter().copied().collect(),
            serving: Vec::new(),
            failed: Vec::new(),
        };
        self.questions.insert(spec.name.clone(), question);
        let asks = workers.iter().filter_map(|&peer| Some((peer, self.ask(peer, spec)?)));
        asks.collect()
    }

    /// What to send to `worker` so that it serves `spec`; nothing when it was asked already.
    pub(crate) fn ask(&mut self, worker: WorkerPeer, spec: &ModelSpec) -> Option<Register> {
        if self.is_asked(worker, &spec.name) {
            return None;
        }
        self.retries.remove(&(worker, spec.name.clone()));
        let ticket = self.next;
        self.next = self.next.wrapping_add(1);
        self.asked.insert(ticket, Ask { worker, spec: spec.clone() });
        let ModelSpec { name, family, files } = spec.clone();
        Some(Register { ticket, name, family, files })
    }

    /// Closes the ask that `worker` answered. Returns what it was asked to serve.
    pub(crate) fn answered(&mut self, worker: WorkerPeer, ticket: u64) -> Option<ModelSpec> {
        if self.asked.get(&ticket)?.worker != worker {
            return None;
        }
        self.asked.remove(&ticket).map(|ask| ask.spec)
    }

    /// Closes what `worker` was asked. Returns the names.
    pub(crate) fn remove_worker(&mut self, worker: WorkerPeer) -> Vec<ModelName> {
        self.retries.retain(|(peer, _), _| *peer != worker);
        let asked = self.asked.extract_if(.., |_, ask| ask.worker == worker);
        asked.map(|(_, ask)| ask.spec.name).collect()
    }

    pub(crate) fn is_asked(&self, worker: WorkerPeer, name: &ModelName) -> bool {
        self.asked.values().any(|ask| ask.worker == worker && ask.spec.name == *name)
    }

    /// The question about `name` that clients wait for.
    pub(crate) fn asking(&self, name: &ModelName) -> Option<&Question> {
        self.questions.get(name)
    }

    /// Notes what `worker` answered where clients wait for it. Returns the question once every
    /// worker has answered.
    pub(crate) fn note(
        &mut self,
        (peer, worker): (WorkerPeer, &WorkerName),
        name: &ModelName,
        answer: Result<ModelInfo, protocol::Failure>,
    ) -> Option<Question> {
        let question = self.questions.get_mut(name)?;
        if question.open.remove(&peer) {
            match answer {
                Ok(model) => question.serving.push((worker.clone(), model)),
                Err(failure) => {
                    question.failed.push(WorkerFailure { worker: worker.clone(), failure });
                }
            }
        }
        if question.open.is_empty() { self.questions.remove(name) } else { None }
    }

    /// The clients whose time is over, each with what it is to be told; they do not wait any more.
    /// `late` makes the failure of a worker that has not answered.
    pub(crate) fn expired(
        &mut self,
        now: Instant,
        late: impl Fn(WorkerPeer, &Waiter) -> Option<WorkerFailure>,
    ) -> Vec<(Waiter, Outcome)> {
        let mut expired = Vec::new();
        for question in self.questions.values_mut() {
            for waiter in question.waiters.extract_if(.., |waiter| waiter.deadline <= now) {
                let mut failed = question.failed.clone();
                failed.extend(question.open.iter().filter_map(|&peer| late(peer, &waiter)));
                expired.push((waiter, Outcome { serving: question.serving.clone(), failed }));
            }
        }
        self.drop_unwanted();
        expired
    }

    /// When the next client's time is over, or a worker is to be asked again.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let waiters = self.questions.values().flat_map(|question| &question.waiters);
        waiters.map(|waiter| waiter.deadline).chain(self.retries.values().copied()).min()
    }

    /// Takes out the client that waits under this id.
    pub(crate) fn withdraw(&mut self, client: ClientPeer, id: &RequestId) -> Option<ReplyTo> {
        let is_it = |waiter: &mut Waiter| waiter.reply_to.is(client, id);
        let mut questions = self.questions.values_mut();
        let found = questions.find_map(|q| q.waiters.extract_if(.., is_it).next())?;
        self.drop_unwanted();
        Some(found.reply_to)
    }

    /// A client left: nobody waits for its answers.
    pub(crate) fn forget_client(&mut self, client: ClientPeer) {
        for question in self.questions.values_mut() {
            question.waiters.retain(|waiter| waiter.reply_to.client != client);
        }
        self.drop_unwanted();
    }

    /// Every client that waits; they do not wait any more.
    pub(crate) fn let_go(&mut self) -> Vec<ReplyTo> {
        let questions = std::mem::take(&mut self.questions);
        let waiters = questions.into_values().flat_map(|question| question.waiters);
        waiters.map(|waiter| waiter.reply_to).collect()
    }

    /// Whether a client waits for the answer to `id`.
    pub(crate) fn is_awaited(&self, client: ClientPeer, id: &RequestId) -> bool {
        let mut waiters = self.questions.values().flat_map(|question| &question.waiters);
        waiters.any(|waiter| waiter.reply_to.is(client, id))
    }

    /// Whether nobody waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.questions.is_empty()
    }

    /// Remembers a registration. Says whether that is news.
    pub(crate) fn remember(&mut self, registration: Registration) -> bool {
        let name = registration.spec.name.clone();
        let known = self.known.insert(name.clone(), registration);
        known.as_ref() != self.known.get(&name)
    }

    /// What `name` was registered as.
    pub(crate) fn known(&self, name: &ModelName) -> Option<&Registration> {
        self.known.get(name)
    }

    /// Everything that is registered, by name.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Registration> {
        self.known.values()
    }

    /// Asks `worker` again for `name` at this time.
    pub(crate) fn retry(&mut self, worker: WorkerPeer, name: ModelName, at: Instant) {
        self.retries.insert((worker, name), at);
    }

    /// The workers that are to be asked again now.
    pub(crate) fn due_retries(&mut self, now: Instant) -> Vec<(WorkerPeer, ModelName)> {
        self.retries.extract_if(.., |_, at| *at <= now).map(|(which, _)| which).collect()
    }

    /// Whether a registered model, or one that is being registered, is made of this file.
    pub(crate) fn need(&self, blob: &BlobDigest) -> bool {
        let known = self.known.values().map(|registration| &registration.spec);
        let asked = self.asked.values().map(|ask| &ask.spec);
        let questions = self.questions.values().map(|question| &question.spec);
        let mut specs = known.chain(asked).chain(questions);
        specs.any(|spec| spec.files.contains(&ModelFile::Blob(*blob)))
    }

    /// Forgets questions that nobody waits for. The workers' answers still count.
    fn drop_unwanted(&mut self) {
        self.questions.retain(|_, question| !question.waiters.is_empty());
    }

    /// Clients that wait.
    #[cfg(test)]
    pub(crate) fn waiters(&self) -> impl Iterator<Item = &Waiter> {
        self.questions.values().flat_map(|question| &question.waiters)
    }

    /// Workers that are being asked, with the names.
    #[cfg(test)]
    pub(crate) fn asks(&self) -> impl Iterator<Item = (WorkerPeer, &ModelName)> {
        self.asked.values().map(|ask| (ask.worker, &ask.spec.name))
    }
}

/// What came of a question for one client.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) serving: Vec<(WorkerName, ModelInfo)>,
    pub(crate) failed: Vec<WorkerFailure>,
}
