//! The store on a real directory: commits, reads, restarts and rot.

use std::{fs, sync::atomic::AtomicBool};

use broker_core::ModelSpec;
use protocol::{
    AdapterId, Dtype, ErrorCode, Failure, Family, ModelDigest,
    request::{ModelFile, UploadFormat},
};
use tempfile::TempDir;

use adapter::PatchSet;

use super::{commit::listed as listed_of, *};

mod resumption;

impl BlobStore {
    /// Does one thing as the threads do together.
    pub(crate) fn execute(
        &mut self,
        op: BlobOp,
        events: &mut Vec<BlobEvent>,
    ) -> Result<BlobOutcome, OpError> {
        let stop = AtomicBool::new(false);
        match self.start(op.clone(), events) {
            Step::Done(result) => result,
            Step::Aside(task) => {
                let finished = task.run(&self.layout, &stop);
                self.finish(finished)
            }
            Step::Behind(_, task) => {
                let task = task.expect("nothing else is under way");
                let Finished::Verified { blob, found } = task.run(&self.layout, &stop) else {
                    panic!("a verification ends as one");
                };
                self.verified(blob, found, events)?;
                self.execute(op, events)
            }
        }
    }
}

#[test]
fn an_uploaded_lora_becomes_a_canonical_adapter_that_can_be_read() {
    let directory = directory();
    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(found.adapters, []);
    let file = lora();
    let BlobOutcome::Committed { blob, report } = upload(&mut store, "u1", &file).unwrap() else {
        panic!("a commit makes an adapter");
    };
    assert_eq!((report.targets, report.ignored), (1, 1));
    assert_eq!(blob.raw, [BlobDigest::of(&file)]);

    let bytes = read(&mut store, blob.adapter).unwrap();

    assert_eq!(bytes.len() as u64, blob.bytes);
    assert_eq!(AdapterId::of(&bytes), blob.adapter);
    assert_eq!(PatchSet::from_bytes(&bytes).unwrap().patches().len(), 1);
    assert_eq!(fs::read_dir(directory.path().join("uploads")).unwrap().count(), 0);
}

#[test]
fn the_canonical_form_of_a_file_is_the_same_adapter() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    let bytes = read(&mut store, blob.adapter).unwrap();

    begin(&mut store, "u2", &bytes);
    let again = commit(&mut store, "u2", UploadFormat::Canonical, None).unwrap();

    let BlobOutcome::Committed { blob: again, .. } = again else { panic!("an adapter") };
    assert_eq!((again.adapter, again.bytes), (blob.adapter, blob.bytes));
    assert_eq!(again.raw.len(), 2, "both files are known");
}

#[test]
fn the_store_survives_a_restart_and_clears_what_nobody_can_go_on_with() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    begin(&mut store, "u2", b"half");
    drop(store); // As after a crash: the file stays.
    let uploads = directory.path().join("uploads");
    assert_eq!(fs::read_dir(&uploads).unwrap().count(), 1);
    fs::write(directory.path().join("blobs").join("notes.txt"), "not a blob").unwrap();

    let (mut store, found) = BlobStore::open(directory.path()).unwrap();

    assert_eq!(found.adapters, std::slice::from_ref(&blob));
    assert_eq!(found.parts, []);
    assert_eq!(fs::read_dir(&uploads).unwrap().count(), 0);
    read(&mut store, blob.adapter).unwrap();
}

#[test]
fn a_store_has_one_user() {
    let directory = directory();
    let (_store, _) = BlobStore::open(directory.path()).unwrap();
    let error = BlobStore::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("in use by another broker"), "{error}");
}

#[test]
fn a_digest_that_does_not_match_is_refused_with_both() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let file = lora();
    let (announced, found) = (BlobDigest::of(b"other"), BlobDigest::of(&file));
    begin(&mut store, "u1", &file);
    let error = commit(&mut store, "u1", UploadFormat::Lora, Some(announced)).unwrap_err();
    let failure = Failure::from(error);
    assert_eq!(failure.code, ErrorCode::LoraRejected);
    assert_eq!(
        failure.message,
        format!("the file's digest is `{found}`: it was announced as `{announced}`")
    );
    let error = commit(&mut store, "u1", UploadFormat::Lora, None).unwrap_err();
    assert!(matches!(error, OpError::NotOpen(_)), "the upload is gone");
    assert_eq!(fs::read_dir(directory.path().join("uploads")).unwrap().count(), 0);
}

#[test]
fn what_is_no_lora_is_refused() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    for (name, file) in [("u1", &b"PK\x03\x04"[..]), ("u2", b""), ("u3", &lora()[..20])] {
        let error = upload(&mut store, name, file).unwrap_err();
        assert_eq!(Failure::from(error).code, ErrorCode::LoraRejected);
    }
}

