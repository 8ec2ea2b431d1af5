//! Files of models: uploaded, fetched, and kept within a budget of their own.

use bytes::Bytes;
use protocol::{
    BlobDigest, ErrorCode, ErrorReply, UploadId, frames,
    reply::UploadLoraReply,
    request::{ModelFile, RegisterModel, UploadFormat, UploadLora, UploadOp},
    worker::Fetch,
};

use crate::{
    BlobEvent, BlobName, Limits, ModelSpec, Registration,
    testing::{TestBroker, model, model_file},
};

#[test]
fn a_models_file_is_uploaded_once_and_fetched_by_its_digest() {
    let mut farm = TestBroker::new();
    farm.ready("gpu-0", &[]);
    let blob = upload(&mut farm, 10);
    assert_eq!(blob, digest("uploaded"));
    farm.shown();

    step(&mut farm, begin(10, Some(blob)));
    let reply: UploadLoraReply = farm.last_reply();
    assert_eq!((reply.blob, reply.adapter, reply.upload), (Some(blob), None, None));
    farm.worker_says("gpu-0", &Fetch { blob, offset: 3, length: 5 });
    farm.store_works();
    farm.assert_commands(&["c1 <- upload_lora_reply u", "store <- read 3+5", "gpu-0 <- blob"]);
}

#[test]
fn a_file_larger_than_the_budget_or_the_wire_allows_is_refused() {
    let mut farm = store_of(25);
    step(&mut farm, begin(26, None));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
    let mut farm = TestBroker::new();
    step(&mut farm, begin((8 << 30) + 1, None));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
    step(&mut farm, begin(8 << 30, None));
    assert_eq!(farm.shown().last().unwrap(), "store <- begin 8589934592");
}

#[test]
fn files_that_no_model_needs_make_room_the_least_recently_used_first() {
    let mut farm = store_of(30);
    farm.ready("gpu-0", &[]);
    for name in ["a", "b", "c"] {
        farm.blob_event(BlobEvent::FoundModelFile(model_file(name)));
    }
    farm.worker_says("gpu-0", &Fetch { blob: digest("a"), offset: 0, length: 1 });
    farm.store_works();
    farm.shown();
    step(&mut farm, begin(15, None));
    farm.assert_commands(&["store <- delete 2", "store <- begin 15"]);
    assert!(farm.broker.model_files.contains(&digest("a")));
    assert_eq!(farm.broker.model_files.bytes(), 10);
}

#[test]
fn a_file_that_a_registered_model_needs_is_never_dropped() {
    let mut farm = store_of(30);
    farm.ready("gpu-0", &[]);
    let files = vec![ModelFile::Blob(digest("a"))];
    let spec = ModelSpec { name: "xl".parse().unwrap(), family: protocol::Family::Sd15, files };
    let registration = Registration { spec, digest: model("xl").digest };
    farm.blob_event(BlobEvent::FoundRegistration(registration));
    for name in ["a", "b"] {
        farm.blob_event(BlobEvent::FoundModelFile(model_file(name)));
    }
    step(&mut farm, begin(21, None));
    let error: ErrorReply = farm.last_reply();
    assert_eq!(error.code, ErrorCode::TooLarge);
    assert!(error.message.contains("--model-store-mb"), "{}", error.message);

    farm.shown();
    step(&mut farm, begin(20, None));
    farm.assert_commands(&["store <- delete 1", "store <- begin 20"]);
    farm.store_works();
    step(&mut farm, begin(1, None));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::Overloaded, "it is announced");
    assert!(farm.broker.model_files.contains(&digest("a")));
}

#[test]
fn a_file_is_needed_from_the_moment_a_model_is_being_registered() {
    let mut farm = store_of(10);
    farm.ready("gpu-0", &[]);
    let blob = upload(&mut farm, 10);
    let register = RegisterModel {
        id: "r".parse().unwrap(),
        name: "xl".parse().unwrap(),
        family: protocol::Family::Sd15,
        files: vec![ModelFile::Blob(blob)],
        budget_ms: None,
    };
    farm.client_says("c1", &register);
    assert_eq!(farm.registers["gpu-0"].files, [ModelFile::Blob(blob)]);
    step(&mut farm, begin(1, None));
    assert_eq!(farm.last_reply::<ErrorReply>().code, ErrorCode::TooLarge);
}

#[test]
fn adapters_and_files_of_models_do_not_push_each_other_out() {
    let limits = Limits { store_bytes_max: 10, model_store_bytes_max: 10, ..Limits::default() };
    let mut farm = TestBroker::starting(limits);
    farm.stored("anime");
    upload(&mut farm, 10);
    farm.stored("photo");
    farm.assert_commands(&[
        "store <- begin 10",
        "c1 <- upload_lora_reply u",
        "store <- append 10",
        "c1 <- upload_lora_reply u",
        "store <- commit",
        "c1 <- upload_lora_reply u",
        "store <- delete 1",
    ]);
    assert!(farm.broker.model_files.contains(&digest("uploaded")));
    assert_eq!(farm.broker.blobs.len(), 1);
}

#[test]
fn a_file_that_rotted_is_forgotten_and_asked_for_again() {
    let mut farm = TestBroker::new();
    let blob = upload(&mut farm, 10);
    let reason = "its bytes have another digest".to_owned();
    farm.blob_event(BlobEvent::Removed { blob: BlobName::ModelFile(blob), reason });
    farm.shown();
    step(&mut farm, begin(10, Some(blob)));
    farm.assert_commands(&["store <- begin 10"]);
}

fn store_of(model_store_bytes_max: u64) -> TestBroker {
    TestBroker::starting(Limits { model_store_bytes_max, ..Limits::default() })
}

/// Uploads a file that becomes `uploaded`.
fn upload(farm: &mut TestBroker, size: usize) -> BlobDigest {
    step(farm, begin(size as u64, None));
    farm.store_works();
    let upload: UploadId = farm.last_upload();
    let op = UploadOp::Chunk { upload: upload.clone(), offset: 0 };
    let header = UploadLora { id: "u".parse().unwrap(), op };
    farm.client_sends("c1", frames::frames(&header, vec![Bytes::from(vec![0; size])]));
    farm.store_works();
    step(farm, UploadOp::Commit { upload });
    farm.store_works();
    farm.last_reply::<UploadLoraReply>().blob.expect("the file is kept")
}

fn begin(size: u64, digest: Option<BlobDigest>) -> UploadOp {
    UploadOp::Begin { size, format: UploadFormat::Model, digest, label: None }
}

fn step(farm: &mut TestBroker, op: UploadOp) {
    farm.client_says("c1", &UploadLora { id: "u".parse().unwrap(), op });
}

fn digest(name: &str) -> BlobDigest {
    model_file(name).blob
}
