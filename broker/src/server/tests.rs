//! A broker on real sockets and a real disk, with clients and workers played by the test.

use std::{collections::BTreeMap, path::Path, time::Duration};

use crate::{BrokerConfig, Server};
use broker_core::Config;
use bytes::Bytes;
use protocol::{
    AdapterId, BlobDigest, Dtype, Envelope, ErrorReply, Family, Header, ModelDigest, frames,
    reply::{
        CancelReply, ListModelsReply, ModelInfo, RegisterModelReply, StatusReply, UploadLoraReply,
    },
    request::{
        ClipEncode, EncodeOptions, ListModels, ModelFile, Prompt, RegisterModel, Status,
        UploadFormat, UploadLora, UploadOp,
    },
    worker::{Alive, Blob, Done, Fetch, Inventory, Ready, Register, Registered, Work},
};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};
use transport::{Dealer, DealerConfig, DealerEvent, Endpoint, Message};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_request_goes_to_a_worker_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    let mut worker = Peer::connect(&farm.worker_endpoint).await;
    worker.send(&ready(), vec![]);
    worker.skip_to("heartbeat").await;

    client.send(&encode("r1"), vec![Bytes::from_static(b"vectors")]);
    let work = worker.skip_to("work").await;
    assert_eq!(work.attachments[1], "vectors");
    let dispatch = work.read::<Work>().unwrap().dispatch;
    let reply = CancelReply { id: "r1".parse().unwrap(), cancelled: false };
    let reply = vec![protocol::header::write(&reply).into(), Bytes::from_static(b"cond")];
    worker.send(&Done { epoch: 1, dispatch, failed: None, ..Done::default() }, reply);

    let reply = client.next().await;
    assert_eq!((reply.peek.id.unwrap().as_str(), &reply.attachments[0][..]), ("r1", &b"cond"[..]));
    client.send(&Status { id: "s".parse().unwrap() }, vec![]);
    let status: StatusReply = client.next().await.read().unwrap();
    assert!(status.ready, "{:?}", status.reasons);
    assert_eq!((status.counters.accepted, status.counters.answered), (1, 1));
    farm.stop().await;
}

#[tokio::test]
async fn an_uploaded_lora_is_fetched_by_a_worker_and_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    let file = Bytes::from(lora());

    let begin = UploadOp::Begin {
        size: file.len() as u64,
        format: UploadFormat::Lora,
        digest: Some(BlobDigest::of(&file)),
        label: None,
    };
    let opened = client.upload(begin.clone(), vec![]).await;
    let upload = opened.upload.unwrap();
    client.upload(UploadOp::Chunk { upload: upload.clone(), offset: 0 }, vec![file]).await;
    let adapter = client.upload(UploadOp::Commit { upload }, vec![]).await.adapter.unwrap();
    farm.stop().await;

    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    assert_eq!(client.upload(begin, vec![]).await.adapter, Some(adapter), "it is not sent again");
    let mut worker = Peer::connect(&farm.worker_endpoint).await;
    worker.send(&ready(), vec![]);
    worker.send(&Fetch { blob: adapter.into(), offset: 0, length: u32::MAX }, vec![]);
    let blob = worker.skip_to("blob").await;
    let bytes = &blob.attachments[0];
    assert_eq!(blob.read::<Blob>().unwrap().size, bytes.len() as u64);
    assert_eq!(AdapterId::of(bytes), adapter);
    farm.stop().await;
}

