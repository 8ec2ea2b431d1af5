//! What the worker does next: the state machine between the broker's work and the lanes.
//!
//! The scheduler sees dispatches, models, adapters and deadlines; it holds no tensor, opens no
//! socket and reads no clock. Its methods are of three kinds:
//!
//! * **events in**: `handle_*`, with `now` last where time matters;
//! * **commands out**: [`Scheduler::poll_command`] until it returns nothing, after every event;
//! * **questions**: everything that takes `&self`.
//!
//! A dispatch is
//!
//! ```text
//! Waiting => Loading => Ready => Running => gone     (finished)
//!  |  ^         |         |         |
//!  |  `---------|         |         |                (put back: a size became known)
//!  `------------+---------+---------`=> gone         (failed, cancelled or expired)
//! ```
//!
//! * *Waiting* dispatches wait for **room**: their model and adapters do not fit into the budgets
//!   beside what others use now. They are let in strictly in the order of arrival.
//! * *Loading* dispatches have pinned what they need and wait until it is all there. Sizes of
//!   adapters become known on the way; when they then do not fit together, the youngest is put back.
//! * *Ready* dispatches wait for a lane ([`Lanes`]).
//!
//! So nothing waits in a circle: the oldest dispatch is never put back for a younger one that
//! loads, and what is ready or running needs nothing more. A dispatch that could not even run
//! alone is refused.
//!
//! A running dispatch that is cancelled or expires is forgotten at once and interrupted. Its lane
//! and its pins stay until the lane reports; what it reports is dropped by the shell, because
//! nothing is known of it any more.
//!
//! **Invariant:** every dispatch is answered by exactly one of [`Command::Run`]'s outcome and
//! [`Command::Fail`], unless it was cancelled.

mod admission;
mod prefetching;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use protocol::{AdapterId, AdapterSource, ErrorCode, Failure, ModelName};

use crate::{
    command::{Command, DispatchId, Place, RunDispatch},
    lanes::{Lanes, Ticket},
    models::{ModelOverBudget, Models},
    prefetches::Prefetches,
    registry::{Origin, Registry, Tiers},
};

/// Sizes of what the scheduler rules over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Dispatches that run at once.
    pub lanes: usize,
    /// Budgets of the adapters.
    pub tiers: Tiers,
    /// Bytes of all models in memory; unlimited without.
    pub model_budget_bytes: Option<u64>,
}

/// What a dispatch cannot run without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// Its model.
    pub model: ModelName,
    /// Whether no other dispatch of the model may run meanwhile.
    pub exclusive: bool,
    /// Its adapters.
    pub adapters: BTreeSet<AdapterId>,
}

/// Decides what to load, run, fail and forget.
#[derive(Debug)]
pub struct Scheduler {
    registry: Registry,
    prefetches: Prefetches,
    models: Models,
    lanes: Lanes,
    dispatches: BTreeMap<DispatchId, Dispatch>,
    /// Dispatches without room, by arrival.
    waiting: BTreeMap<u64, DispatchId>,
    arrivals: u64,
    commands: VecDeque<Command>,
}

#[derive(Debug)]
struct Dispatch {
    /// Counts dispatches; the smallest came first.
    arrival: u64,
    model: ModelName,
    exclusive: bool,
    adapters: BTreeMap<AdapterId, Use>,
    phase: Phase,
    arrived: Instant,
    loaded: Instant,
    deadline: Instant,
}

/// What a dispatch knows of an adapter that it needs.
#[derive(Debug, Clone, Copy, Default)]
struct Use {
    bytes: Option<u64>,
    /// Where it was when the dispatch was let in.
    source: Option<AdapterSource>,
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Loading { missing: BTreeSet<AdapterId>, needs_model: bool },
    Ready,
    Running,
}

impl Scheduler {
    /// A scheduler without work and models.
    pub fn new(config: Config) -> Self {
        Self {
            registry: Registry::new(config.tiers),
            prefetches: Prefetches::default(),
            models: Models::new(config.model_budget_bytes),
            lanes: Lanes::new(config.lanes),
            dispatches: BTreeMap::new(),
            waiting: BTreeMap::new(),
            arrivals: 0,
            commands: VecDeque::new(),
        }
    }

    /// The adapters of this worker.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The models of this worker.
    pub fn models(&self) -> &Models {
        &self.models
    }

    /// Grows with every change of what the worker holds.
    pub fn revision(&self) -> u64 {
        self.registry.revision() + self.models.revision()
    }

    /// The dispatches that still owe an answer, by number.
    pub fn in_flight(&self) -> impl Iterator<Item = DispatchId> {
        self.dispatches.keys().copied()
    }

