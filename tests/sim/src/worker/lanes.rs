//! What a worker's lanes do, and what of it is noted in the journal.

use protocol::{AdapterId, request::StackEntry, worker::Busy};
use worker_core::{DispatchId, RunDispatch};

use super::{Fate, Item, Running, journal::Journal};
use crate::{
    client::is_poison, env::Env, event::Inside, executor::Job, ledger::Kill, mutant::Mutant,
};

impl Running {
    /// What has to be loaded may kill as well as what is computed.
    pub(super) fn note_loading(&self, dispatch: DispatchId, journal: &mut Journal) {
        let Some(item) = self.work.get(&dispatch) else { return };
        let is_here = |entry: &StackEntry| self.tensors.contains_key(&entry.adapter);
        let request = &item.request;
        if !request.stack.iter().all(is_here) || !self.weights.contains(&request.model) {
            journal.note(dispatch, item.busy);
        }
    }

    /// A lane that has a dispatch goes on with it, wanted or not.
    pub(super) fn note_end(&self, dispatch: DispatchId, journal: &mut Journal) {
        if !self.lanes.contains_key(&dispatch) {
            journal.strike_out(dispatch);
        }
    }

    pub(super) fn run(&mut self, run: &RunDispatch, journal: &mut Journal, env: &mut Env) {
        let Some(item) = self.work.get(&run.dispatch) else {
            return env.ledger.violate("I2", None, "a run without its request", env.now);
        };
        journal.note(run.dispatch, item.busy);
        let Item { request, attempt, deadline, .. } = item;
        if *deadline <= self.clock.show(env.now) {
            let what = "a lane was given what had expired at the worker";
            env.ledger.violate("I3", Some(&request.id), what, env.now);
        }
        if !self.weights.contains(&request.model) {
            env.ledger.violate("I2", Some(&request.id), "a run without its model", env.now);
        }
        let nothing = AdapterId::from_bytes([0; 32]);
        let really = |adapter| self.tensors.get(&adapter).copied().unwrap_or(nothing);
        let mut stack: Vec<_> = request.stack.iter().map(|entry| really(entry.adapter)).collect();
        if env.mutant == Some(Mutant::PreviousStack) && self.previous.len() == stack.len() {
            std::mem::swap(&mut self.previous, &mut stack);
        } else if env.mutant == Some(Mutant::PreviousStack) {
            self.previous.clone_from(&stack);
        }
        let time = env.random.log_span(env.plan.service.0, env.plan.service.1);
        let what = if is_poison(request) {
            Inside::Crashed(run.dispatch)
        } else {
            Inside::Executed(run.dispatch)
        };
        let node = self.owner.0;
        env.trace.note(env.now, [30, node.number(), time.micros()], || {
            let words = format!("{node}: runs {:x} for {time}", run.dispatch.0);
            (Some(request.id.to_string()), words)
        });
        let job = Job {
            request: request.clone(),
            attempt: *attempt,
            stack,
            given: item.given,
            connection: item.connection,
        };
        self.lanes.insert(run.dispatch, job);
        if self.lanes.len() >= self.slots {
            env.ledger.violate("I5", None, "more runs than there are lanes", env.now);
        }
        env.later(time, self.owner, what);
    }

    pub(super) fn executed(&mut self, dispatch: DispatchId, journal: &mut Journal, env: &mut Env) {
        journal.strike_out(dispatch);
        let job = self.lanes.remove(&dispatch);
        if self.scheduler.is_wanted(dispatch)
            && let (Some(job), Some(_)) = (job, self.work.remove(&dispatch))
        {
            let reply = job.reply(&self.models[&job.request.model], self.name());
            self.done(dispatch, None, reply, env);
        }
        self.scheduler.handle_finished(dispatch, self.clock.show(env.now));
    }

    /// The executor met a poison request: the process is gone.
    pub(super) fn crashed(&mut self, dispatch: DispatchId, env: &mut Env) -> Fate {
        if let Some(job) = self.lanes.get(&dispatch)
            && let Some(Busy { key, alone }) = job.given
        {
            let kill = Kill { epoch: self.epoch, connection: job.connection, alone };
            env.ledger.crashed(key, kill, env.now);
        }
        Fate::Crashed
    }
}
