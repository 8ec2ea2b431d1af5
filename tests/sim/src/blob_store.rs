//! The broker's blob store: a disk that is slow, full, and keeps what was committed when the
//! process dies.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use broker_core::{
    BlobCommand, BlobEvent, BlobName, BlobOp, BlobOutcome, KeptPart, PartName, StoredBlob,
};
use bytes::Bytes;
use protocol::{AdapterId, BlobDigest, ErrorCode, Failure, UploadId, reply::KeyReport};

use crate::{
    catalog::Content,
    env::Env,
    event::{Inside, Node},
    time::Span,
};

/// Of an upload that a crash ends, a multiple of so many bytes is found again.
const RECORD_BYTES: usize = 64 << 10;

/// What is on the disk, and what the process has open.
#[derive(Debug, Default)]
pub(crate) struct BlobStore {
    blobs: BTreeMap<AdapterId, (Bytes, Option<String>)>,
    uploads: BTreeMap<UploadId, (Option<PartName>, Vec<u8>)>,
    /// Parts of files whose uploads broke off.
    kept: BTreeMap<PartName, Vec<u8>>,
    /// Commands are done one after the other; the first is being done.
    waiting: VecDeque<BlobCommand>,
    in_trouble: bool,
}

impl BlobStore {
    /// A store that holds these adapters.
    pub(crate) fn holding(adapters: &[Content]) -> Self {
        let blobs = adapters.iter().map(|content| (content.id, (content.bytes.clone(), None)));
        Self { blobs: blobs.collect(), ..Self::default() }
    }

    /// The process died: commands that were not done are gone, and of open uploads some of the end.
    pub(crate) fn crash(&mut self) {
        for (_, (part, mut bytes)) in std::mem::take(&mut self.uploads) {
            let Some(part) = part else { continue };
            bytes.truncate(bytes.len() / RECORD_BYTES * RECORD_BYTES);
            if !bytes.is_empty() {
                self.kept.insert(part, bytes);
            }
        }
        self.waiting.clear();
        self.in_trouble = false;
    }

    /// What a broker finds on start.
    pub(crate) fn found(&self) -> Vec<BlobEvent> {
        let blobs = self.blobs.keys().filter_map(|adapter| self.stored(adapter));
        let parts = self.kept.iter().map(|(&part, bytes)| {
            let (bytes, idle) = (bytes.len() as u64, Duration::ZERO);
            BlobEvent::FoundPart(KeptPart { part, bytes, idle })
        });
        blobs.map(BlobEvent::Found).chain(parts).collect()
    }

    /// Whether an adapter is on the disk.
    pub(crate) fn holds(&self, adapter: &AdapterId) -> bool {
        self.blobs.contains_key(adapter)
    }

    /// Takes a command; it is done when its event comes.
    pub(crate) fn take(&mut self, command: BlobCommand, life: u32, env: &mut Env) {
        self.waiting.push_back(command);
        if self.waiting.len() == 1 {
            begin(life, env);
        }
    }

    /// Does the command whose time has come, says what the core is told, and begins the next.
    pub(crate) fn done(&mut self, life: u32, env: &mut Env) -> Vec<BlobEvent> {
        let Some(command) = self.waiting.pop_front() else { return Vec::new() };
        if !self.waiting.is_empty() {
            begin(life, env);
        }
        self.execute(command, env.disk.is_full)
    }

    fn execute(&mut self, command: BlobCommand, is_full: bool) -> Vec<BlobEvent> {
        let BlobCommand { ticket, op } = command;
        let uses_disk =
            matches!(op, BlobOp::Append { .. } | BlobOp::Commit { .. } | BlobOp::Read { .. });
        let fills = matches!(op, BlobOp::Append { .. } | BlobOp::Commit { .. });
        let mut events = Vec::new();
        let result = if fills && is_full { Err(self.no_room(&op)) } else { self.outcome(op) };
        let trouble = (fills && is_full).then(|| "no space left on device".to_owned());
        if trouble.is_some() || self.in_trouble && uses_disk && result.is_ok() {
            self.in_trouble = trouble.is_some();
            events.push(BlobEvent::Health { trouble });
        }
        events.push(BlobEvent::Done { ticket, result });
        events
    }

