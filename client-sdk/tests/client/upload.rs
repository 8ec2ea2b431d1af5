//! Uploads: what is read, what is sent, and what happens when the farm forgets.

use std::collections::BTreeMap;

use bytes::Bytes;
use luna_client::{AdapterId, EncodeRequest, ErrorCode, ErrorKind, Progress};
use protocol::{
    BlobDigest, Envelope, Failure,
    reply::UploadLoraReply,
    request::{ClipEncode, UploadFormat, UploadLora, UploadOp},
};
use safetensors::{Dtype, tensor::TensorView};
use tokio::sync::oneshot;

use crate::farm::{Farm, answer, id, one, run};

const CHUNK_BYTES: u32 = 64;

#[test]
fn a_file_is_sent_as_canonical_bytes_in_order() {
    let farm = Farm::start(Store::default().script());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("anime.safetensors");
    std::fs::write(&path, lora_file()).unwrap();
    let mut steps = Vec::new();
    let uploaded = run(farm.client().upload_lora(&path, |step| steps.push(step))).unwrap();

    let canonical = canonical();
    assert_eq!(uploaded.adapter, AdapterId::of(&canonical));
    assert_eq!(uploaded.sent_bytes, canonical.len() as u64);
    assert_eq!((uploaded.report.targets, uploaded.report.ignored), (1, 1));
    let last = Progress { sent_bytes: uploaded.sent_bytes, total_bytes: uploaded.sent_bytes };
    assert_eq!(steps.len(), canonical.len().div_ceil(CHUNK_BYTES as usize));
    assert!(steps.is_sorted_by_key(|step| step.sent_bytes));
    assert_eq!(steps.last(), Some(&last));

    let UploadOp::Begin { size, format, digest, label } = &farm.seen_of::<UploadLora>()[0].op
    else {
        panic!("the first step is not `begin`");
    };
    assert_eq!((*size, *format), (uploaded.sent_bytes, UploadFormat::Canonical));
    assert_eq!(*digest, Some(BlobDigest::of(&canonical)));
    assert_eq!(label.as_deref(), Some("anime.safetensors"));
}

#[test]
fn nothing_is_sent_that_the_farm_holds() {
    let store = Store { held: vec![AdapterId::of(&canonical())], ..Store::default() };
    let farm = Farm::start(store.script());
    let uploaded = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap();
    assert_eq!(uploaded.sent_bytes, 0);
    assert_eq!(ops(&farm), ["begin"]);
}

#[test]
fn an_upload_that_the_farm_forgot_starts_over() {
    let farm = Farm::start(Store { forget: 2, ..Store::default() }.script());
    let uploaded = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap();
    assert_eq!(uploaded.adapter, AdapterId::of(&canonical()));
    assert_eq!(ops(&farm).iter().filter(|op| **op == "begin").count(), 3);
}

#[test]
fn an_upload_that_is_always_forgotten_is_given_up() {
    let farm = Farm::start(Store { forget: u32::MAX, ..Store::default() }.script());
    let error = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Farm(ErrorCode::InvalidRequest));
    assert_eq!(ops(&farm).iter().filter(|op| **op == "begin").count(), 11, "one got on");
}

#[test]
fn a_farm_that_is_too_busy_for_a_moment_gets_the_same_chunks_again() {
    let farm = Farm::start(Store { busy: 3, ..Store::default() }.script());
    let mut steps = Vec::new();
    let upload = farm.client();
    let upload = upload.upload_bytes(lora_file(), "anime", |step| steps.push(step.sent_bytes));
    assert_eq!(run(upload).unwrap().adapter, AdapterId::of(&canonical()));
    assert!(steps.is_sorted() && steps.len() == canonical().len().div_ceil(CHUNK_BYTES as usize));
    assert_eq!(ops(&farm).iter().filter(|op| **op == "begin").count(), 1);
}

