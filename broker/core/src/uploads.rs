//! Uploads under way: what was announced, how much of it came, and who may go on.
//!
//! An upload belongs to the client that began it.
//!
//! ```text
//!            ┌──── chunk ────┐
//! begin ──▶ Open ◀───────────┘ ── commit ──▶ Committing ──▶ gone: an adapter, or refused
//!            └── abort, client left, idle, store failed ──▶ gone
//! ```

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use protocol::{BlobDigest, ErrorCode, Failure, UploadId, request::UploadFormat};

use crate::peer::ClientPeer;

/// One upload.
#[derive(Debug)]
pub(crate) struct Upload {
    pub(crate) client: ClientPeer,
    pub(crate) size: u64,
    pub(crate) format: UploadFormat,
    pub(crate) digest: Option<BlobDigest>,
    pub(crate) label: Option<String>,
    /// Bytes that came and were handed to the store.
    pub(crate) received: u64,
    pub(crate) committing: bool,
    pub(crate) touched: Instant,
}

/// Uploads by id.
#[derive(Debug)]
pub(crate) struct Uploads {
    open: BTreeMap<UploadId, Upload>,
    seed: u64,
    begun: u64,
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
    #[error(
        "the upload is truncated: it was announced with {size} bytes and {received} bytes came"
    )]
    Truncated { size: u64, received: u64 },
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        Self::new(ErrorCode::InvalidRequest, error.to_string())
    }
}

impl Uploads {
    /// No uploads; ids are derived from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { open: BTreeMap::new(), seed, begun: 0 }
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

    /// The open upload of this client, if it is not being committed.
    pub(crate) fn get_open(
        &mut self,
        id: &UploadId,
        client: ClientPeer,
    ) -> Result<&mut Upload, StepError> {
        match self.open.get_mut(id) {
            Some(upload) if upload.client != client => Err(StepError::NotOpen(id.clone())),
            Some(upload) if upload.committing => Err(StepError::Committing(id.clone())),
            Some(upload) => Ok(upload),
            None => Err(StepError::NotOpen(id.clone())),
        }
    }

    pub(crate) fn remove(&mut self, id: &UploadId) -> Option<Upload> {
        self.open.remove(id)
    }

    /// Takes out the uploads of a client that left, except those that are being committed.
    pub(crate) fn remove_client(&mut self, client: ClientPeer) -> Vec<UploadId> {
        self.remove_where(|upload| upload.client == client)
    }

    /// Takes out the uploads that nobody went on with for `idle`.
    pub(crate) fn remove_idle(&mut self, idle: Duration, now: Instant) -> Vec<UploadId> {
        self.remove_where(|upload| upload.touched + idle <= now)
    }

    /// When the next upload is dropped unless it goes on.
    pub(crate) fn next_idle(&self, idle: Duration) -> Option<Instant> {
        let open = self.open.values().filter(|upload| !upload.committing);
        open.map(|upload| upload.touched + idle).min()
    }

    fn remove_where(&mut self, gone: impl Fn(&Upload) -> bool) -> Vec<UploadId> {
        let removed = self.open.extract_if(.., |_, upload| !upload.committing && gone(upload));
        removed.map(|(id, _)| id).collect()
    }
}

impl Upload {
    /// Whether it is counted with the files of models.
    pub(crate) fn is_model_file(&self) -> bool {
        self.format == UploadFormat::Model
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
        self.committing = true;
        Ok(())
    }
}

/// The finalizer of `SplitMix64`: spreads consecutive numbers over all 64 bits, one to one.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