    /// Whether nothing is owed and all lanes rest.
    pub fn is_idle(&self) -> bool {
        self.dispatches.is_empty() && self.lanes.is_empty()
    }

    /// Whether `dispatch` still owes an answer.
    pub fn is_wanted(&self, dispatch: DispatchId) -> bool {
        self.dispatches.contains_key(&dispatch)
    }

    /// Adds a model that takes `bytes` and that the shell has just loaded. Returns whether it may
    /// stay in memory; if not, it is loaded again when it is needed.
    ///
    /// # Errors
    /// When the model is larger than the budget of all.
    pub fn register_model(
        &mut self,
        model: ModelName,
        bytes: u64,
    ) -> Result<bool, ModelOverBudget> {
        self.models.register(model, bytes)
    }

    /// The cache on disk holds an adapter from an earlier run; told at the start, in the order of
    /// their last use. Returns whether it may stay there.
    pub fn handle_disk_found(&mut self, adapter: AdapterId, bytes: u64) -> bool {
        self.registry.found_on_disk(adapter, bytes)
    }

    /// The broker gives work that must be answered by `deadline`.
    pub fn handle_work(
        &mut self,
        dispatch: DispatchId,
        needs: Needs,
        deadline: Instant,
        now: Instant,
    ) {
        if self.dispatches.contains_key(&dispatch) || self.lanes.is_running(dispatch) {
            return; // the broker repeated itself; one answer is enough
        }
        let Needs { model, exclusive, adapters } = needs;
        if !self.models.is_known(&model) {
            let failure = Failure::new(ErrorCode::UnknownModel, format!("no model `{model}` here"));
            return self.commands.push_back(Command::Fail(dispatch, failure));
        }
        self.arrivals += 1;
        let entry = Dispatch {
            arrival: self.arrivals,
            model,
            exclusive,
            adapters: adapters.into_iter().map(|adapter| (adapter, Use::default())).collect(),
            phase: Phase::Waiting,
            arrived: now,
            loaded: now,
            deadline,
        };
        self.waiting.insert(entry.arrival, dispatch);
        self.dispatches.insert(dispatch, entry);
        self.refuse_if_too_large(dispatch, now);
        self.go_on(now);
    }

    /// The broker has told the size of an adapter that is being fetched.
    pub fn handle_size(&mut self, adapter: AdapterId, bytes: u64, now: Instant) {
        self.learn_prefetch(&adapter, bytes, now);
        self.learn_size(adapter, bytes, now);
        self.go_on(now);
    }

    /// An adapter was fetched or read, and verified; it takes `bytes`.
    pub fn handle_loaded(&mut self, adapter: AdapterId, bytes: u64, origin: Origin, now: Instant) {
        self.learn_size(adapter, bytes, now);
        if self.registry.is_coming(&adapter) {
            self.registry.arrive(&adapter, origin, &mut self.commands);
            self.note_arrival(adapter, now);
        } else if !self.registry.is_in_memory(&adapter)
            && !self.take_prefetched(adapter, bytes, origin, now)
        {
            // It was given up before it arrived; kept, nothing would ever evict it.
            self.commands.push_back(Command::Forget(adapter, Place::Memory));
        }
        self.go_on(now);
    }

    /// An adapter could not be fetched or read: whoever waits for it fails.
    pub fn handle_load_failed(&mut self, adapter: AdapterId, failure: &Failure, now: Instant) {
        self.prefetches.forget(&adapter);
        let waits = |phase: &Phase| matches!(phase, Phase::Loading { missing, .. } if missing.contains(&adapter));
        self.fail_where(failure, now, |entry| waits(&entry.phase));
    }

    /// The copy of an adapter on disk is rotten, gone, or could not be written. Whoever waits for
    /// it gets it from the broker.
    pub fn handle_disk_lost(&mut self, adapter: AdapterId) {
        self.registry.lost_on_disk(adapter, &mut self.commands);
        self.prefetch_from_broker(adapter);
        for entry in self.dispatches.values_mut() {
            if let Phase::Loading { missing, .. } = &entry.phase
                && missing.contains(&adapter)
                && let Some(usage) = entry.adapters.get_mut(&adapter)
            {
                usage.source = Some(AdapterSource::Broker);
            }
        }
    }

    /// A model is in memory.
    pub fn handle_model_loaded(&mut self, model: &ModelName, now: Instant) {
        self.models.loaded_now(model);
        self.note_model(model, now);
        self.go_on(now);
    }

    /// A model could not be loaded: whoever waits for it fails.
    pub fn handle_model_failed(&mut self, model: &ModelName, failure: &Failure, now: Instant) {
        self.models.failed(model);
        let waits = |phase: &Phase| matches!(phase, Phase::Loading { needs_model: true, .. });
        self.fail_where(failure, now, |entry| entry.model == *model && waits(&entry.phase));
    }

