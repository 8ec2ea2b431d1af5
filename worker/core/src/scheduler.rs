//! What the worker does next: the state machine between the broker's work and the executor.
//!
//! The scheduler sees dispatches, adapters and deadlines; it holds no tensor, opens no socket and
//! reads no clock. Its methods are of three kinds:
//!
//! * **events in**: `handle_*`, with `now` last where time matters;
//! * **commands out**: [`Scheduler::poll_command`] until it returns nothing, after every event;
//! * **questions**: everything that takes `&self`.
//!
//! A dispatch is
//!
//! ```text
//! Waiting(adapters) => Queued => Running => gone     (finished)
//!        |                |          |
//!        `----------------+----------`=> gone        (failed, cancelled or expired)
//! ```
//!
//! A running dispatch that is cancelled or expires is forgotten at once; what the executor still
//! answers for it is dropped by the shell, because nothing is known of it any more.
//!
//! **Invariant:** every dispatch is answered by exactly one of [`Command::Run`]'s outcome and
//! [`Command::Fail`], unless it was cancelled.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use protocol::{AdapterId, AdapterSource, ErrorCode, Failure};

use crate::registry::{Presence, Registry};

/// Decides what to fetch, run, fail and forget.
#[derive(Debug)]
pub struct Scheduler {
    registry: Registry,
    dispatches: BTreeMap<DispatchId, Dispatch>,
    queue: VecDeque<DispatchId>,
    /// The dispatch that the executor has, even if nobody wants it any more.
    executing: Option<DispatchId>,
    commands: VecDeque<Command>,
}

/// The broker's number for one request given to this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DispatchId(pub u64);

/// What the shell has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Fetch an adapter and report with `handle_loaded` or `handle_load_failed`.
    Fetch(AdapterId),
    /// Let go of an adapter's tensors.
    Forget(AdapterId),
    /// Give a dispatch to the executor and report with `handle_finished`.
    Run(RunDispatch),
    /// Answer a dispatch with a failure.
    Fail(DispatchId, Failure),
}

/// A dispatch that is ready for the executor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDispatch {
    /// The dispatch.
    pub dispatch: DispatchId,
    /// The adapters it needs and where they were when it arrived.
    pub sources: BTreeMap<AdapterId, AdapterSource>,
    /// When it arrived.
    pub arrived: Instant,
    /// When its last adapter was there.
    pub loaded: Instant,
}

#[derive(Debug)]
struct Dispatch {
    sources: BTreeMap<AdapterId, AdapterSource>,
    missing: BTreeSet<AdapterId>,
    arrived: Instant,
    loaded: Instant,
    deadline: Instant,
}

impl Scheduler {
    /// A scheduler without work, with an adapter budget in bytes.
    pub fn new(adapter_budget_bytes: u64) -> Self {
        Self {
            registry: Registry::new(adapter_budget_bytes),
            dispatches: BTreeMap::new(),
            queue: VecDeque::new(),
            executing: None,
            commands: VecDeque::new(),
        }
    }

    /// The adapters this worker holds.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The dispatches that still owe an answer, by number.
    pub fn in_flight(&self) -> impl Iterator<Item = DispatchId> {
        self.dispatches.keys().copied()
    }

    /// Whether nothing is owed and the executor rests.
    pub fn is_idle(&self) -> bool {
        self.dispatches.is_empty() && self.executing.is_none()
    }

    /// Whether `dispatch` still owes an answer.
    pub fn is_wanted(&self, dispatch: DispatchId) -> bool {
        self.dispatches.contains_key(&dispatch)
    }

    /// The broker gives work that needs `adapters` and must be answered by `deadline`.
    pub fn handle_work(
        &mut self,
        dispatch: DispatchId,
        adapters: &BTreeSet<AdapterId>,
        deadline: Instant,
        now: Instant,
    ) {
        if self.dispatches.contains_key(&dispatch) {
            return; // the broker repeated itself; one answer is enough
        }
        let mut sources = BTreeMap::new();
        let mut missing = BTreeSet::new();
        for &adapter in adapters {
            let presence = self.registry.pin(adapter);
            if presence == Presence::Absent {
                self.commands.push_back(Command::Fetch(adapter));
            }
            if presence == Presence::Resident {
                sources.insert(adapter, AdapterSource::Resident);
            } else {
                sources.insert(adapter, AdapterSource::Broker);
                missing.insert(adapter);
            }
        }
        let ready = missing.is_empty();
        let entry = Dispatch { sources, missing, arrived: now, loaded: now, deadline };
        self.dispatches.insert(dispatch, entry);
        if ready {
            self.queue.push_back(dispatch);
        }
        self.start_next(now);
    }