#[tokio::test]
async fn a_model_is_uploaded_registered_and_served_again_after_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    let mut worker = Peer::connect(&farm.worker_endpoint).await;
    worker.send(&ready(), vec![]);
    let file = Bytes::from_static(b"weights");
    let blob = BlobDigest::of(&file);
    let begin = UploadOp::Begin {
        size: file.len() as u64,
        format: UploadFormat::Model,
        digest: Some(blob),
        label: None,
    };
    let upload = client.upload(begin.clone(), vec![]).await.upload.unwrap();
    client.upload(UploadOp::Chunk { upload: upload.clone(), offset: 0 }, vec![file]).await;
    assert_eq!(client.upload(UploadOp::Commit { upload }, vec![]).await.blob, Some(blob));
    assert_eq!(client.upload(begin, vec![]).await.blob, Some(blob), "it is not sent again");

    client.send(&register(blob), vec![]);
    worker.serves_the_model(blob).await;
    let reply: RegisterModelReply = client.skip_to("register_model_reply").await.read().unwrap();
    assert_eq!((reply.workers.len(), reply.model.name.as_str()), (1, "xl"));
    farm.stop().await;

    let farm = Farm::start(directory.path());
    let mut worker = Peer::connect(&farm.worker_endpoint).await;
    worker.send(&ready(), vec![]);
    worker.serves_the_model(blob).await;
    let mut client = Peer::connect(&farm.endpoint).await;
    client.send(&ListModels { id: "l".parse().unwrap() }, vec![]);
    let listed: ListModelsReply = client.next().await.read().unwrap();
    assert_eq!(listed.models.len(), 2);
    farm.stop().await;
}

#[tokio::test]
async fn garbage_is_answered_and_harms_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    client.dealer.send(Message::from("garbage")).unwrap();
    let error: ErrorReply = client.next().await.read().unwrap();
    assert_eq!((error.id, error.code), (None, protocol::ErrorCode::InvalidRequest));
    client.send(&Status { id: "s".parse().unwrap() }, vec![]);
    assert!(client.next().await.is::<StatusReply>());
    farm.stop().await;
}

#[tokio::test]
async fn a_stopping_broker_answers_what_it_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let farm = Farm::start(directory.path());
    let mut client = Peer::connect(&farm.endpoint).await;
    let mut worker = Peer::connect(&farm.worker_endpoint).await;
    worker.send(&ready(), vec![]);
    client.send(&encode("r1"), vec![]);
    client.send(&encode("r2"), vec![]);
    // Its answer comes when the broker has taken both: a broker that stops takes no more.
    client.send(&Status { id: "s1".parse().unwrap() }, vec![]);
    client.skip_to("status_reply").await;
    let dispatch = worker.skip_to("work").await.read::<Work>().unwrap().dispatch;

    let stopping = tokio::spawn(farm.stop());
    let reply = CancelReply { id: "r1".parse().unwrap(), cancelled: false };
    let reply = vec![protocol::header::write(&reply).into()];
    worker.send(&Done { epoch: 1, dispatch, failed: None, ..Done::default() }, reply);

    assert!(client.next().await.is::<CancelReply>());
    let error: ErrorReply = client.next().await.read().unwrap();
    assert_eq!(error.id.unwrap().as_str(), "r2");
    assert_eq!(error.code, protocol::ErrorCode::Overloaded, "the grace period was over");
    stopping.await.unwrap();
}

/// A broker in this process.
struct Farm {
    endpoint: Endpoint,
    worker_endpoint: Endpoint,
    stop: oneshot::Sender<String>,
    serving: JoinHandle<anyhow::Result<()>>,
}

impl Farm {
    fn start(store: &Path) -> Self {
        let any: Endpoint = "tcp://127.0.0.1:0".parse().unwrap();
        let config = BrokerConfig {
            endpoint: any.clone(),
            worker_endpoint: any,
            store: store.to_owned(),
            grace: Duration::from_millis(300),
            core: Config::default(),
        };
        let server = Server::bind(&config).unwrap();
        let (stop, stopped) = oneshot::channel();
        Self {
            endpoint: server.endpoint().clone(),
            worker_endpoint: server.worker_endpoint().clone(),
            stop,
            serving: tokio::spawn(server.serve(async { stopped.await.unwrap_or_default() })),
        }
    }

    async fn stop(self) {
        self.stop.send("the test is over".to_owned()).unwrap();
        timeout(PATIENCE, self.serving).await.unwrap().unwrap().unwrap();
    }
}

/// A client or a worker.
struct Peer {
    dealer: Dealer,
}

