//! Random steps of uploads and their replies.

use luna_protocol::{reply, request};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{adapter, blob_digest, name, text};

pub(crate) fn upload_lora() -> impl Strategy<Value = request::UploadLora> {
    use request::{UploadFormat, UploadOp};
    let format = select(&[UploadFormat::Lora, UploadFormat::Canonical, UploadFormat::Model][..]);
    let begin = (any::<u64>(), format, option::of(blob_digest()), option::of(text()));
    let op = prop_oneof![
        begin.prop_map(|(size, format, digest, label)| UploadOp::Begin {
            size,
            format,
            digest,
            label
        }),
        (name(), any::<u64>()).prop_map(|(upload, offset)| UploadOp::Chunk { upload, offset }),
        name().prop_map(|upload| UploadOp::Commit { upload }),
        (name(), any::<bool>()).prop_map(|(upload, keep)| UploadOp::Abort { upload, keep }),
    ];
    (name(), op).prop_map(|(id, op)| request::UploadLora { id, op })
}

pub(crate) fn upload_lora_reply() -> impl Strategy<Value = reply::UploadLoraReply> {
    let report = (any::<u32>(), vec(text(), 0..3), any::<u32>())
        .prop_map(|(targets, unmatched, ignored)| reply::KeyReport { targets, unmatched, ignored });
    let parts = (
        name(),
        option::of(name()),
        (any::<u64>(), any::<u32>()),
        (option::of(any::<u64>()), option::of(any::<u32>())),
        (option::of(adapter()), option::of(blob_digest())),
        option::of(report),
    );
    parts.prop_map(
        |(id, upload, (received, chunk_bytes_max), (credit_bytes, wait_ms), held, report)| {
            let (adapter, blob) = held;
            reply::UploadLoraReply {
                id,
                upload,
                received,
                chunk_bytes_max,
                credit_bytes,
                wait_ms,
                adapter,
                blob,
                report,
            }
        },
    )
}
