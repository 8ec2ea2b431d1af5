//! Uploads: bytes that the farm lacks are sent in chunks, as far ahead as the farm grants.
//!
//! They have a connection of their own, so that encodes never wait behind chunks. An upload belongs
//! to that connection. When it is lost, its steps are sent again and the farm answers that it knows
//! no such upload; then the upload is begun anew and goes on where the farm says that it ended. So
//! it does when an earlier upload of the same file broke off for good, whoever began it.
//! What the bytes are is for [`crate::lora`] and [`crate::model`] to say.

use std::{collections::VecDeque, time::Duration, time::Instant};

use bytes::Bytes;
use protocol::{
    BlobDigest, ErrorCode, UploadId, limits,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadLora, UploadOp},
};
use tokio::sync::oneshot;

use crate::{
    call::Call,
    client::Client,
    content::{Chunks, Content},
    error::{Error, ErrorKind},
};

/// Chunks on their way at once, whatever the farm grants; as many as that if it grants nothing.
const WINDOW: usize = 4;

/// How often an upload is opened without any progress before it is given up.
const ATTEMPTS_MAX: u32 = 10;

/// The pause before a step is sent again that the farm was too busy for, unless it says when.
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// How far an upload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that the farm has.
    pub sent_bytes: u64,
    /// Bytes of everything: of an adapter in canonical form, of a model's file as it is.
    pub total_bytes: u64,
}

/// What is to be sent.
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) content: Content,
    pub(crate) format: UploadFormat,
    /// Digest of the content.
    pub(crate) digest: BlobDigest,
    pub(crate) label: String,
}

/// What all attempts together have sent.
#[derive(Debug, Default)]
struct Sent {
    bytes: u64,
    /// The end of the last byte that the farm ever had.
    furthest: u64,
}

/// An attempt to send that failed.
enum Failed {
    /// The farm does not know the upload (any more): begin again.
    Lost(Error),
    /// Beginning again would not help.
    Finally(Error),
}

/// Makes the farm hold what is in the parcel. Returns the bytes that were sent.
pub(crate) async fn send(
    client: &Client,
    parcel: &Parcel,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<u64, Error> {
    let client = &client.for_uploads()?;
    let (mut sent, mut attempts) = (Sent::default(), 1);
    loop {
        let before = sent.furthest;
        match attempt(client, parcel, &mut sent, progress).await {
            Ok(()) => return Ok(sent.bytes),
            Err(Failed::Lost(error)) if sent.furthest > before || attempts < ATTEMPTS_MAX => {
                tracing::info!(%error, digest = %parcel.digest, "the upload is begun anew");
                attempts = if sent.furthest > before { 1 } else { attempts + 1 };
            }
            Err(Failed::Lost(error) | Failed::Finally(error)) => return Err(error),
        }
    }
}

/// Runs `work` on a thread of its own, so that no runtime waits for the CPU or the disk.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    let spawned = std::thread::Builder::new().name("luna-file".to_owned()).spawn(move || {
        // Whoever asked may be gone.
        let _ = done.send(work());
    });
    spawned
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a thread: {error}")))?;
    result.await.unwrap_or_else(|_| Err(Error::closed()))
}

/// Begins, sends what is missing, commits; adds up the bytes that were sent.
async fn attempt(
    client: &Client,
    parcel: &Parcel,
    sent: &mut Sent,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<(), Failed> {
    let size = parcel.content.len();
    let opened = begin(client, parcel).await?;
    if let Some(held) = held(&opened) {
        parcel.check(held)?;
        return Ok(());
    }
    let Some(upload) = opened.upload.clone() else {
        return Err(Failed::Finally(Error::protocol("it names neither upload nor content")));
    };
    let chunk_bytes = limits::UPLOAD_CHUNK_BYTES_MAX.min(opened.chunk_bytes_max as usize);
    if chunk_bytes == 0 || opened.received > size {
        return Err(Failed::Finally(Error::protocol("its sizes are impossible")));
    }
    let mut open = LeaveOnDrop { client, upload: Some(upload.clone()) };
    let chunks = parcel.content.chunks(opened.received, chunk_bytes).map_err(Failed::Finally)?;
    let mut sending = Sending {
        client,
        upload: &upload,
        chunks,
        total: size,
        granted: granted(&opened),
        ahead: VecDeque::new(),
        sent,
    };
    sending.run(progress).await?;
    let commit = UploadOp::Commit { upload: upload.clone() };
    let done: UploadLoraReply =
        client.ask(|id| UploadLora { id, op: commit }).await.map_err(lost)?;
    open.upload = None;
    let Some(held) = held(&done) else {
        return Err(Failed::Finally(Error::protocol("the commit names no content")));
    };
    parcel.check(held)
}

/// Opens the upload, or learns that nothing needs to be sent. While another client sends the same
/// file, it waits for as long as that goes on.
async fn begin(client: &Client, parcel: &Parcel) -> Result<UploadLoraReply, Failed> {
    let mut patience = Patience::new(client.timeout());
    let mut sent_by_another = None;
    loop {
        let op = UploadOp::Begin {
            size: parcel.content.len(),
            format: parcel.format,
            digest: Some(parcel.digest),
            label: clip(&parcel.label).map(str::to_owned),
        };
        let asked: Result<UploadLoraReply, Error> = client.ask(|id| UploadLora { id, op }).await;
        match asked {
            Ok(UploadLoraReply { upload: None, wait_ms: Some(wait_ms), received, .. }) => {
                if sent_by_another.replace(received) != Some(received) {
                    patience = Patience::new(client.timeout());
                }
                patience.wait_for_another(client, wait_ms).await.map_err(Failed::Finally)?;
            }
            Ok(reply) => return Ok(reply),
            Err(error) => patience.wait(client, error).await.map_err(Failed::Finally)?,
        }
    }
}

/// The chunks of one upload.
struct Sending<'a> {
    client: &'a Client,
    upload: &'a UploadId,
    chunks: Chunks,
    total: u64,
    /// Bytes up to here may be on their way.
    granted: u64,
    /// Chunks to send before the next of `chunks`: they were refused for the moment, or are more
    /// than is granted.
    ahead: VecDeque<(u64, Bytes)>,
    sent: &'a mut Sent,
}

