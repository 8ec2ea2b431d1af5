//! Uploads under way: what was announced, how much of it came, who may go on and how far ahead.
//!
//! An upload belongs to the client that began it. When it breaks off and its digest was announced,
//! the store keeps what came, and the next client that begins the same file goes on from there.
//!
//! ```text
//!              begun       ┌──── chunk ────┐
//! begin ──▶ Opening ──▶ Open ◀─────────────┘ ── commit ──▶ Committing ──▶ gone: held, or refused
//!              │           └── aborted, store failed ──▶ gone
//!              └───────────┴── client left, idle ──▶ kept, or gone without a digest
//! ```
//!
//! **Invariant.** No two uploads of one announced file are open at a time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use protocol::{BlobDigest, UploadId, limits, request::UploadFormat};

use crate::{blob::PartName, kept_parts::KeptParts, peer::ClientPeer};

/// Bytes that one client may send ahead of what the store has written, when it is alone.
const CREDIT_BYTES_MAX: u64 = 4 << 20;

/// Bytes that every open upload may send ahead in any case: without them it would stand still.
const CREDIT_BYTES_MIN: u64 = limits::UPLOAD_CHUNK_BYTES_MAX as u64;

/// One upload.
#[derive(Debug)]
pub(crate) struct Upload {
    /// Who may go on; nobody once that client has left.
    pub(crate) client: Option<ClientPeer>,
    pub(crate) size: u64,
    pub(crate) format: UploadFormat,
    pub(crate) digest: Option<BlobDigest>,
    pub(crate) label: Option<String>,
    /// Bytes that came and were handed to the store.
    pub(crate) received: u64,
    /// The client may send bytes up to here.
    pub(crate) granted: u64,
    pub(crate) state: UploadState,
    pub(crate) touched: Instant,
}

/// What the store is doing for an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UploadState {
    /// It opens the file.
    Opening,
    /// It takes chunks.
    Open,
    /// It verifies everything.
    Committing,
}

/// Uploads by id, and the parts of those that broke off.
#[derive(Debug)]
pub(crate) struct Uploads {
    open: BTreeMap<UploadId, Upload>,
    pub(crate) kept: KeptParts,
    seed: u64,
    begun: u64,
}

/// What became of an upload that its client no longer goes on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// Its part is worth keeping: its name and its bytes.
    Part(PartName, u64),
    /// Nobody could ever go on with it.
    Nothing,
}

/// How many uploads there may be, and how many bytes those of one sort may announce together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UploadRoom {
    pub(crate) per_client: usize,
    pub(crate) total: usize,
    pub(crate) bytes: u64,
}

/// Why an upload cannot begin now.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    #[error("this client has {0} uploads open, which is the limit: commit or abort one first")]
    Client(usize),
    #[error("the farm has {0} uploads open, which is the limit")]
    Farm(usize),
    #[error("the open uploads have {0} bytes together, and there is no room for {1} more")]
    Bytes(u64, u64),
}

/// Why a step of an upload is refused. The upload stays as it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StepError {
    #[error("upload `{0}` is not open: begin a new one")]
    NotOpen(UploadId),
    #[error("upload `{0}` is being committed")]
    Committing(UploadId),
    #[error("the chunk starts at offset {offset}: expected {expected}")]
    Offset { offset: u64, expected: u64 },
    #[error("the chunk ends at byte {end}: the upload was announced with {size} bytes")]
    BeyondEnd { end: u64, size: u64 },
    #[error("the chunk ends at byte {end}: bytes up to {granted} may be on their way now")]
    BeyondCredit { end: u64, granted: u64 },
    #[error(
        "the upload is truncated: it was announced with {size} bytes and {received} bytes came"
    )]
    Truncated { size: u64, received: u64 },
}

