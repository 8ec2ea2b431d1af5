//! Loading and freeing models on a thread of its own, beside running work.
//!
//! Tasks are done in the order in which they were given: what makes room is freed before what needs
//! the room is loaded. Freeing gigabytes takes as long as an encode, so it is no work for the loop.

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
use protocol::{Dtype, ErrorCode, Failure, ModelDigest};
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    arrival::Arrival,
    model::{LoadedModel, ModelSpec},
    weights,
};

/// What the thread does.
#[derive(Debug)]
pub(crate) enum LoadTask {
    /// Loads a model that must have this digest.
    Load(ModelSpec, ModelDigest),
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
        let (spec, digest) = match task {
            LoadTask::Load(spec, digest) => (spec, digest),
            LoadTask::Free(model) => {
                drop(model);
                continue;
            }
        };
        let loaded = catch_unwind(AssertUnwindSafe(|| load_again(&spec, digest, dtype, device)));
        let result = loaded.unwrap_or_else(|_| {
            let message = format!("the worker met a defect while loading model `{}`", spec.name);
            Err(Failure::new(ErrorCode::Internal, message))
        });
        if arrivals.send(Arrival::Model { name: spec.name, result }).is_err() {
            return; // the loop has ended, and nobody wants to know any more
        }
    }
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

fn load_again(
    spec: &ModelSpec,
    digest: ModelDigest,
    dtype: Dtype,
    device: &Device,
) -> Result<LoadedModel, Failure> {
    let name = &spec.name;
    let model = load(spec, dtype, device).map_err(|error| {
        let message = format!("model `{name}` cannot be loaded any more: {error}");
        Failure::new(ErrorCode::UnknownModel, message)
    })?;
    if model.digest != digest {
        let message = format!(
            "the files of model `{name}` changed on disk, it has digest {} now and not {digest}: restart the worker or register the model anew",
            model.digest
        );
        return Err(Failure::new(ErrorCode::UnknownModel, message));
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use fixtures::{Naming, Size, write_encoder};
    use protocol::Component;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    #[test]
    fn a_model_is_loaded_again_if_its_files_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (spec, digest) = tiny(directory.path());
        let (loader, mut arrivals) = start();
        loader.give(LoadTask::Load(spec, digest));
        assert_eq!(arrived(&mut arrivals).unwrap().digest, digest);
    }

    #[test]
    fn files_that_changed_on_disk_are_another_model() {
        let directory = tempfile::tempdir().unwrap();
        let (spec, digest) = tiny(directory.path());
        let mut bytes = fs::read(&spec.files[0]).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&spec.files[0], bytes).unwrap();

        let (loader, mut arrivals) = start();
        loader.give(LoadTask::Load(spec.clone(), digest));
        let changed = arrived(&mut arrivals).unwrap_err();
        assert_eq!(changed.code, ErrorCode::UnknownModel);
        assert!(changed.message.contains("restart the worker or register"), "{changed}");

        fs::remove_file(&spec.files[0]).unwrap();
        loader.give(LoadTask::Load(spec, digest));
        let gone = arrived(&mut arrivals).unwrap_err();
        assert!(gone.message.contains("cannot be loaded any more"), "{gone}");
    }

    fn tiny(directory: &Path) -> (ModelSpec, ModelDigest) {
        let path = directory.join("clip_l.safetensors");
        write_encoder(&path, Size::Tiny, Component::ClipL, Dtype::Float32, Naming::Hf).unwrap();
        let spec: ModelSpec = format!("tiny=sd15:{}", path.display()).parse().unwrap();
        let digest = load(&spec, Dtype::Float32, &Device::Cpu).unwrap().digest;
        (spec, digest)
    }

    fn start() -> (ModelLoader, UnboundedReceiver<Arrival>) {
        let (sender, arrivals) = unbounded_channel();
        (ModelLoader::spawn(Dtype::Float32, Device::Cpu, sender).unwrap(), arrivals)
    }

    fn arrived(arrivals: &mut UnboundedReceiver<Arrival>) -> Result<LoadedModel, Failure> {
        match arrivals.blocking_recv().unwrap() {
            Arrival::Model { result, .. } => result,
            other @ (Arrival::Adapter { .. } | Arrival::DiskLost(_)) => {
                panic!("unexpected: {other:?}")
            }
        }
    }
}