#[test]
fn a_rotten_blob_is_never_served() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    let path = store.layout.blob(BlobName::Adapter(blob.adapter));
    drop(store);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(found.adapters.len(), 1, "content is verified when it is first served");

    let mut events = Vec::new();
    let op = BlobOp::Read { blob: BlobName::Adapter(blob.adapter), offset: 0, length: 1 };
    let error = store.execute(op, &mut events).unwrap_err();

    assert!(matches!(error, OpError::Rotten { .. }), "{error}");
    assert!(matches!(events[..], [BlobEvent::Removed { .. }]));
    assert!(!path.exists());
}

#[test]
fn a_deleted_blob_is_gone_and_deleting_it_again_is_fine() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    read(&mut store, blob.adapter).unwrap();
    for _ in 0..2 {
        let op = BlobOp::Delete { blobs: vec![BlobName::Adapter(blob.adapter)] };
        assert_eq!(store.execute(op, &mut Vec::new()).unwrap(), BlobOutcome::Done);
    }
    assert!(matches!(read(&mut store, blob.adapter), Err(OpError::NotStored(_))));
    drop(store);
    assert_eq!(BlobStore::open(directory.path()).unwrap().1.adapters, []);
}

#[test]
fn reading_past_the_end_gives_nothing() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    let op = BlobOp::Read { blob: BlobName::Adapter(blob.adapter), offset: u64::MAX, length: 10 };
    let outcome = store.execute(op, &mut Vec::new()).unwrap();
    assert_eq!(outcome, BlobOutcome::Read { size: blob.bytes, bytes: Bytes::new() });
}

#[test]
fn what_another_version_of_the_reader_made_of_a_file_is_not_believed() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let BlobOutcome::Committed { blob, .. } = upload(&mut store, "u1", &lora()).unwrap() else {
        panic!("a commit makes an adapter");
    };
    let sidecar = store.layout.blob(BlobName::Adapter(blob.adapter)).with_extension("json");
    drop(store);
    let text = fs::read_to_string(&sidecar).unwrap();
    let version = format!("\"reader\": {}", adapter::READER_VERSION);
    assert!(text.contains(&version), "{text}");
    for other in ["\"reader\": 0", "\"another\": 0"] {
        fs::write(&sidecar, text.replace(&version, other)).unwrap();
        let (mut store, found) = BlobStore::open(directory.path()).unwrap();
        assert_eq!(found.adapters, [StoredBlob { raw: vec![], ..blob.clone() }]);
        let again = upload(&mut store, "u2", &lora()).unwrap();
        assert!(matches!(again, BlobOutcome::Committed { blob: again, .. } if again == blob));
    }
}

#[test]
fn a_file_of_a_model_is_kept_as_it_is_and_survives_a_restart() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    begin(&mut store, "u1", b"weights");
    let wrong = Some(BlobDigest::of(b"other"));
    commit(&mut store, "u1", UploadFormat::Model, wrong).unwrap_err();
    begin(&mut store, "u2", b"weights");
    let right = BlobDigest::of(b"weights");
    let outcome = commit(&mut store, "u2", UploadFormat::Model, Some(right)).unwrap();
    let label = Some("anime".to_owned());
    let file = StoredModelFile { blob: right, bytes: 7, label };
    assert_eq!(outcome, BlobOutcome::CommittedModelFile(file.clone()));
    drop(store);

    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!((found.model_files, found.adapters), (vec![file], vec![]));
    assert_eq!(read_blob(&mut store, BlobName::ModelFile(right)).unwrap(), b"weights");
    assert!(read_blob(&mut store, BlobName::Adapter(right.into())).is_err(), "it is no adapter");
    assert_eq!(fs::read_dir(directory.path().join("uploads")).unwrap().count(), 0);
    store.execute(BlobOp::Delete { blobs: vec![BlobName::ModelFile(right)] }, &mut vec![]).unwrap();
    assert!(read_blob(&mut store, BlobName::ModelFile(right)).is_err());
}

#[test]
fn registrations_survive_a_restart_and_a_broken_list_is_set_aside() {
    let directory = directory();
    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(found.registrations, []);
    let registrations = vec![registration("xl"), registration("turbo")];
    let remember = BlobOp::Remember { registrations: registrations.clone() };
    assert_eq!(store.execute(remember, &mut vec![]).unwrap(), BlobOutcome::Done);
    drop(store);
    assert_eq!(BlobStore::open(directory.path()).unwrap().1.registrations, registrations);

    let path = directory.path().join("registrations.json");
    for (number, broken) in
        ["", "{", "{\"version\":0,\"models\":[]}", "[[[[[[[["].iter().enumerate()
    {
        fs::write(&path, broken).unwrap();
        let (mut store, found) = BlobStore::open(directory.path()).unwrap();
        assert_eq!(found.registrations, []);
        let aside = match number {
            0 => path.with_extension("json.broken"),
            number => path.with_extension(format!("json.broken-{}", number + 1)),
        };
        assert_eq!(fs::read(aside).unwrap(), broken.as_bytes(), "earlier ones stay");
        let remember = BlobOp::Remember { registrations: registrations.clone() };
        store.execute(remember, &mut vec![]).unwrap();
        drop(store);
        assert_eq!(BlobStore::open(directory.path()).unwrap().1.registrations, registrations);
    }
}