    /// An adapter was fetched and verified; it takes `bytes`.
    pub fn handle_loaded(&mut self, adapter: AdapterId, bytes: u64, now: Instant) {
        if self.registry.presence(&adapter) == Presence::Absent {
            // It was given up before it arrived; kept, nothing would ever evict it.
            return self.commands.push_back(Command::Forget(adapter));
        }
        match self.registry.loaded(adapter, bytes) {
            Ok(evicted) => self.forget(evicted),
            Err(over_budget) => {
                self.commands.push_back(Command::Forget(adapter));
                let failure = Failure::new(ErrorCode::TooLarge, over_budget.to_string());
                return self.handle_load_failed(adapter, &failure);
            }
        }
        for (&dispatch, entry) in &mut self.dispatches {
            if entry.missing.remove(&adapter) && entry.missing.is_empty() {
                entry.loaded = now;
                self.queue.push_back(dispatch);
            }
        }
        self.start_next(now);
    }

    /// An adapter could not be fetched: whoever waits for it fails.
    pub fn handle_load_failed(&mut self, adapter: AdapterId, failure: &Failure) {
        let waits = |entry: &Dispatch| entry.missing.contains(&adapter);
        let lost: Vec<_> =
            self.dispatches.iter().filter(|(_, entry)| waits(entry)).map(|(id, _)| *id).collect();
        self.registry.failed(&adapter);
        for dispatch in lost {
            self.remove(dispatch);
            self.commands.push_back(Command::Fail(dispatch, failure.clone()));
        }
    }

    /// The executor is done with `dispatch`, for better or worse.
    pub fn handle_finished(&mut self, dispatch: DispatchId, now: Instant) {
        if self.executing == Some(dispatch) {
            self.executing = None;
        }
        self.remove(dispatch);
        self.start_next(now);
    }

    /// Nobody wants `dispatch` any more.
    pub fn handle_cancel(&mut self, dispatch: DispatchId, now: Instant) {
        self.remove(dispatch);
        self.start_next(now);
    }

    /// Lets go of those of `adapters` that no dispatch needs.
    pub fn handle_evict(&mut self, adapters: &[AdapterId]) {
        let evicted =
            adapters.iter().filter(|adapter| self.registry.evict(adapter)).copied().collect();
        self.forget(evicted);
    }

    /// Fails what expired.
    pub fn handle_timeout(&mut self, now: Instant) {
        let expired: Vec<_> = self
            .dispatches
            .iter()
            .filter(|(_, entry)| entry.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        for dispatch in expired {
            self.expire(dispatch);
        }
        self.start_next(now);
    }

    /// The next thing to do, until there is none.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` is due, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.dispatches.values().map(|entry| entry.deadline).min()
    }

    /// Gives the executor the oldest dispatch that is ready, when it rests.
    fn start_next(&mut self, now: Instant) {
        if self.executing.is_some() {
            return;
        }
        while let Some(dispatch) = self.queue.pop_front() {
            let entry = &self.dispatches[&dispatch];
            if entry.deadline <= now {
                // The process may have been stopped, or the timeout be due in this moment.
                self.expire(dispatch);
                continue;
            }
            self.executing = Some(dispatch);
            return self.commands.push_back(Command::Run(RunDispatch {
                dispatch,
                sources: entry.sources.clone(),
                arrived: entry.arrived,
                loaded: entry.loaded,
            }));
        }
    }

    /// Fails a dispatch whose time ran out.
    fn expire(&mut self, dispatch: DispatchId) {
        self.remove(dispatch);
        let message =
            "the time budget ran out at the worker: give the request a larger `budget_ms`";
        let failure = Failure::new(ErrorCode::DeadlineExceeded, message);
        self.commands.push_back(Command::Fail(dispatch, failure));
    }

    /// Forgets a dispatch and unpins its adapters.
    fn remove(&mut self, dispatch: DispatchId) {
        let Some(entry) = self.dispatches.remove(&dispatch) else { return };
        self.queue.retain(|queued| *queued != dispatch);
        let evicted =
            entry.sources.keys().flat_map(|adapter| self.registry.unpin(adapter)).collect();
        self.forget(evicted);
    }

    fn forget(&mut self, evicted: Vec<AdapterId>) {
        self.commands.extend(evicted.into_iter().map(Command::Forget));
    }
}

#[cfg(test)]
mod tests;
