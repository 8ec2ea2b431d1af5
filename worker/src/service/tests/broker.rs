//! The broker that the tests play.

use std::{collections::BTreeMap, fs, path::PathBuf, thread::JoinHandle, time::Duration};

use bytes::Bytes;
use clap::Parser as _;
use fixtures::{Naming, Size, to_safetensors, write_encoder};
use protocol::{
    AdapterId, AdapterSource, BlobDigest, Component, Dtype, Envelope, ErrorReply, Failure, Family,
    Header, frames, header,
    reply::{ClipEncodeReply, ModelInfo},
    request::{ClipEncode, EncodeOptions, ModelFile, Prompt, StackEntry},
    worker::{
        Alive, Blob, Done, Fetch, Inventory, NoBlob, Ready, Register, Registered, Released, Work,
    },
};
use safetensors::SafeTensors;
use tempfile::TempDir;
use tokio::sync::oneshot;
use transport::{Dealer, DealerConfig, Message, Peer, Router, RouterConfig, RouterEvent};

use crate::{
    config::{Config, Flags},
    run::{assemble, prepare},
    service::Service,
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(1);

/// A broker with one worker in a thread.
pub(super) struct Broker {
    pub(super) directory: TempDir,
    router: Router,
    models: Vec<String>,
    pub(super) blobs: BTreeMap<BlobDigest, Vec<u8>>,
    worker: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
    peer: Option<Peer>,
    pub(super) slots: u32,
    pub(super) ready_models: Vec<String>,
    pub(super) inventory: Inventory,
    pub(super) fetched: Vec<AdapterId>,
    dispatches: u64,
    /// Whether workers wait for the bytes that they ask for.
    pub(super) holds_chunks: bool,
}

impl Broker {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = format!("ipc://{}", directory.path().join("workers").display());
        let router = Router::bind(&endpoint.parse().unwrap(), RouterConfig::default()).unwrap();
        let mut broker = Self {
            directory,
            router,
            models: Vec::new(),
            blobs: BTreeMap::new(),
            worker: None,
            peer: None,
            slots: 0,
            ready_models: Vec::new(),
            inventory: Inventory::default(),
            fetched: Vec::new(),
            dispatches: 0,
            holds_chunks: false,
        };
        broker.add_model("tiny");
        broker
    }

    /// Writes the tiny model once more, for workers that start later.
    pub(super) fn add_model(&mut self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name).join("clip_l.safetensors");
        write_encoder(&path, Size::Tiny, Component::ClipL, Dtype::Float32, Naming::Hf).unwrap();
        self.models.push(format!("{name}=sd15:{}", path.display()));
        path
    }

    pub(super) fn add_adapter(&mut self, seed: u64) -> AdapterId {
        let tensors = fixtures::seeded_lora(Size::Tiny, Family::Sd15, seed, 4);
        let file = to_safetensors(&tensors).unwrap();
        let (adapter, _) = adapter::read_lora(file.as_slice()).unwrap();
        self.blobs.insert(adapter.id().into(), adapter.to_bytes());
        adapter.id()
    }

    pub(super) async fn start_worker(&mut self, flags: &[&str]) {
        let endpoint = self.router.endpoint().to_string();
        let mut arguments = vec!["luna-worker", "--threads", "1", "--weights-dtype", "float32"];
        arguments.extend(["--endpoint", &endpoint]);
        let models: Vec<_> = self.models.iter().flat_map(|model| ["--model", model]).collect();
        arguments.extend(models);
        arguments.extend(flags);
        let config = Config::load(&Flags::parse_from(arguments), []).unwrap();
        let prepared = loop {
            match prepare(&config) {
                Ok(prepared) => break prepared,
                // The cache's thread of the last worker may not have let go of the directory.
                Err((_, error)) if error.to_string().contains("another process uses") => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err((_, error)) => panic!("{error:#}"),
            }
        };
        let parts = assemble(&config, prepared).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let dealer = Dealer::connect(&config.endpoint, DealerConfig::default()).unwrap();
                let stopped = async { drop(stopped.await) };
                assert!(Service::serve(parts, dealer, stopped, PATIENCE).await.is_ok());
            });
        });
        self.worker = Some((thread, stop));
        self.peer = None;
        while self.peer.is_none() {
            self.next().await;
        }
    }

    pub(super) fn stop_worker(&mut self) {
        // Whatever it held, nobody else is there to have it.
        self.send(&Released {}, vec![]);
        let (thread, stop) = self.worker.take().unwrap();
        stop.send(()).unwrap();
        thread.join().unwrap();
    }

    /// Encodes with an adapter and returns where it was.
    pub(super) async fn source(&mut self, adapter: AdapterId) -> AdapterSource {
        self.encode("tiny", &[adapter]).await.unwrap().receipt.stack[0].source
    }

    pub(super) async fn encode(
        &mut self,
        model: &str,
        adapters: &[AdapterId],
    ) -> Result<ClipEncodeReply, Failure> {
        let dispatch = self.dispatch(model, adapters);
        let (answered, reply) = self.answer().await;
        assert_eq!(answered, dispatch);
        reply
    }

    pub(super) fn dispatch(&mut self, model: &str, adapters: &[AdapterId]) -> u64 {
        self.dispatches += 1;
        let dispatch = self.dispatches;
        let entry = |adapter: &AdapterId| StackEntry {
            adapter: *adapter,
            strength_patch: 1.0,
            strength_model: 1.0,
        };
        let request = ClipEncode {
            id: format!("r-{dispatch}").parse().unwrap(),
            model: name(model),
            model_digest: None,
            prompts: vec![Prompt { text: Some("a cat".to_owned()), ..Prompt::default() }],
            stack: adapters.iter().map(entry).collect(),
            options: EncodeOptions::default(),
            budget_ms: None,
            no_cache: false,
            requires: Vec::new(),
        };
        let work =
            Work { dispatch, attempt: 1, queued_ms: 0, budget_ms: 60_000, key: None, alone: false };
        self.send(&work, vec![header::write(&request).into()]);
        dispatch
    }

    /// Writes a tiny model, other weights for every seed.
    pub(super) fn model_file(&self, path: &str, seed: u8) -> PathBuf {
        let path = self.directory.path().join(path).join("clip_l.safetensors");
        write_encoder(&path, Size::Tiny, Component::ClipL, Dtype::Float32, Naming::Hf).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let (header_bytes, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let bias = header.info("text_model.final_layer_norm.bias").unwrap();
        bytes[8 + header_bytes + bias.data_offsets.0] ^= seed;
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Holds such a file as an upload.
    pub(super) fn add_model_blob(&mut self, seed: u8) -> BlobDigest {
        let bytes = fs::read(self.model_file("uploaded", seed)).unwrap();
        let blob = BlobDigest::of(&bytes);
        self.blobs.insert(blob, bytes);
        blob
    }

    /// Has the worker serve a model: of one file SD 1.x, of two SDXL.
    pub(super) async fn register(
        &mut self,
        model: &str,
        files: &[ModelFile],
    ) -> Result<ModelInfo, Failure> {
        let ticket = self.ask(model, files);
        let (answered, answer) = self.registered().await;
        assert_eq!(answered, ticket);
        if answer.is_ok() {
            while !self.next().await.is::<Ready>() {}
        }
        answer
    }

    /// Asks for that and does not wait.
    pub(super) fn ask(&mut self, model: &str, files: &[ModelFile]) -> u64 {
        self.dispatches += 1;
        let ticket = self.dispatches;
        let family = if files.len() == 1 { Family::Sd15 } else { Family::Sdxl };
        let files = files.to_vec();
        self.send(&Register { ticket, name: name(model), family, files }, vec![]);
        ticket
    }

    /// The next answer to `register`.
    pub(super) async fn registered(&mut self) -> (u64, Result<ModelInfo, Failure>) {
        loop {
            let envelope = self.next().await;
            if envelope.is::<Registered>() {
                let Registered { ticket, model, failure, .. } = envelope.read().unwrap();
                assert_eq!(model.is_some(), failure.is_none());
                return (ticket, model.ok_or_else(|| failure.unwrap()));
            }
        }
    }

    /// Waits until the worker asks for bytes.
    pub(super) async fn fetch_under_way(&mut self) {
        while !self.next().await.is::<Fetch>() {}
    }

    /// Starts the broker anew.
    pub(super) async fn restart(&mut self) {
        let endpoint = self.router.endpoint().clone();
        let directory = self.directory.path().join("elsewhere");
        let other = format!("ipc://{}", directory.display()).parse().unwrap();
        let other = Router::bind(&other, RouterConfig::default()).unwrap();
        std::mem::replace(&mut self.router, other).close().await;
        self.router = Router::bind(&endpoint, RouterConfig::default()).unwrap();
        self.peer = None;
        while self.peer.is_none() {
            self.next().await;
        }
    }

    /// The next answer of the worker.
    pub(super) async fn answer(&mut self) -> (u64, Result<ClipEncodeReply, Failure>) {
        loop {
            let envelope = self.next().await;
            if !envelope.is::<Done>() {
                continue;
            }
            let Done { dispatch, failed, .. } = envelope.read().unwrap();
            let reply = &envelope.attachments[0];
            let reply = match failed {
                None => Ok(header::read(reply).unwrap()),
                Some(code) => {
                    let error: ErrorReply = header::read(reply).unwrap();
                    Err(Failure::new(code, error.message))
                }
            };
            return (dispatch, reply);
        }
    }

    pub(super) async fn wait_for(&mut self, holds: impl Fn(&Inventory) -> bool) {
        while !holds(&self.inventory) {
            self.next().await;
        }
    }

    /// The next message of the worker, with what a broker does about it.
    async fn next(&mut self) -> Envelope {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.router.recv()).await;
            let event = event.expect("the worker says something").expect("the socket is open");
            let RouterEvent::Message { peer, message } = event else { continue };
            let envelope = Envelope::open(message.into_frames()).unwrap();
            if envelope.is::<Ready>() {
                let ready: Ready = envelope.read().unwrap();
                self.peer = Some(peer);
                self.slots = ready.slots;
                self.ready_models = ready.models.iter().map(|it| it.name.to_string()).collect();
                self.inventory = ready.inventory;
            } else if envelope.is::<Alive>() {
                let alive: Alive = envelope.read().unwrap();
                self.inventory = alive.inventory.unwrap_or_else(|| self.inventory.clone());
            } else if envelope.is::<Fetch>() && !self.holds_chunks {
                self.serve_blob(&envelope.read().unwrap());
            }
            return envelope;
        }
    }

    fn serve_blob(&mut self, fetch: &Fetch) {
        let Fetch { blob, offset, length } = *fetch;
        let Some(bytes) = self.blobs.get(&blob) else {
            return self.send(&NoBlob { blob, reason: "not here".to_owned() }, vec![]);
        };
        let size = bytes.len() as u64;
        let start = usize::try_from(offset).unwrap();
        let end = bytes.len().min(start + length as usize);
        let chunk = Bytes::copy_from_slice(&bytes[start..end]);
        if offset == 0 {
            self.fetched.push(blob.into());
        }
        self.send(&Blob { blob, offset, size }, vec![chunk]);
    }

    pub(super) fn send<H: Header>(&self, message: &H, attachments: Vec<Bytes>) {
        let message = Message::new(frames::frames(message, attachments)).unwrap();
        self.router.send(self.peer.as_ref().unwrap(), message).unwrap();
    }
}

/// A model's name.
pub(super) fn name(text: &str) -> protocol::ModelName {
    text.parse().unwrap()
}