impl Uploads {
    /// No uploads; ids are derived from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { open: BTreeMap::new(), kept: KeptParts::default(), seed, begun: 0 }
    }

    /// Whether `new` may begin.
    pub(crate) fn admit(&self, new: &Upload, room: UploadRoom) -> Result<(), NoRoom> {
        let of_client = self.open.values().filter(|upload| upload.client == new.client).count();
        if of_client >= room.per_client {
            return Err(NoRoom::Client(of_client));
        }
        if self.open.len() >= room.total {
            return Err(NoRoom::Farm(self.open.len()));
        }
        let bytes = self.announced(new.is_model_file());
        if bytes.saturating_add(new.size) > room.bytes {
            return Err(NoRoom::Bytes(bytes, new.size));
        }
        Ok(())
    }

    /// Bytes that the open uploads announced: those of models' files, or all others.
    pub(crate) fn announced(&self, model_files: bool) -> u64 {
        let open = self.open.values().filter(|upload| upload.is_model_file() == model_files);
        open.map(|upload| upload.size).sum()
    }

    /// Opens an upload.
    pub(crate) fn begin(&mut self, upload: Upload) -> UploadId {
        let number = mix(self.seed.wrapping_add(self.begun));
        self.begun += 1;
        let id: UploadId = format!("upload-{number:016x}").parse().expect("letters and digits");
        self.open.insert(id.clone(), upload);
        id
    }

    /// The open upload of this client, if it takes chunks.
    pub(crate) fn get_open(
        &mut self,
        id: &UploadId,
        client: ClientPeer,
    ) -> Result<&mut Upload, StepError> {
        match self.open.get_mut(id) {
            Some(upload) if upload.client == Some(client) => match upload.state {
                UploadState::Open => Ok(upload),
                UploadState::Committing => Err(StepError::Committing(id.clone())),
                UploadState::Opening => Err(StepError::NotOpen(id.clone())),
            },
            _ => Err(StepError::NotOpen(id.clone())),
        }
    }

    /// The upload of this file that is under way.
    pub(crate) fn of_part(&self, part: &PartName) -> Option<(&UploadId, &Upload)> {
        self.open.iter().find(|(_, upload)| upload.part() == Some(*part))
    }

    /// The store has opened the file. Returns whether somebody still wants to go on.
    pub(crate) fn opened(&mut self, id: &UploadId, received: u64, now: Instant) -> bool {
        let Some(upload) = self.open.get_mut(id) else { return false };
        upload.state = UploadState::Open;
        upload.received = received;
        upload.granted = received;
        upload.touched = now;
        upload.client.is_some()
    }

    /// Extends how far ahead an upload may send, of which `written` bytes are written: by an equal
    /// share of `bytes_max`, of which `pending` bytes are waiting to be written. Together, uploads
    /// are granted `bytes_max`, and one chunk each beyond that. Returns the bytes beyond `written`.
    pub(crate) fn grant(
        &mut self,
        id: &UploadId,
        written: u64,
        (pending, bytes_max): (u64, u64),
    ) -> u64 {
        let coming: u64 =
            self.open.values().map(|upload| upload.granted.saturating_sub(upload.received)).sum();
        let share = bytes_max / (self.open.len() as u64).max(1);
        let Some(upload) = self.open.get_mut(id) else { return 0 };
        let ahead = upload.granted.saturating_sub(written);
        // What the upload has already is no new load.
        let free = bytes_max.saturating_sub(pending.saturating_add(coming)).saturating_add(ahead);
        let credit = share.min(CREDIT_BYTES_MAX).min(free).max(CREDIT_BYTES_MIN);
        upload.granted = upload.granted.max(written.saturating_add(credit).min(upload.size));
        upload.granted - written.min(upload.granted)
    }

    pub(crate) fn remove(&mut self, id: &UploadId) -> Option<Upload> {
        self.open.remove(id)
    }

    /// Takes out the uploads of a client that left. Those that the store is opening follow once it
    /// has, and those that are being committed have nothing more to wait for.
    pub(crate) fn remove_client(&mut self, client: ClientPeer) -> Vec<(UploadId, Left)> {
        for upload in self.open.values_mut().filter(|upload| upload.client == Some(client)) {
            if upload.state == UploadState::Opening {
                upload.client = None;
            }
        }
        self.remove_where(|upload| upload.client == Some(client))
    }

    /// Takes out the uploads that nobody went on with for `idle`.
    pub(crate) fn remove_idle(&mut self, idle: Duration, now: Instant) -> Vec<(UploadId, Left)> {
        self.remove_where(|upload| upload.touched + idle <= now)
    }

    /// When the next upload or part is dropped unless it goes on.
    pub(crate) fn next_idle(&self, idle: Duration) -> Option<Instant> {
        let open = self.open.values().filter(|upload| upload.state == UploadState::Open);
        open.map(|upload| upload.touched + idle).chain(self.kept.next_expiry()).min()
    }

    fn remove_where(&mut self, gone: impl Fn(&Upload) -> bool) -> Vec<(UploadId, Left)> {
        let is_gone = |upload: &Upload| upload.state == UploadState::Open && gone(upload);
        let removed = self.open.extract_if(.., |_, upload| is_gone(upload));
        removed.map(|(id, upload)| (id, upload.left())).collect()
    }
}

impl Upload {
    /// Whether it is counted with the files of models.
    pub(crate) fn is_model_file(&self) -> bool {
        self.format == UploadFormat::Model
    }

    /// What its part goes by, if its digest was announced.
    pub(crate) fn part(&self) -> Option<PartName> {
        let Self { format, size, .. } = *self;
        self.digest.map(|digest| PartName { format, digest, size })
    }

    /// What is left of it when nobody goes on.
    pub(crate) fn left(&self) -> Left {
        match self.part() {
            Some(part) if self.received > 0 => Left::Part(part, self.received),
            _ => Left::Nothing,
        }
    }

    /// Takes `length` bytes at `offset`.
    pub(crate) fn take(&mut self, offset: u64, length: u64, now: Instant) -> Result<(), StepError> {
        if offset != self.received {
            return Err(StepError::Offset { offset, expected: self.received });
        }
        let end = offset.saturating_add(length);
        if end > self.size {
            return Err(StepError::BeyondEnd { end, size: self.size });
        }
        if end > self.granted {
            return Err(StepError::BeyondCredit { end, granted: self.granted });
        }
        self.received = end;
        self.touched = now;
        Ok(())
    }

    /// Starts the commit.
    pub(crate) fn commit(&mut self) -> Result<(), StepError> {
        let Self { size, received, .. } = *self;
        if received < size {
            return Err(StepError::Truncated { size, received });
        }
        self.state = UploadState::Committing;
        Ok(())
    }
}

/// The finalizer of `SplitMix64`: spreads consecutive numbers over all 64 bits, one to one.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
