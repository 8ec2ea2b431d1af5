//! A whole worker on a real socket and a real disk, with the broker played by the test.

use std::{collections::BTreeSet, fs, path::PathBuf, thread::JoinHandle};

use bytes::Bytes;
use clap::Parser as _;
use fixtures::{Naming, Size, to_safetensors, write_encoder};
use protocol::{
    AdapterSource, BlobDigest, Component, Dtype, Envelope, ErrorCode, ErrorReply, Failure, Family,
    Header, frames, header,
    reply::ClipEncodeReply,
    request::{ClipEncode, EncodeOptions, Prompt, StackEntry},
    worker::{Alive, Blob, CancelWork, Done, Evict, Fetch, Inventory, NoBlob, Ready, Work},
};
use tempfile::TempDir;
use tokio::sync::oneshot;
use transport::{DealerConfig, Message, Peer, Router, RouterConfig, RouterEvent};

use super::*;
use crate::{
    config::{Config, Flags},
    run::{assemble, prepare},
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(1);

#[tokio::test]
async fn an_adapter_is_fetched_once_and_then_used_where_it_is() {
    let mut broker = Broker::new();
    broker.start_worker(&[]).await;
    let adapter = broker.add_adapter(1);
    assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    assert_eq!(broker.source(adapter).await, AdapterSource::Resident);
    assert_eq!(broker.fetched, [adapter]);

    broker.wait_for(|inventory| inventory.device == [adapter]).await;
    broker.send(&Evict { adapters: vec![adapter] }, vec![]);
    broker.wait_for(|inventory| inventory.device.is_empty()).await;
    assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    broker.stop_worker();
}

#[tokio::test]
async fn adapters_survive_a_restart_on_disk_and_rotten_ones_are_fetched_again() {
    let mut broker = Broker::new();
    let cache = broker.directory.path().join("cache");
    let flags = ["--cache", cache.to_str().unwrap()];
    broker.start_worker(&flags).await;
    let adapters = [broker.add_adapter(1), broker.add_adapter(2)];
    for adapter in adapters {
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    }
    broker.stop_worker();
    let rotten = cache.join("blobs").join(adapters[1].to_string());
    let mut bytes = fs::read(&rotten).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&rotten, bytes).unwrap();

    broker.start_worker(&flags).await;
    let on_disk: BTreeSet<_> = broker.inventory.disk.iter().copied().collect();
    assert_eq!(on_disk, BTreeSet::from(adapters));
    assert_eq!(broker.source(adapters[0]).await, AdapterSource::Disk);
    assert_eq!(broker.source(adapters[1]).await, AdapterSource::Broker, "it is not believed");
    assert_eq!(broker.fetched, [adapters[0], adapters[1], adapters[1]]);
    broker.wait_for(|inventory| inventory.device.len() == 2 && inventory.disk.is_empty()).await;
    broker.stop_worker();
}

#[tokio::test]
async fn a_disk_that_refuses_harms_no_request() {
    let mut broker = Broker::new();
    let cache = broker.directory.path().join("cache");
    broker.start_worker(&["--cache", cache.to_str().unwrap()]).await;
    fs::remove_dir_all(cache.join("blobs")).unwrap();
    for seed in 1..=2 {
        let adapter = broker.add_adapter(seed);
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
        broker.send(&Evict { adapters: vec![adapter] }, vec![]);
        assert_eq!(broker.source(adapter).await, AdapterSource::Broker);
    }
    broker.stop_worker();
}

#[tokio::test]
async fn models_beyond_the_budget_are_loaded_when_they_are_needed() {
    let mut broker = Broker::new();
    let other = broker.add_model("other");
    // One model of 6 MB (49,408 tokens of 32 numbers in f32) fits, two do not.
    broker.start_worker(&["--model-budget-mb", "10"]).await;
    assert_eq!(broker.inventory.models, [name("tiny")]);
    assert_eq!(broker.ready_models, ["other", "tiny"]);

    let base = broker.encode("tiny", &[]).await.unwrap();
    let again = broker.encode("other", &[]).await.unwrap();
    assert_eq!(again.receipt.model_digest, base.receipt.model_digest, "they are the same weights");
    broker.wait_for(|inventory| inventory.models == [name("other")]).await;
    broker.encode("tiny", &[]).await.unwrap();

    fs::remove_file(&other).unwrap();
    let gone = broker.encode("other", &[]).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::UnknownModel);
    assert!(gone.message.contains("cannot be loaded any more"), "{}", gone.message);
    broker.stop_worker();
}