/// A chunk on its way, kept until the farm has it.
struct Flying {
    offset: u64,
    bytes: Bytes,
    call: Call,
}

impl Sending<'_> {
    async fn run(&mut self, progress: &mut (impl FnMut(Progress) + Send)) -> Result<(), Failed> {
        let mut patience = Patience::new(self.client.timeout());
        let mut window: VecDeque<Flying> = VecDeque::with_capacity(WINDOW);
        loop {
            while window.len() < WINDOW {
                let Some((offset, bytes)) = self.next().await? else { break };
                // What is on its way brings the next grant; without anything nothing would.
                if !window.is_empty() && offset + bytes.len() as u64 > self.granted {
                    self.ahead.push_front((offset, bytes));
                    break;
                }
                let op = UploadOp::Chunk { upload: self.upload.clone(), offset };
                let call = self.client.start_plain(|id| UploadLora { id, op }, vec![bytes.clone()]);
                window.push_back(Flying { offset, bytes, call: call.map_err(Failed::Finally)? });
            }
            let Some(Flying { offset, bytes, call }) = window.pop_front() else { return Ok(()) };
            let end = offset + bytes.len() as u64;
            match call.reply::<UploadLoraReply>().await {
                Ok((reply, _)) if reply.received < end => {
                    let what = format!("{} bytes were received instead of {end}", reply.received);
                    return Err(Failed::Finally(Error::protocol(what)));
                }
                Ok((reply, _)) => {
                    patience = Patience::new(self.client.timeout());
                    self.granted = self.granted.max(granted(&reply));
                    self.sent.bytes += bytes.len() as u64;
                    self.sent.furthest = self.sent.furthest.max(end);
                    progress(Progress { sent_bytes: end, total_bytes: self.total });
                }
                Err(error) => {
                    patience.check(error).map_err(lost)?;
                    // The farm refuses what follows a chunk that it did not take: all go again.
                    self.ahead.push_back((offset, bytes));
                    for Flying { offset, bytes, call } in window.drain(..) {
                        drop(call.outcome().await);
                        self.ahead.push_back((offset, bytes));
                    }
                    patience.pause(self.client).await.map_err(Failed::Finally)?;
                }
            }
        }
    }

    async fn next(&mut self) -> Result<Option<(u64, Bytes)>, Failed> {
        match self.ahead.pop_front() {
            Some(chunk) => Ok(Some(chunk)),
            None => self.chunks.next().await.map_err(Failed::Finally),
        }
    }
}

/// How long a step is sent again that the farm is too busy for.
struct Patience {
    end: Instant,
    pause: Duration,
}

impl Patience {
    fn new(timeout: Duration) -> Self {
        Self { end: Instant::now() + timeout, pause: BUSY_PAUSE }
    }

    /// Takes note of a failure that may pass before the patience ends; gives back any other.
    fn check(&mut self, error: Error) -> Result<(), Error> {
        let pause = error.retry_after().unwrap_or(BUSY_PAUSE);
        let is_busy = error.kind() == ErrorKind::Farm(ErrorCode::Overloaded);
        if !is_busy || Instant::now() + pause >= self.end {
            return Err(error);
        }
        self.pause = pause;
        Ok(())
    }

    async fn pause(&self, client: &Client) -> Result<(), Error> {
        client.pause(self.pause).await
    }

    /// Waits until another client may have sent more.
    async fn wait_for_another(&mut self, client: &Client, wait_ms: u32) -> Result<(), Error> {
        let pause = Duration::from_millis(wait_ms.into());
        if Instant::now() + pause >= self.end {
            let message = "another client began to send the same file and does not go on";
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        client.pause(pause).await
    }

    async fn wait(&mut self, client: &Client, error: Error) -> Result<(), Error> {
        self.check(error)?;
        self.pause(client).await
    }
}

/// Leaves the upload at the farm when its future is dropped or fails, to be gone on with.
struct LeaveOnDrop<'a> {
    client: &'a Client,
    upload: Option<UploadId>,
}

impl Drop for LeaveOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            let op = UploadOp::Abort { upload, keep: true };
            // Best effort: the farm closes idle uploads by itself.
            let _ = self.client.start_plain(|id| UploadLora { id, op }, Vec::new());
        }
    }
}

impl Parcel {
    fn check(&self, held: BlobDigest) -> Result<(), Failed> {
        if held == self.digest {
            return Ok(());
        }
        let what = format!("the content is `{held}` there and `{}` here", self.digest);
        Err(Failed::Finally(Error::protocol(what)))
    }
}

/// What the farm holds after a step.
fn held(reply: &UploadLoraReply) -> Option<BlobDigest> {
    reply.adapter.map(BlobDigest::from).or(reply.blob)
}

/// Up to where bytes may be on their way.
fn granted(reply: &UploadLoraReply) -> u64 {
    reply.received.saturating_add(reply.credit_bytes.unwrap_or(u64::MAX))
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
