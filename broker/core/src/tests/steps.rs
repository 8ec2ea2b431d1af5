//! Steps of uploads, for the tests of uploads.

use bytes::Bytes;
use protocol::{
    BlobDigest, UploadId, frames,
    request::{UploadFormat, UploadLora, UploadOp},
};

use crate::testing::TestBroker;

/// `client` begins an upload whose digest it does not announce; the store opens it.
pub(super) fn begin(farm: &mut TestBroker, client: &str, size: u64) -> UploadId {
    let op = UploadOp::Begin { size, format: UploadFormat::Lora, digest: None, label: None };
    step(farm, client, "begin", op);
    farm.store_works();
    farm.last_upload()
}

/// `client` announces the file `anime`.
pub(super) fn announce(farm: &mut TestBroker, client: &str, size: u64) {
    let digest = Some(BlobDigest::of(b"anime"));
    let op = UploadOp::Begin { size, format: UploadFormat::Lora, digest, label: None };
    step(farm, client, "begin", op);
}

pub(super) fn chunk(
    farm: &mut TestBroker,
    client: &str,
    upload: &UploadId,
    offset: u64,
    bytes: &[u8],
) {
    let op = UploadOp::Chunk { upload: upload.clone(), offset };
    let header = UploadLora { id: format!("chunk-{offset}").parse().unwrap(), op };
    farm.client_sends(client, frames::frames(&header, vec![Bytes::copy_from_slice(bytes)]));
}

pub(super) fn step(farm: &mut TestBroker, client: &str, request: &str, op: UploadOp) {
    farm.client_says(client, &UploadLora { id: request.parse().unwrap(), op });
}
