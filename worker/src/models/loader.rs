//! Reading, loading and freeing models on a thread of its own, beside running work.
//!
//! Tasks are done in the order in which they were given: what makes room is freed before what needs
//! the room is loaded. Freeing gigabytes takes as long as an encode, so it is no work for the loop.
//!
//! What a model takes is known when it was read. So a model that is being registered is in memory
//! beside everything that the budget allows, until it is known whether it stays; the loop gives one
//! such task at a time, so the peak is the budget and the largest model more.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Instant,
};

use candle_core::Device;
use protocol::{Dtype, ErrorCode, Failure, ModelName};
use tokio::sync::mpsc::UnboundedSender;

use super::catalogue::ServedModel;
use crate::{
    arrival::Arrival,
    failure::WireError as _,
    model::{LoadedModel, ModelSpec},
    weights,
};

/// What the thread does.
#[derive(Debug)]
pub(crate) enum LoadTask {
    /// Reads a model that is to be registered.
    Read(ModelSpec),
    /// Loads a model that left memory.
    Reload(Arc<ServedModel>),
    /// Frees a model.
    Free(Arc<LoadedModel>),
}

/// The thread's handle; it ends when the handle is dropped.
#[derive(Debug)]
pub(crate) struct ModelLoader(Sender<LoadTask>);

impl ModelLoader {
    /// Starts the thread, which stores weights as `dtype` on `device` and reports to `arrivals`.
    pub(crate) fn spawn(
        dtype: Dtype,
        device: Device,
        arrivals: UnboundedSender<Arrival>,
    ) -> io::Result<Self> {
        let (tasks, accepted) = channel();
        thread::Builder::new()
            .name("model-loader".to_owned())
            .spawn(move || work(dtype, &device, &accepted, &arrivals))?;
        Ok(Self(tasks))
    }

    /// Hands over a task.
    pub(crate) fn give(&self, task: LoadTask) {
        self.0.send(task).expect("the thread lives as long as its handle");
    }
}

fn work(
    dtype: Dtype,
    device: &Device,
    tasks: &Receiver<LoadTask>,
    arrivals: &UnboundedSender<Arrival>,
) {
    for task in tasks {
        let arrival = match task {
            LoadTask::Read(spec) => {
                let read = || load(&spec, dtype, device).map_err(|error| error.to_failure());
                let result = guard(&spec.name, read).map(Arc::new);
                Arrival::Read { spec, result }
            }
            LoadTask::Reload(model) => {
                let reload = || model.reload(device).map_err(|error| error.to_failure());
                let result = guard(model.name(), reload);
                Arrival::Model { name: model.name().clone(), result }
            }
            LoadTask::Free(model) => {
                drop(model);
                continue;
            }
        };
        if arrivals.send(arrival).is_err() {
            return; // the loop has ended, and nobody wants to know any more
        }
    }
}

/// A defect costs one model: without an answer it would stay on its way for ever.
fn guard(
    name: &ModelName,
    load: impl FnOnce() -> Result<LoadedModel, Failure>,
) -> Result<LoadedModel, Failure> {
    catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|_| {
        let message = format!("the worker met a defect while loading model `{name}`");
        Err(Failure::new(ErrorCode::Internal, message))
    })
}

/// Loads the model that `spec` names, and logs how long that took.
pub(crate) fn load(
    spec: &ModelSpec,
    dtype: Dtype,
    device: &Device,
) -> Result<LoadedModel, weights::LoadError> {
    let started = Instant::now();
    let model = weights::load(spec, dtype, device)?;
    tracing::info!(
        model = %spec.name,
        family = %model.family,
        digest = model.digest.short(),
        megabytes = model.byte_count() >> 20,
        milliseconds = started.elapsed().as_millis(),
        "model loaded"
    );
    Ok(model)
}