    /// A lane is done with `dispatch`, for better or worse.
    pub fn handle_finished(&mut self, dispatch: DispatchId, now: Instant) {
        if let Some(ticket) = self.lanes.finish(dispatch) {
            self.dispatches.remove(&dispatch);
            self.unpin(&ticket.model, &ticket.adapters, now);
        }
        self.go_on(now);
    }

    /// Nobody wants `dispatch` any more.
    pub fn handle_cancel(&mut self, dispatch: DispatchId, now: Instant) {
        self.remove(dispatch, now);
        self.go_on(now);
    }

    /// Lets go of those of `adapters` that no dispatch needs, wherever they are.
    pub fn handle_evict(&mut self, adapters: &[AdapterId]) {
        for &adapter in adapters {
            self.forget_prefetch(&adapter);
            self.registry.evict(adapter, &mut self.commands);
        }
        self.prefetch_next();
    }

    /// Fails what expired, and lets go of what has not been used for long.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.go_on(now);
        self.registry.expire(now, &mut self.commands);
    }

    /// The next thing to do, until there is none.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` is due, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let deadlines = self.dispatches.values().map(|entry| entry.deadline);
        deadlines.chain(self.registry.expires_at()).min()
    }

    /// Fails what has expired, lets in what has room, and starts what is ready.
    ///
    /// Time comes first: a process that was stopped learns of what has arrived before it learns
    /// that it is late, and must not begin with what nobody waits for any more.
    fn go_on(&mut self, now: Instant) {
        self.fail_expired(now);
        self.admit(now);
        while let Some(dispatch) = self.lanes.start_next() {
            let Some(entry) = self.dispatches.get_mut(&dispatch) else { continue };
            // ## Ready => Running
            entry.phase = Phase::Running;
            self.commands.push_back(Command::Run(RunDispatch {
                dispatch,
                sources: entry.sources(),
                arrived: entry.arrived,
                loaded: entry.loaded,
            }));
        }
        self.prefetch_next();
    }

    fn fail_expired(&mut self, now: Instant) {
        let is_late = |entry: &Dispatch| entry.deadline <= now;
        if self.dispatches.values().any(is_late) {
            let message =
                "the time budget ran out at the worker: give the request a larger `budget_ms`";
            self.fail_all(&Failure::new(ErrorCode::DeadlineExceeded, message), now, is_late);
        }
    }

    fn fail_where(&mut self, failure: &Failure, now: Instant, fails: impl Fn(&Dispatch) -> bool) {
        self.fail_all(failure, now, fails);
        self.go_on(now);
    }

    fn fail_all(&mut self, failure: &Failure, now: Instant, fails: impl Fn(&Dispatch) -> bool) {
        let failed = self.dispatches.iter().filter(|(_, entry)| fails(entry));
        for dispatch in failed.map(|(dispatch, _)| *dispatch).collect::<Vec<_>>() {
            self.commands.push_back(Command::Fail(dispatch, failure.clone()));
            self.remove(dispatch, now);
        }
    }

    /// Forgets a dispatch and lets go of what it holds, unless a lane still uses that.
    fn remove(&mut self, dispatch: DispatchId, now: Instant) {
        let Some(entry) = self.dispatches.remove(&dispatch) else { return };
        match entry.phase {
            Phase::Waiting => drop(self.waiting.remove(&entry.arrival)),
            Phase::Loading { .. } | Phase::Ready => {
                self.lanes.unqueue(dispatch);
                self.unpin(&entry.model, &entry.ids(), now);
            }
            Phase::Running => self.commands.push_back(Command::Interrupt(dispatch)),
        }
    }

    fn unpin(&mut self, model: &ModelName, adapters: &[AdapterId], now: Instant) {
        self.models.unpin(model);
        self.registry.unpin(adapters, now, &mut self.commands);
    }
}

impl Dispatch {
    fn ids(&self) -> Vec<AdapterId> {
        self.adapters.keys().copied().collect()
    }

    fn sources(&self) -> BTreeMap<AdapterId, AdapterSource> {
        let known = |(id, usage): (&AdapterId, &Use)| Some((*id, usage.source?));
        self.adapters.iter().filter_map(known).collect()
    }

    /// Bytes of its adapters, as far as known.
    fn known_bytes(&self) -> u64 {
        self.adapters.values().filter_map(|usage| usage.bytes).fold(0, u64::saturating_add)
    }

    fn ticket(&self) -> Ticket {
        Ticket { model: self.model.clone(), exclusive: self.exclusive, adapters: self.ids() }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod soak;
#[cfg(test)]
mod tests;