#[test]
fn a_list_of_a_newer_broker_and_one_that_cannot_be_read_are_left_alone() {
    let directory = directory();
    let path = directory.path().join("registrations.json");
    drop(BlobStore::open(directory.path()).unwrap());
    let newer = "{\"version\":2,\"models\":{\"xl\":\"in another form\"}}";
    fs::write(&path, newer).unwrap();
    let error = BlobStore::open(directory.path()).unwrap_err();
    assert!(matches!(error, StoreError::Newer { version: 2, .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), newer.as_bytes());

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = BlobStore::open(directory.path()).unwrap_err();
    assert!(matches!(error, StoreError::Io(_)), "{error}");
    assert!(path.is_dir());
}

#[test]
fn many_unmatched_keys_are_counted() {
    let keys: Vec<String> = (0..1000).map(|n| format!("{n:0>512}")).collect();
    let listed = listed_of(&keys);
    assert_eq!(listed.len(), 513);
    assert_eq!(listed.last().unwrap(), "… and 488 more");
    assert_eq!(listed_of(&keys[..3]), keys[..3]);
}

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn upload(store: &mut BlobStore, name: &str, file: &[u8]) -> Result<BlobOutcome, OpError> {
    begin(store, name, file);
    commit(store, name, UploadFormat::Lora, None)
}

fn begin(store: &mut BlobStore, name: &str, file: &[u8]) {
    begin_part(store, name, None);
    append(store, name, file);
}

/// Begins an upload; returns the bytes that are there already.
fn begin_part(store: &mut BlobStore, name: &str, part: Option<PartName>) -> u64 {
    let size = part.map_or(0, |part| part.size);
    let begin = BlobOp::Begin { upload: name.parse().unwrap(), size, part };
    let outcome = store.execute(begin, &mut Vec::new()).unwrap();
    let BlobOutcome::Begun { received } = outcome else { panic!("{outcome:?}") };
    received
}

fn append(store: &mut BlobStore, name: &str, bytes: &[u8]) {
    let upload: UploadId = name.parse().unwrap();
    for chunk in bytes.chunks(100_000) {
        let bytes = Bytes::copy_from_slice(chunk);
        store.execute(BlobOp::Append { upload: upload.clone(), bytes }, &mut Vec::new()).unwrap();
    }
}

fn commit(
    store: &mut BlobStore,
    name: &str,
    format: UploadFormat,
    digest: Option<BlobDigest>,
) -> Result<BlobOutcome, OpError> {
    let label = Some("anime".to_owned());
    let op = BlobOp::Commit { upload: name.parse().unwrap(), format, digest, label };
    store.execute(op, &mut Vec::new())
}

fn read(store: &mut BlobStore, adapter: AdapterId) -> Result<Vec<u8>, OpError> {
    read_blob(store, BlobName::Adapter(adapter))
}

fn read_blob(store: &mut BlobStore, blob: BlobName) -> Result<Vec<u8>, OpError> {
    let mut all = Vec::new();
    loop {
        let op = BlobOp::Read { blob, offset: all.len() as u64, length: 100 };
        match store.execute(op, &mut Vec::new())? {
            BlobOutcome::Read { bytes, .. } if bytes.is_empty() => return Ok(all),
            BlobOutcome::Read { bytes, .. } => all.extend_from_slice(&bytes),
            other @ (BlobOutcome::Done
            | BlobOutcome::Begun { .. }
            | BlobOutcome::Committed { .. }
            | BlobOutcome::CommittedModelFile(_)) => panic!("{other:?}"),
        }
    }
}

/// A model of one path and one uploaded file.
fn registration(name: &str) -> Registration {
    let files = vec![
        ModelFile::Path(format!("/models/{name}.safetensors")),
        ModelFile::Blob(BlobDigest::of(name.as_bytes())),
    ];
    let spec = ModelSpec { name: name.parse().unwrap(), family: Family::Sdxl, files };
    Registration { spec, digest: ModelDigest::of(name.as_bytes()) }
}

/// A kohya LoRA of rank 1 on one weight of `clip_l`, with a tensor of the image model.
fn lora() -> Vec<u8> {
    let prefix = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
    let tensors = [
        (format!("{prefix}.lora_down.weight"), vec![1, 768]),
        (format!("{prefix}.lora_up.weight"), vec![768, 1]),
        ("lora_unet_mid_block_x.lora_up.weight".to_owned(), vec![1, 1]),
    ];
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape) in tensors {
        let start = data.len();
        let elements: usize = shape.iter().product();
        data.extend((0..elements * Dtype::Float16.bytes()).map(|_| 0));
        let entry = serde_json::json!({"dtype": "F16", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name, entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}