    /// An upload that cannot be written is gone, and its room free.
    fn no_room(&mut self, op: &BlobOp) -> Failure {
        if let BlobOp::Append { upload, .. } | BlobOp::Commit { upload, .. } = op {
            self.uploads.remove(upload);
        }
        full()
    }

    fn outcome(&mut self, op: BlobOp) -> Result<BlobOutcome, Failure> {
        match op {
            BlobOp::Begin { upload, part, .. } => {
                let bytes = part.and_then(|part| self.kept.remove(&part)).unwrap_or_default();
                let received = bytes.len() as u64;
                self.uploads.insert(upload, (part, bytes));
                return Ok(BlobOutcome::Begun { received });
            }
            BlobOp::Append { upload, bytes } => {
                let file = self.uploads.get_mut(&upload).ok_or_else(|| not_open(&upload))?;
                file.1.extend_from_slice(&bytes);
            }
            BlobOp::Commit { upload, digest, label, .. } => {
                let file = self.uploads.remove(&upload).ok_or_else(|| not_open(&upload))?;
                return self.commit(file.1.into(), digest, label);
            }
            BlobOp::Abort { upload } => {
                self.uploads.remove(&upload);
            }
            BlobOp::Keep { upload } => {
                let file = self.uploads.remove(&upload).ok_or_else(|| not_open(&upload))?;
                if let (Some(part), bytes) = file {
                    self.kept.insert(part, bytes);
                }
            }
            BlobOp::DropParts { parts } => {
                for part in parts {
                    self.kept.remove(&part);
                }
            }
            BlobOp::Read { blob, offset, length } => return self.read(blob, offset, length),
            BlobOp::Delete { blobs } => {
                for blob in blobs {
                    self.blobs.remove(&blob.digest().into());
                }
            }
            // No models are registered here.
            BlobOp::Remember { .. } => {}
        }
        Ok(BlobOutcome::Done)
    }

    fn commit(
        &mut self,
        bytes: Bytes,
        digest: Option<BlobDigest>,
        label: Option<String>,
    ) -> Result<BlobOutcome, Failure> {
        let adapter = AdapterId::of(&bytes);
        if digest.is_some_and(|digest| AdapterId::from(digest) != adapter) {
            let message = "the file's digest is not the announced one";
            return Err(Failure::new(ErrorCode::LoraRejected, message));
        }
        self.blobs.insert(adapter, (bytes, label));
        let blob = self.stored(&adapter).expect("it was just inserted");
        Ok(BlobOutcome::Committed { blob, report: KeyReport::default() })
    }

    fn read(&self, blob: BlobName, offset: u64, length: u32) -> Result<BlobOutcome, Failure> {
        let Some((bytes, _)) = self.blobs.get(&blob.digest().into()) else {
            let message = format!("the blob store does not hold {blob}");
            return Err(Failure::new(ErrorCode::UnknownLora, message));
        };
        let size = bytes.len() as u64;
        let first = usize::try_from(offset.min(size)).expect("a length in memory");
        let last = bytes.len().min(first + length as usize);
        Ok(BlobOutcome::Read { size, bytes: bytes.slice(first..last) })
    }

    fn stored(&self, adapter: &AdapterId) -> Option<StoredBlob> {
        let (bytes, label) = self.blobs.get(adapter)?;
        let (bytes, label) = (bytes.len() as u64, label.clone());
        Some(StoredBlob { adapter: *adapter, bytes, label, raw: Vec::new() })
    }
}

/// The next command takes as long as the disk is slow now.
fn begin(life: u32, env: &mut Env) {
    let (first, last) = if env.disk.is_slow {
        (Span::from_millis(20), Span::from_millis(400))
    } else {
        (Span::from_micros(30), Span::from_micros(500))
    };
    let time = env.random.log_span(first, last);
    env.later(time, (Node::Broker, life), Inside::Stored);
}

fn not_open(upload: &UploadId) -> Failure {
    let message = format!("upload `{upload}` is not open: begin a new one");
    Failure::new(ErrorCode::InvalidRequest, message)
}

fn full() -> Failure {
    let retry_after_ms = Some(1000);
    Failure { retry_after_ms, ..Failure::new(ErrorCode::StoreFull, "no space left on device") }
}
