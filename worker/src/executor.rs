//! The one thread that owns the device.
//!
//! It takes one job at a time from a channel of one and reports every outcome, panics included, so
//! that a defect costs one request and not the worker.

use std::{
    any::Any,
    collections::BTreeMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use adapter::PatchSet;
use protocol::{AdapterId, ErrorCode, Failure};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use worker_core::{DispatchId, RunDispatch};

use crate::{
    engine::{Engine, Reply},
    interrupt::Interrupt,
    model::LoadedModel,
    request::Request,
};

/// A request with everything it needs.
pub(crate) struct Job {
    pub(crate) run: RunDispatch,
    pub(crate) request: Request,
    pub(crate) model: Arc<LoadedModel>,
    pub(crate) adapters: BTreeMap<AdapterId, Arc<PatchSet>>,
    pub(crate) attempt: u32,
    /// Time the request waited at the broker.
    pub(crate) queued_ms: u32,
    /// Set when nobody wants the answer any more.
    pub(crate) interrupt: Interrupt,
}

/// What became of a job.
pub(crate) struct Outcome {
    pub(crate) dispatch: DispatchId,
    pub(crate) result: Result<Reply, Failure>,
}

/// The handle of the thread; it ends when the handle is dropped.
pub(crate) struct Executor {
    jobs: SyncSender<Job>,
    outcomes: Option<UnboundedReceiver<Outcome>>,
}

impl Executor {
    /// Starts the thread with what it computes on.
    pub(crate) fn spawn(engine: Engine) -> io::Result<Self> {
        let (jobs, received) = sync_channel(1);
        // The scheduler gives the next job after the last outcome, so at most one is waiting.
        let (reported, outcomes) = unbounded_channel();
        thread::Builder::new()
            .name("executor".to_owned())
            .spawn(move || work(&engine, &received, &reported))?;
        Ok(Self { jobs, outcomes: Some(outcomes) })
    }

    /// The outcomes; taken once, by the loop.
    pub(crate) fn take_outcomes(&mut self) -> UnboundedReceiver<Outcome> {
        self.outcomes.take().expect("the loop takes the outcomes once")
    }

    /// Gives the thread its next job. The scheduler gives one at a time, so this never waits.
    pub(crate) fn run(&self, job: Job) {
        if self.jobs.try_send(job).is_err() {
            unreachable!("the executor catches panics and has at most one job");
        }
    }
}

fn work(engine: &Engine, jobs: &Receiver<Job>, outcomes: &UnboundedSender<Outcome>) {
    for job in jobs {
        let dispatch = job.run.dispatch;
        let result =
            catch_unwind(AssertUnwindSafe(|| engine.encode(&job))).unwrap_or_else(|panic| {
                let what = panic_message(panic.as_ref());
                tracing::error!(dispatch = dispatch.0, what, "encoding panicked");
                let message = format!("the worker met a defect while encoding: {what}");
                Err(Failure::new(ErrorCode::Internal, message))
            });
        if outcomes.send(Outcome { dispatch, result }).is_err() {
            return;
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
