//! Answers: forwarded to everyone who waits, kept for those who ask the same again.
//!
//! A reply is forwarded unread to the one whose header the worker was given. For the others its
//! `id` is replaced; nothing else of it is touched.

use std::time::Instant;

use bytes::Bytes;
use protocol::{ErrorCode, Failure, frames};

use crate::{
    Broker,
    answers::{Answer, Origin},
    peer::WorkerPeer,
    requests::{ReplyTo, Request},
    tasks::{Task, TaskKey},
};

impl Broker {
    /// Answers a request that an equal one was answered before. Says whether it could.
    pub(super) fn answer_from_cache(&mut self, from: &ReplyTo, task: &Task, now: Instant) -> bool {
        if !task.is_shared {
            return false;
        }
        let routes = &self.routes;
        let served = |model: &_, digest| routes.serves(model, Some(digest));
        let answer = self.answers.get(&task.digest, served, now);
        let Some((header, attachments)) = answer.and_then(|answer| answer.for_request(&from.id))
        else {
            return false;
        };
        self.counters.accepted += 1;
        self.counters.answered += 1;
        self.counters.cache_hits += 1;
        for adapter in &task.adapters {
            self.blobs.touch(adapter);
        }
        self.reply_frames(from, frames::frames_of(header, attachments));
        true
    }

    /// Lets a request wait for what is computed already.
    pub(super) fn join(&mut self, task: TaskKey, request: Request) {
        self.counters.accepted += 1;
        self.counters.coalesced += 1;
        let key = self.requests.insert(request);
        if let Some(task) = self.tasks.get_mut(task) {
            task.waiting.insert(key);
        }
    }

    /// Refuses a further request for what is computed already, when too many wait.
    pub(super) fn check_followers(&mut self) -> Result<(), Failure> {
        let followers = self.requests.len().saturating_sub(self.tasks.len());
        if followers >= self.limits().queued_max {
            let reason = format!("{followers} requests wait for equal ones, which is the limit");
            return Err(self.full(&reason, None));
        }
        Ok(())
    }

    /// Forwards a worker's answer to everyone who waits for it.
    pub(super) fn complete(
        &mut self,
        key: TaskKey,
        worker: WorkerPeer,
        answer: Vec<Bytes>,
        failed: Option<ErrorCode>,
        now: Instant,
    ) {
        if failed == Some(ErrorCode::DeadlineExceeded) && self.has_more_time(key) {
            return self.requeue(key);
        }
        if let Some(task) = self.tasks.get_mut(key) {
            task.dispatched = None;
        }
        let mut answer = answer.into_iter();
        let Some(header) = answer.next() else {
            let message = "the worker answered without a reply";
            return self.fail_task(key, &Failure::new(ErrorCode::Internal, message));
        };
        let Some(task) = self.tasks.remove(key) else { return };
        let attachments: Vec<_> = answer.collect();
        let answer = Answer::new(header.clone(), attachments.clone());
        if failed.is_none() {
            self.strikes.clear(&task.digest);
            if let Some(answer) = answer.as_ref().filter(|_| task.is_shared) {
                self.keep(&task, answer, worker, now);
            }
        }
        for request in &task.waiting {
            let Some(Request { reply_to, .. }) = self.requests.remove(*request) else { continue };
            let frames = if reply_to.id == task.payload_id {
                Some((header.clone(), attachments.clone()))
            } else {
                answer.as_ref().and_then(|answer| answer.for_request(&reply_to.id))
            };
            self.count_answer(failed.is_none() && frames.is_some());
            match frames {
                Some((header, attachments)) => {
                    self.reply_frames(&reply_to, frames::frames_of(header, attachments));
                }
                None => self.fail(&reply_to, unreadable()),
            }
        }
    }

    /// Answers everyone who waits for a task that cannot be done.
    pub(super) fn fail_task(&mut self, key: TaskKey, failure: &Failure) {
        let Some(task) = self.drop_task(key) else { return };
        for request in task.waiting {
            if let Some(request) = self.requests.remove(request) {
                self.counters.failed += 1;
                self.fail(&request.reply_to, failure.clone());
            }
        }
    }

    /// Answers everything that is left, because the process ends.
    pub(super) fn answer_rest(&mut self, reason: &str) {
        for key in self.requests.pending() {
            let failure = self.overloaded(reason);
            if let Some(request) = self.withdraw(key) {
                self.counters.failed += 1;
                self.fail(&request.reply_to, failure);
            }
        }
        for to in self.jobs.let_go().into_iter().chain(self.registrations.let_go()) {
            let failure = self.overloaded(reason);
            self.fail(&to, failure);
        }
    }

    /// Whether somebody who came later waits for longer than the worker was told.
    fn has_more_time(&self, key: TaskKey) -> bool {
        let told = self.tasks.get(key).and_then(|task| task.dispatched).map(|d| d.due);
        self.due(key) > told
    }

    fn keep(&mut self, task: &Task, answer: &Answer, worker: WorkerPeer, now: Instant) {
        let model = &task.shape.model;
        let mut models = self.workers.get(worker).into_iter().flat_map(|worker| &worker.models);
        let same = |info: &&protocol::reply::ModelInfo| {
            info.name == *model && task.model_digest.is_none_or(|asked| asked == info.digest)
        };
        // Of two models of one name, nobody but the worker knows which it was.
        let (Some(info), None) = (models.by_ref().find(same), models.find(same)) else { return };
        let origin =
            Origin { model: model.clone(), digest: info.digest, adapters: task.adapters.clone() };
        self.answers.insert(task.digest, answer, origin, now);
    }

    fn count_answer(&mut self, success: bool) {
        if success {
            self.counters.answered += 1;
        } else {
            self.counters.failed += 1;
        }
    }
}

fn unreadable() -> Failure {
    let message = "the worker answered an equal request with something that has no `id`";
    Failure::new(ErrorCode::Internal, message)
}