#[test]
fn a_farm_that_stays_too_busy_is_given_up_within_the_time_budget() {
    let farm = Farm::start(Store { busy: u32::MAX, ..Store::default() }.script());
    let client = luna_client::Client::builder().endpoint(farm.endpoint());
    let client = client.timeout(std::time::Duration::from_millis(300)).build().unwrap();
    let error = run(client.upload_bytes(lora_file(), "anime", |_| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Farm(ErrorCode::Overloaded));
}

#[test]
fn dropping_an_upload_aborts_it_at_the_farm() {
    let (arrived, chunk) = oneshot::channel();
    let (mut arrived, mut store) = (Some(arrived), Store::default());
    let farm = Farm::start(move |envelope| {
        let UploadLora { op, .. } = envelope.read().expect("a step of an upload");
        if matches!(op, UploadOp::Begin { .. }) {
            return one(&store.step(envelope).expect("a reply"));
        }
        if let Some(arrived) = arrived.take() {
            arrived.send(()).expect("the test waits");
        }
        Vec::new()
    });
    let client = farm.client();
    run(async {
        tokio::select! {
            ended = client.upload_bytes(lora_file(), "anime", |_| {}) => panic!("{ended:?}"),
            arrived = chunk => arrived.expect("the farm lives"),
        }
    });
    while ops(&farm).last() != Some(&"abort") {
        farm.wait();
    }
    assert_eq!(ops(&farm), ["begin", "chunk", "chunk", "chunk", "chunk", "abort"]);
}

#[test]
fn a_farm_that_restarts_during_an_upload_gets_it_from_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = format!("ipc://{}", directory.path().join("farm.sock").display());
    let mut store = Store::default();
    let first = Farm::start_at(&endpoint, move |envelope| match store.step(envelope) {
        Ok(reply) if store.bytes.len() < 3 * CHUNK_BYTES as usize => one(&reply),
        _ => Vec::new(),
    });
    let client = luna_client::Client::builder().endpoint(&endpoint).build().unwrap();
    let upload =
        std::thread::spawn(move || run(client.upload_bytes(lora_file(), "anime", |_| {})).unwrap());
    while ops(&first).len() < 4 {
        first.wait();
    }
    drop(first);
    let second = Farm::start_at(&endpoint, Store { begun: 7, ..Store::default() }.script());
    assert_eq!(upload.join().unwrap().adapter, AdapterId::of(&canonical()));
    assert!(ops(&second).contains(&"begin"));
}

#[test]
fn an_upload_goes_on_where_the_farm_says_that_it_ended() {
    let kept = 3 * CHUNK_BYTES as usize;
    let store = Store { kept, bytes: canonical()[..kept].to_vec(), ..Store::default() };
    let farm = Farm::start(store.script());
    let mut steps = Vec::new();
    let upload = farm.client();
    let upload = upload.upload_bytes(lora_file(), "anime", |step| steps.push(step.sent_bytes));
    let uploaded = run(upload).unwrap();
    assert_eq!(uploaded.adapter, AdapterId::of(&canonical()));
    assert_eq!(uploaded.sent_bytes, (canonical().len() - kept) as u64);
    assert_eq!(steps[0], (kept + CHUNK_BYTES as usize) as u64);
}

#[test]
fn an_upload_that_gets_on_a_little_every_time_is_not_given_up() {
    // The farm forgets every upload after two more chunks, and keeps what came.
    let farm = Farm::start(Store { forget: u32::MAX, keeps: true, ..Store::default() }.script());
    let uploaded = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap();
    assert_eq!(uploaded.adapter, AdapterId::of(&canonical()));
    assert_eq!(uploaded.sent_bytes, canonical().len() as u64);
    assert!(ops(&farm).iter().filter(|op| **op == "begin").count() > 3);
}

