//! The lanes: threads that compute, each one job at a time.
//!
//! They share the engine. Every outcome is reported, panics included, so that a defect costs one
//! request and not the worker.

use std::{
    any::Any,
    collections::BTreeMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
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

/// The handle of the lanes; they end when it is dropped.
pub(crate) struct Executor {
    lanes: usize,
    jobs: SyncSender<Job>,
    outcomes: Option<UnboundedReceiver<Outcome>>,
}

impl Executor {
    /// Starts `lanes` threads with what they compute on.
    pub(crate) fn spawn(engine: Engine, lanes: usize) -> io::Result<Self> {
        let engine = Arc::new(engine);
        // The scheduler gives a lane its next job after the last outcome, so no more are waiting.
        let (jobs, received) = sync_channel(lanes);
        let received = Arc::new(Mutex::new(received));
        let (reported, outcomes) = unbounded_channel();
        for lane in 0..lanes {
            let (engine, received) = (Arc::clone(&engine), Arc::clone(&received));
            let reported = reported.clone();
            thread::Builder::new()
                .name(format!("lane-{lane}"))
                .spawn(move || work(&engine, &received, &reported))?;
        }
        Ok(Self { lanes, jobs, outcomes: Some(outcomes) })
    }

    /// Jobs that run at once.
    pub(crate) fn lanes(&self) -> usize {
        self.lanes
    }

    /// The outcomes; taken once, by the loop.
    pub(crate) fn take_outcomes(&mut self) -> UnboundedReceiver<Outcome> {
        self.outcomes.take().expect("the loop takes the outcomes once")
    }

    /// Gives a lane its next job. The scheduler gives as many as there are lanes, so this never
    /// waits.
    pub(crate) fn run(&self, job: Job) {
        if self.jobs.try_send(job).is_err() {
            unreachable!("lanes catch panics and have at most one job each");
        }
    }
}

fn work(engine: &Engine, jobs: &Mutex<Receiver<Job>>, outcomes: &UnboundedSender<Outcome>) {
    // Whoever waits for a job holds the lock; the others wait for the lock, which is as good.
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(job) = next() {
        let dispatch = job.run.dispatch;
        let result =
            catch_unwind(AssertUnwindSafe(|| encode(engine, &job))).unwrap_or_else(|panic| {
                let what = panic_message(panic.as_ref());
                tracing::error!(dispatch = dispatch.0, what, "encoding panicked");
                let message = format!("the worker met a defect while encoding: {what}");
                Err(Failure::new(ErrorCode::Internal, message))
            });
        // First the job, so that whoever hears of the outcome finds its model and adapters unused.
        drop(job);
        if outcomes.send(Outcome { dispatch, result }).is_err() {
            return;
        }
    }
}

fn encode(engine: &Engine, job: &Job) -> Result<Reply, Failure> {
    if job.interrupt.is_set() {
        let message = "the request was given up before the worker began with it";
        return Err(Failure::new(ErrorCode::Cancelled, message));
    }
    engine.encode(job)
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
