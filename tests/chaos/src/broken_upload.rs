//! Uploads that do not end as they should: nothing of them may ever be accepted.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use protocol::{
    BlobDigest, Envelope, UploadId,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadLora, UploadOp},
};
use tokio::time::sleep;

use crate::{plan::Breakage, raw::Raw};

/// Breaks an upload. The file is changed at its end in a way of its own for every `number`, so
/// that the farm does not hold it.
///
/// # Errors
/// A sentence, when the farm accepted it.
pub(crate) async fn run(
    endpoint: String,
    file: &Path,
    number: u64,
    breakage: Breakage,
) -> Result<(), String> {
    let Some(mut raw) = Raw::connect(&endpoint).await else { return Ok(()) };
    let file = std::fs::read(file).expect("the LoRA file was written before");
    let accepted = attempt(&mut raw, &unlike(file, number), breakage).await;
    raw.close().await;
    match accepted {
        Some(reply) => Err(format!("an upload with {breakage:?} was accepted: {reply:?}")),
        None => Ok(()),
    }
}

/// What the farm accepted, if it did.
async fn attempt(raw: &mut Raw, file: &[u8], breakage: Breakage) -> Option<UploadLoraReply> {
    let digest = Some(BlobDigest::of(file));
    let begin = UploadOp::Begin {
        size: file.len() as u64,
        format: UploadFormat::Lora,
        digest,
        label: Some("broken".to_owned()),
    };
    let upload = step(raw, begin, Vec::new()).await?.upload?;
    let half = file.len() / 2;
    let (first, second) = (Bytes::copy_from_slice(&file[..half]), file[half..].to_vec());
    chunk(raw, &upload, 0, first).await?;
    match breakage {
        Breakage::Vanish => return None,
        Breakage::Silence => {
            sleep(SILENCE).await;
            return None;
        }
        Breakage::CommitEarly => {}
        Breakage::FlippedBit => {
            let mut flipped = second;
            flipped[0] ^= 1;
            chunk(raw, &upload, half as u64, flipped.into()).await?;
        }
    }
    step(raw, UploadOp::Commit { upload }, Vec::new()).await
}

async fn chunk(raw: &mut Raw, upload: &UploadId, offset: u64, bytes: Bytes) -> Option<()> {
    step(raw, UploadOp::Chunk { upload: upload.clone(), offset }, vec![bytes]).await.map(drop)
}

/// The reply to a step; nothing when it is an error, or when the connection was lost.
async fn step(raw: &mut Raw, op: UploadOp, attachments: Vec<Bytes>) -> Option<UploadLoraReply> {
    let envelope = raw.ask(&UploadLora { id: Raw::id(), op }, attachments).await?;
    read(&envelope)
}

fn read(envelope: &Envelope) -> Option<UploadLoraReply> {
    if envelope.is::<UploadLoraReply>() { envelope.read().ok() } else { None }
}

/// The same file with some bytes of the last tensor replaced.
fn unlike(mut file: Vec<u8>, number: u64) -> Vec<u8> {
    let end = file.len();
    file[end - 8..].copy_from_slice(&number.to_le_bytes());
    file
}

const SILENCE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_broken_file_is_another_one() {
        let file = vec![0; 32];
        assert_ne!(unlike(file.clone(), 1), unlike(file.clone(), 2));
        assert_eq!(unlike(file.clone(), 1).len(), file.len());
    }
}