#[tokio::test]
async fn several_lanes_take_several_requests_and_a_cancelled_one_is_not_answered() {
    let mut broker = Broker::new();
    broker.start_worker(&["--lanes", "3"]).await;
    assert_eq!(broker.slots, 4, "one more than lanes");
    let adapter = broker.add_adapter(1);
    let dispatches: Vec<_> = (0..6).map(|_| broker.dispatch("tiny", &[adapter])).collect();
    broker.send(&CancelWork { dispatch: dispatches[5] }, vec![]);
    let mut answered = BTreeSet::new();
    while answered.len() < 5 {
        let (dispatch, reply) = broker.answer().await;
        reply.unwrap();
        assert!(answered.insert(dispatch), "answered twice");
    }
    assert!(answered.iter().eq(&dispatches[..5]));
    assert_eq!(broker.fetched, [adapter], "six requests, one fetch");
    broker.stop_worker();
}

#[tokio::test]
async fn an_adapter_that_nobody_has_fails_its_request_alone() {
    let mut broker = Broker::new();
    broker.start_worker(&[]).await;
    let nowhere = AdapterId::of(b"nowhere");
    let error = broker.encode("tiny", &[nowhere]).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::UnknownLora);
    broker.encode("tiny", &[]).await.unwrap();
    broker.stop_worker();
}

struct Broker {
    directory: TempDir,
    router: Router,
    models: Vec<String>,
    blobs: BTreeMap<BlobDigest, Vec<u8>>,
    worker: Option<(JoinHandle<()>, oneshot::Sender<()>)>,
    peer: Option<Peer>,
    slots: u32,
    ready_models: Vec<String>,
    inventory: Inventory,
    fetched: Vec<AdapterId>,
    dispatches: u64,
}

impl Broker {
    fn new() -> Self {
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
        };
        broker.add_model("tiny");
        broker
    }

    /// Writes the tiny model once more, for workers that start later.
    fn add_model(&mut self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name).join("clip_l.safetensors");
        write_encoder(&path, Size::Tiny, Component::ClipL, Dtype::Float32, Naming::Hf).unwrap();
        self.models.push(format!("{name}=sd15:{}", path.display()));
        path
    }

    fn add_adapter(&mut self, seed: u64) -> AdapterId {
        let tensors = fixtures::seeded_lora(Size::Tiny, Family::Sd15, seed, 4);
        let file = to_safetensors(&tensors).unwrap();
        let (adapter, _) = adapter::read_lora(file.as_slice()).unwrap();
        self.blobs.insert(adapter.id().into(), adapter.to_bytes());
        adapter.id()
    }

    async fn start_worker(&mut self, flags: &[&str]) {
        let endpoint = self.router.endpoint().to_string();
        let mut arguments = vec!["luna-worker", "--threads", "1", "--weights-dtype", "float32"];
        arguments.extend(["--endpoint", &endpoint]);
        let models: Vec<_> = self.models.iter().flat_map(|model| ["--model", model]).collect();
        arguments.extend(models);
        arguments.extend(flags);
        let config = Config::load(&Flags::parse_from(arguments), []).unwrap();
        let prepared = prepare(&config).map_err(|(_, error)| error).unwrap();
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

    fn stop_worker(&mut self) {
        let (thread, stop) = self.worker.take().unwrap();
        stop.send(()).unwrap();
        thread.join().unwrap();
    }

    /// Encodes with an adapter and returns where it was.
    async fn source(&mut self, adapter: AdapterId) -> AdapterSource {
        self.encode("tiny", &[adapter]).await.unwrap().receipt.stack[0].source
    }

    async fn encode(
        &mut self,
        model: &str,
        adapters: &[AdapterId],
    ) -> Result<ClipEncodeReply, Failure> {
        let dispatch = self.dispatch(model, adapters);
        let (answered, reply) = self.answer().await;
        assert_eq!(answered, dispatch);
        reply
    }

    fn dispatch(&mut self, model: &str, adapters: &[AdapterId]) -> u64 {
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
            requires: Vec::new(),
        };
        let work = Work { dispatch, attempt: 1, queued_ms: 0, budget_ms: 60_000 };
        self.send(&work, vec![header::write(&request).into()]);
        dispatch
    }

    /// The next answer of the worker.
    async fn answer(&mut self) -> (u64, Result<ClipEncodeReply, Failure>) {
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

    async fn wait_for(&mut self, holds: impl Fn(&Inventory) -> bool) {
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
            } else if envelope.is::<Fetch>() {
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

    fn send<H: Header>(&self, message: &H, attachments: Vec<Bytes>) {
        let message = Message::new(frames::frames(message, attachments)).unwrap();
        self.router.send(self.peer.as_ref().unwrap(), message).unwrap();
    }
}

fn name(text: &str) -> protocol::ModelName {
    text.parse().unwrap()
}
