//! Models: registered by path, by digest, and by files that are uploaded first.

use luna_client::{
    BlobDigest, Dtype, ErrorCode, ErrorKind, Family, ModelDigest, ModelInfo, RegisterModel,
    RegisterModelReply, WorkerFailure,
};
use protocol::{
    Envelope, Failure,
    reply::UploadLoraReply,
    request::{self, ModelFile, UploadFormat, UploadLora, UploadOp},
};

use crate::farm::{Farm, id, one, run};

const CHUNK_BYTES: u32 = 1000;

#[test]
fn a_model_is_registered_by_path_and_by_digest() {
    let farm = Farm::start(Files::default().script());
    let blob = BlobDigest::of(b"known");
    let model = RegisterModel::new("xl", Family::Sdxl).path("/models/l.safetensors").blob(blob);
    let reply = run(farm.client().register_model(model, |_, _| {})).unwrap();
    assert_eq!((reply.model.name.as_str(), reply.workers.len()), ("xl", 1));
    assert_eq!(reply.failed[0].failure.code, ErrorCode::Forbidden);

    let asked = farm.seen_of::<request::RegisterModel>().remove(0);
    let path = ModelFile::Path("/models/l.safetensors".to_owned());
    assert_eq!(asked.files, [path, ModelFile::Blob(blob)]);
    assert_eq!(asked.budget_ms, Some(30_000));
    assert_eq!(farm.seen().len(), 1, "nothing was uploaded");
}

#[test]
fn a_file_that_is_here_is_uploaded_once_in_chunks() {
    let farm = Farm::start(Files::default().script());
    let client = farm.client();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("l.safetensors");
    let content: Vec<u8> = (0..10_500_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(&path, &content).unwrap();
    let blob = BlobDigest::of(&content);
    let mut steps = Vec::new();
    let model = RegisterModel::new("xl", Family::Sd15).upload(&path);
    run(client.register_model(model.clone(), |file, step| {
        assert_eq!(file, path);
        steps.push((step.sent_bytes, step.total_bytes));
    }))
    .unwrap();
    assert_eq!((steps.len(), steps.last()), (11, Some(&(10_500, 10_500))));
    assert_eq!(farm.seen_of::<request::RegisterModel>()[0].files, [ModelFile::Blob(blob)]);
    let first = farm.seen_of::<UploadLora>().remove(0).op;
    let (format, digest, label) =
        (UploadFormat::Model, Some(blob), Some("l.safetensors".to_owned()));
    assert_eq!(first, UploadOp::Begin { size: 10_500, format, digest, label });

    let uploaded = run(client.upload_model_file(&path, |_| {})).unwrap();
    assert_eq!((uploaded.blob, uploaded.sent_bytes), (blob, 0));
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_nothing_is_registered() {
    let farm = Farm::start(Files::default().script());
    let model = RegisterModel::new("xl", Family::Sd15).upload("/no/such/l.safetensors");
    let error = run(farm.client().register_model(model, |_, _| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("`/no/such/l.safetensors`"), "{error}");
    let model = RegisterModel::new("no such name", Family::Sd15);
    let error = run(farm.client().register_model(model, |_, _| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(farm.seen().is_empty());
}

/// The farm's side: files by digest, and one worker of two that serves whatever is asked.
#[derive(Default)]
struct Files {
    held: Vec<BlobDigest>,
    bytes: Vec<u8>,
}

impl Files {
    fn script(mut self) -> impl FnMut(&Envelope) -> Vec<Vec<bytes::Bytes>> + Send + 'static {
        move |envelope| {
            if envelope.is::<UploadLora>() {
                return one(&self.step(envelope));
            }
            let asked: request::RegisterModel = envelope.read().expect("a model");
            let model = ModelInfo {
                digest: ModelDigest::of(b"weights"),
                family: asked.family,
                name: asked.name,
                weights_dtype: Dtype::Float16,
                bytes: 1,
                chunk_tokens: std::collections::BTreeMap::new(),
            };
            let failure = Failure::new(ErrorCode::Forbidden, "not in an allowed directory");
            let failed = vec![WorkerFailure { worker: "gpu-1".parse().expect("a name"), failure }];
            let workers = vec!["gpu-0".parse().expect("a name")];
            one(&RegisterModelReply { id: id(envelope), model, workers, failed })
        }
    }

    fn step(&mut self, envelope: &Envelope) -> UploadLoraReply {
        let UploadLora { id, op } = envelope.read().expect("a step of an upload");
        let mut blob = None;
        match op {
            UploadOp::Begin { digest, .. } => {
                self.bytes.clear();
                blob = digest.filter(|digest| self.held.contains(digest));
            }
            UploadOp::Chunk { offset, .. } => {
                assert_eq!(offset, self.bytes.len() as u64, "chunks come in order");
                self.bytes.extend_from_slice(&envelope.attachments[0]);
            }
            UploadOp::Commit { .. } => {
                let digest = BlobDigest::of(&self.bytes);
                self.held.push(digest);
                blob = Some(digest);
            }
            UploadOp::Abort { .. } => {}
        }
        let (received, upload) = (self.bytes.len() as u64, Some("u-1".parse().expect("a name")));
        let chunk_bytes_max = CHUNK_BYTES;
        UploadLoraReply {
            id,
            upload,
            received,
            chunk_bytes_max,
            credit_bytes: None,
            wait_ms: None,
            adapter: None,
            blob,
            report: None,
        }
    }
}