#[test]
fn no_more_is_on_its_way_than_the_farm_grants() {
    for (credit, chunks) in [(1, 1), (2 * u64::from(CHUNK_BYTES), 2), (u64::MAX, 4)] {
        let mut store = Store { credit: Some(credit), ..Store::default() };
        let (arrived, all) = oneshot::channel();
        let mut arrived = Some(arrived);
        // The farm takes what comes and says nothing of it.
        let mut count = 0;
        let farm = Farm::start(move |envelope| {
            let reply = store.step(envelope).expect("a reply");
            if reply.upload.is_some() && reply.received == 0 {
                return one(&reply);
            }
            count += 1;
            if count == chunks {
                arrived.take().expect("once").send(()).expect("the test waits");
            }
            Vec::new()
        });
        let client = luna_client::Client::builder().endpoint(farm.endpoint());
        let client = client.timeout(std::time::Duration::from_millis(200)).build().unwrap();
        let error = run(async {
            let upload = client.upload_bytes(lora_file(), "anime", |_| {});
            let (ended, all) = tokio::join!(upload, all);
            all.expect("the farm lives");
            ended.unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let sent = ops(&farm).iter().filter(|op| **op == "chunk").count();
        assert_eq!(sent, chunks, "with a credit of {credit} bytes");
    }
}

#[test]
fn a_file_that_another_client_sends_is_waited_for() {
    let farm = Farm::start(Store { busy_with_another: 3, ..Store::default() }.script());
    let uploaded = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap();
    assert_eq!((uploaded.adapter, uploaded.sent_bytes), (AdapterId::of(&canonical()), 0));
    assert_eq!(ops(&farm), ["begin"; 4]);
}

#[test]
fn encodes_and_uploads_do_not_share_a_connection() {
    let mut store = Store::default();
    let farm = Farm::start(move |envelope| {
        if envelope.is::<ClipEncode>() {
            return answer(envelope);
        }
        let reply = store.step(envelope).expect("a reply");
        // The chunks are never answered: their connection is as good as stuck.
        if reply.received == 0 { one(&reply) } else { Vec::new() }
    });
    let client = farm.client();
    run(async {
        let upload = client.upload_bytes(lora_file(), "anime", |_| {});
        let encode = async {
            while !ops(&farm).contains(&"chunk") {
                tokio::task::yield_now().await;
            }
            client.encode(EncodeRequest::new("sd15").prompt("a fox")).await
        };
        tokio::select! {
            ended = upload => panic!("{ended:?}"),
            encoded = encode => drop(encoded.expect("an answer")),
        }
    });
    let (uploads, encodes) = (farm.senders_of::<UploadLora>(), farm.senders_of::<ClipEncode>());
    assert_ne!(uploads[0], encodes[0]);
}

#[test]
fn a_farm_that_computes_another_digest_is_not_believed() {
    let farm = Farm::start(|envelope| {
        one(&UploadLoraReply {
            id: id(envelope),
            upload: None,
            received: 0,
            chunk_bytes_max: CHUNK_BYTES,
            credit_bytes: None,
            wait_ms: None,
            adapter: Some(AdapterId::of(b"another")),
            blob: None,
            report: None,
        })
    });
    let error = run(farm.client().upload_bytes(lora_file(), "anime", |_| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
}

#[test]
fn a_file_that_is_no_lora_is_named_and_not_sent() {
    let farm = Farm::start(Store::default().script());
    let client = farm.client();
    let directory = tempfile::tempdir().unwrap();

    let missing = directory.path().join("missing.safetensors");
    let error = run(client.upload_lora(&missing, |_| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("missing.safetensors"), "{error}");
    let error = run(client.upload_lora(directory.path(), |_| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");

    let garbage = directory.path().join("garbage.safetensors");
    std::fs::write(&garbage, b"nothing of the kind").unwrap();
    let error = run(client.upload_lora(&garbage, |_| {})).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Adapter, Some(ErrorCode::LoraRejected)));
    assert!(error.to_string().contains("garbage.safetensors"), "{error}");
    assert!(farm.seen().is_empty());
}

/// The farm's side of uploads, as far as the client can tell.
#[derive(Default)]
struct Store {
    held: Vec<AdapterId>,
    bytes: Vec<u8>,
    begun: u32,
    /// How many uploads are forgotten after their second chunk.
    forget: u32,
    /// How many chunks are refused for the moment, after the first.
    busy: u32,
    /// Bytes that were kept of an earlier upload.
    kept: usize,
    /// Whether what came of a forgotten upload is kept.
    keeps: bool,
    /// What every reply grants.
    credit: Option<u64>,
    /// How often `begin` is told that another client sends the file, which is held then.
    busy_with_another: u32,
}

impl Store {
    fn script(mut self) -> impl FnMut(&Envelope) -> Vec<Vec<Bytes>> + Send + 'static {
        move |envelope| match self.step(envelope) {
            Ok(reply) => one(&reply),
            Err(failure) => one(&failure.into_reply(Some(id(envelope)))),
        }
    }

    fn step(&mut self, envelope: &Envelope) -> Result<UploadLoraReply, Failure> {
        let UploadLora { id, op } = envelope.read().expect("a step of an upload");
        let mut reply = UploadLoraReply {
            id,
            upload: Some(format!("u-{}", self.begun).parse().expect("a name")),
            received: 0,
            chunk_bytes_max: CHUNK_BYTES,
            credit_bytes: self.credit,
            wait_ms: None,
            adapter: None,
            blob: None,
            report: None,
        };
        match op {
            UploadOp::Begin { digest, .. } => {
                let digest = AdapterId::from_bytes(*digest.expect("a digest").as_bytes());
                reply.adapter = self.held.contains(&digest).then_some(digest);
                if self.busy_with_another > 0 {
                    self.busy_with_another -= 1;
                    self.held.extend((self.busy_with_another == 0).then_some(digest));
                    return Ok(UploadLoraReply { upload: None, wait_ms: Some(1), ..reply });
                }
                self.begun += 1;
                if !self.keeps {
                    self.bytes.truncate(self.kept);
                }
                self.kept = self.bytes.len();
                reply.upload = Some(format!("u-{}", self.begun).parse().expect("a name"));
            }
            UploadOp::Chunk { upload, offset } => {
                let is_forgotten = self.begun <= self.forget
                    && self.bytes.len() >= self.kept + 2 * CHUNK_BYTES as usize;
                if is_forgotten || Some(&upload) != reply.upload.as_ref() {
                    let message = format!("upload `{upload}` is not open: begin a new one");
                    return Err(Failure::new(ErrorCode::InvalidRequest, message));
                }
                if self.busy > 0 && !self.bytes.is_empty() {
                    self.busy -= 1;
                    let failure = Failure::new(ErrorCode::Overloaded, "the disk is slow");
                    return Err(Failure { retry_after_ms: Some(1), ..failure });
                }
                if offset != self.bytes.len() as u64 {
                    let message = format!("the chunk starts at offset {offset}");
                    return Err(Failure::new(ErrorCode::InvalidRequest, message));
                }
                self.bytes.extend_from_slice(&envelope.attachments[0]);
            }
            UploadOp::Commit { .. } => reply.adapter = Some(AdapterId::of(&self.bytes)),
            UploadOp::Abort { .. } => {}
        }
        reply.received = self.bytes.len() as u64;
        Ok(reply)
    }
}

fn ops(farm: &Farm) -> Vec<&'static str> {
    let names = farm.seen_of::<UploadLora>().into_iter().map(|step| match step.op {
        UploadOp::Begin { .. } => "begin",
        UploadOp::Chunk { .. } => "chunk",
        UploadOp::Commit { .. } => "commit",
        UploadOp::Abort { .. } => "abort",
    });
    names.collect()
}

fn canonical() -> Vec<u8> {
    adapter::read_lora(&*lora_file()).expect("a LoRA").0.to_bytes()
}

/// One weight of the text encoder and one tensor of the image model.
fn lora_file() -> Vec<u8> {
    let up: Vec<u8> = (0..64_u8).flat_map(|n| f32::from(n).to_le_bytes()).collect();
    let down: Vec<u8> = (0..32_u8).flat_map(|n| (-f32::from(n)).to_le_bytes()).collect();
    let view = |shape: &[usize], bytes| {
        TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a shape that fits")
    };
    let te = "lora_te_text_model_encoder_layers_0_mlp_fc1";
    let tensors = BTreeMap::from([
        (format!("{te}.lora_up.weight"), view(&[16, 4], &up)),
        (format!("{te}.lora_down.weight"), view(&[4, 8], &down)),
        ("lora_unet_mid_block.lora_up.weight".to_owned(), view(&[16, 4], &up)),
    ]);
    safetensors::serialize(tensors, None).expect("a safetensors file")
}
