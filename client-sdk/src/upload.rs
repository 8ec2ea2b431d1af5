//! Uploads: a LoRA file becomes canonical bytes here, and only bytes the farm lacks are sent.
//!
//! An upload belongs to a connection. When the connection is lost, its steps are sent again and
//! the farm answers that it knows no such upload; then the upload starts over.

use std::{collections::VecDeque, path::Path};

use adapter::PatchSet;
use bytes::Bytes;
use protocol::{
    AdapterId, BlobDigest, ErrorCode, UploadId, limits,
    reply::{KeyReport, UploadLoraReply},
    request::{UploadFormat, UploadLora, UploadOp},
};
use tokio::sync::oneshot;

use crate::{
    client::Client,
    error::{Error, ErrorKind},
    file_source::FileSource,
};

/// Chunks on their way at once.
const WINDOW: usize = 4;

/// How often an upload is opened before it is given up.
const ATTEMPTS_MAX: u32 = 3;

/// How far an upload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that the farm has.
    pub sent_bytes: u64,
    /// Bytes of the canonical form.
    pub total_bytes: u64,
}

/// An adapter that the farm now holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// What to name in [`EncodeRequest::lora`](crate::EncodeRequest::lora).
    pub adapter: AdapterId,
    /// What the file's keys were taken for.
    pub report: KeyReport,
    /// Bytes that were sent; 0 when the farm held the adapter already.
    pub sent_bytes: u64,
}

/// A LoRA file in canonical form.
struct Canonical {
    adapter: AdapterId,
    bytes: Bytes,
    report: KeyReport,
}

/// An attempt to send that failed.
enum Failed {
    /// The farm does not know the upload (any more): begin again.
    Lost(Error),
    /// Beginning again would not help.
    Finally(Error),
}

pub(crate) async fn file(
    client: &Client,
    path: &Path,
    progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let label = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let path = path.to_owned();
    let canonical = on_a_thread(move || {
        let cannot = |error: std::io::Error| {
            let message = format!("cannot read `{}`: {error}", path.display());
            Error::new(ErrorKind::Io, message).caused_by(error)
        };
        let source = FileSource::open(&path).map_err(cannot)?;
        let read = adapter::read_lora(&source);
        read.map(canonical).map_err(|error| Error::from(error).about(&path.display()))
    });
    send(client, canonical.await?, &label.unwrap_or_default(), progress).await
}

pub(crate) async fn bytes(
    client: &Client,
    file: Bytes,
    label: &str,
    progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let canonical = on_a_thread(move || Ok(canonical(adapter::read_lora(&*file)?)));
    send(client, canonical.await?, label, progress).await
}

fn canonical((patches, report): (PatchSet, adapter::KeyReport)) -> Canonical {
    let bytes = Bytes::from(patches.to_bytes());
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let report = KeyReport {
        targets: count(report.targets.len()),
        unmatched: report.unmatched,
        ignored: count(report.ignored_keys),
    };
    Canonical { adapter: AdapterId::of(&bytes), bytes, report }
}

/// Runs `work` on a thread of its own, so that no runtime waits for the CPU or the disk.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    let spawned = std::thread::Builder::new().name("luna-lora".to_owned()).spawn(move || {
        // Whoever asked may be gone.
        let _ = done.send(work());
    });
    spawned
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")))?;
    result.await.unwrap_or_else(|_| Err(Error::closed()))
}

async fn send(
    client: &Client,
    canonical: Canonical,
    label: &str,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let label = clip(label);
    let mut attempts = 1;
    let sent_bytes = loop {
        match attempt(client, &canonical, label, &mut progress).await {
            Ok(sent_bytes) => break sent_bytes,
            Err(Failed::Lost(error)) if attempts < ATTEMPTS_MAX => {
                tracing::info!(%error, adapter = %canonical.adapter, "the upload starts over");
                attempts += 1;
            }
            Err(Failed::Lost(error) | Failed::Finally(error)) => return Err(error),
        }
    };
    let Canonical { adapter, report, .. } = canonical;
    Ok(Uploaded { adapter, report, sent_bytes })
}