impl Peer {
    async fn connect(endpoint: &Endpoint) -> Self {
        let mut dealer = Dealer::connect(endpoint, DealerConfig::default()).unwrap();
        let event = timeout(PATIENCE, dealer.recv()).await.unwrap();
        assert!(matches!(event, Some(DealerEvent::Connected)), "{event:?}");
        Self { dealer }
    }

    fn send<H: Header>(&self, header: &H, attachments: Vec<Bytes>) {
        let message = Message::new(frames::frames(header, attachments)).unwrap();
        self.dealer.send(message).unwrap();
    }

    async fn upload(&mut self, op: UploadOp, attachments: Vec<Bytes>) -> UploadLoraReply {
        self.send(&UploadLora { id: "u".parse().unwrap(), op }, attachments);
        self.next().await.read().unwrap()
    }

    /// As a worker, is asked for the model made of `blob`, fetches it and serves it.
    async fn serves_the_model(&mut self, blob: BlobDigest) {
        let register: Register = self.skip_to("register").await.read().unwrap();
        assert_eq!(register.files, [ModelFile::Blob(blob)]);
        self.send(&Fetch { blob, offset: 0, length: u32::MAX }, vec![]);
        assert_eq!(BlobDigest::of(&self.skip_to("blob").await.attachments[0]), blob);
        let ticket = register.ticket;
        let model = Some(model("xl"));
        self.send(&Registered { epoch: 1, ticket, model, failure: None }, vec![]);
        let (revision, inventory, in_flight) = (0, None, vec![]);
        let alive = Alive { epoch: 1, revision, inventory, in_flight, ..Alive::default() };
        self.send(&alive, vec![]);
        self.skip_to("heartbeat").await; // The broker has read everything before.
    }

    async fn next(&mut self) -> Envelope {
        match timeout(PATIENCE, self.dealer.recv()).await.unwrap() {
            Some(DealerEvent::Message(message)) => Envelope::open(message.into_frames()).unwrap(),
            other => panic!("expected a message: {other:?}"),
        }
    }

    async fn skip_to(&mut self, kind: &str) -> Envelope {
        loop {
            let envelope = self.next().await;
            if envelope.peek.kind == kind {
                return envelope;
            }
        }
    }
}

fn ready() -> Ready {
    Ready {
        worker: "gpu-0".parse().unwrap(),
        epoch: 1,
        pid: 1,
        version: "0".to_owned(),
        device: "cpu".to_owned(),
        slots: 1,
        models: vec![model("sd15")],
        revision: 0,
        inventory: Inventory::default(),
        in_flight: vec![],
        draining: false,
        died_with: Vec::new(),
    }
}

fn model(name: &str) -> ModelInfo {
    ModelInfo {
        name: name.parse().unwrap(),
        digest: ModelDigest::of(name.as_bytes()),
        family: Family::Sd15,
        weights_dtype: Dtype::Float16,
        bytes: 1,
        chunk_tokens: BTreeMap::new(),
    }
}

fn register(blob: BlobDigest) -> RegisterModel {
    RegisterModel {
        id: "m".parse().unwrap(),
        name: "xl".parse().unwrap(),
        family: Family::Sd15,
        files: vec![ModelFile::Blob(blob)],
        budget_ms: None,
    }
}

fn encode(id: &str) -> ClipEncode {
    ClipEncode {
        id: id.parse().unwrap(),
        model: "sd15".parse().unwrap(),
        model_digest: None,
        prompts: vec![Prompt { text: Some(format!("a cat called {id}")), ..Prompt::default() }],
        stack: vec![],
        options: EncodeOptions::default(),
        budget_ms: None,
        no_cache: false,
        requires: vec![],
    }
}

/// A kohya LoRA of rank 1 on one weight of `clip_l`.
fn lora() -> Vec<u8> {
    let prefix = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
    let header = format!(
        "{{\"{prefix}.lora_down.weight\":{{\"dtype\":\"F16\",\"shape\":[1,768],\"data_offsets\":[0,1536]}},\
         \"{prefix}.lora_up.weight\":{{\"dtype\":\"F16\",\"shape\":[768,1],\"data_offsets\":[1536,3072]}}}}"
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend([0; 3072]);
    file
}