/// Begins, sends what is missing, commits; returns the bytes that were sent.
async fn attempt(
    client: &Client,
    canonical: &Canonical,
    label: Option<&str>,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<u64, Failed> {
    let size = canonical.bytes.len() as u64;
    let begin = UploadOp::Begin {
        size,
        format: UploadFormat::Canonical,
        digest: Some(BlobDigest::from_bytes(*canonical.adapter.as_bytes())),
        label: label.map(str::to_owned),
    };
    let opened: UploadLoraReply =
        client.ask(|id| UploadLora { id, op: begin }).await.map_err(Failed::Finally)?;
    if let Some(adapter) = opened.adapter {
        check_adapter(adapter, canonical.adapter)?;
        return Ok(0);
    }
    let Some(upload) = opened.upload else {
        return Err(Failed::Finally(Error::protocol("it names neither upload nor adapter")));
    };
    let chunk_bytes = limits::UPLOAD_CHUNK_BYTES_MAX.min(opened.chunk_bytes_max as usize);
    if chunk_bytes == 0 || opened.received > size {
        return Err(Failed::Finally(Error::protocol("its sizes are impossible")));
    }
    let mut open = AbortOnDrop { client, upload: Some(upload.clone()) };
    let plan = Plan { upload: &upload, first: opened.received, chunk_bytes };
    send_chunks(client, &canonical.bytes, plan, progress).await?;
    let commit = UploadOp::Commit { upload: upload.clone() };
    let done: UploadLoraReply =
        client.ask(|id| UploadLora { id, op: commit }).await.map_err(lost)?;
    open.upload = None;
    let Some(adapter) = done.adapter else {
        return Err(Failed::Finally(Error::protocol("the commit names no adapter")));
    };
    check_adapter(adapter, canonical.adapter)?;
    Ok(size - opened.received)
}

/// Where the bytes of one upload go.
struct Plan<'a> {
    upload: &'a UploadId,
    /// The first byte that the farm lacks.
    first: u64,
    chunk_bytes: usize,
}

async fn send_chunks(
    client: &Client,
    bytes: &Bytes,
    plan: Plan<'_>,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<(), Failed> {
    let total_bytes = bytes.len() as u64;
    let mut offset = usize::try_from(plan.first).expect("at most the length of the bytes");
    let mut window = VecDeque::with_capacity(WINDOW);
    loop {
        while window.len() < WINDOW && offset < bytes.len() {
            let end = bytes.len().min(offset + plan.chunk_bytes);
            let op = UploadOp::Chunk { upload: plan.upload.clone(), offset: offset as u64 };
            let chunk = vec![bytes.slice(offset..end)];
            let call = client.start_plain(|id| UploadLora { id, op }, chunk);
            window.push_back((end as u64, call.map_err(Failed::Finally)?));
            offset = end;
        }
        let Some((end, call)) = window.pop_front() else { return Ok(()) };
        let (reply, _) = call.reply::<UploadLoraReply>().await.map_err(lost)?;
        if reply.received < end {
            let what = format!("{} bytes were received instead of {end}", reply.received);
            return Err(Failed::Finally(Error::protocol(what)));
        }
        progress(Progress { sent_bytes: end, total_bytes });
    }
}

/// Drops the upload at the farm, too, when its future is dropped or fails.
struct AbortOnDrop<'a> {
    client: &'a Client,
    upload: Option<UploadId>,
}

impl Drop for AbortOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            let op = UploadOp::Abort { upload };
            // Best effort: the farm drops idle uploads by itself.
            let _ = self.client.start_plain(|id| UploadLora { id, op }, Vec::new());
        }
    }
}

fn check_adapter(found: AdapterId, expected: AdapterId) -> Result<(), Failed> {
    if found == expected {
        return Ok(());
    }
    let what = format!("the adapter is `{found}` there and `{expected}` here");
    Err(Failed::Finally(Error::protocol(what)))
}

fn lost(error: Error) -> Failed {
    if error.kind() == ErrorKind::Farm(ErrorCode::InvalidRequest) {
        Failed::Lost(error)
    } else {
        Failed::Finally(error)
    }
}

/// Cuts a label to what the wire takes; nothing for an empty one.
fn clip(label: &str) -> Option<&str> {
    let end = label.floor_char_boundary(limits::LABEL_BYTES_MAX);
    Some(&label[..end]).filter(|label| !label.is_empty())
}
