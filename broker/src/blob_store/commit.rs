//! What becomes of an upload that is complete: an adapter, or a file of a model.

use adapter::PatchSet;
use broker_core::{BlobName, BlobOutcome, StoredBlob, StoredModelFile};
use protocol::{AdapterId, BlobDigest, limits, reply::KeyReport, request::UploadFormat};

use super::{
    error::OpError,
    layout::{Layout, Sidecar},
    part::Part,
};

/// Bytes of a canonical adapter that a client may upload; its tensors are read into memory to be
/// checked.
pub(super) const CANONICAL_BYTES_MAX: u64 = 1 << 30;

/// Bytes that the names of unmatched keys take in a reply; the rest of them is counted.
const UNMATCHED_BYTES_MAX: usize = 256 << 10;

/// What an upload was announced as.
#[derive(Debug)]
pub(super) struct Announced {
    pub(super) format: UploadFormat,
    pub(super) digest: Option<BlobDigest>,
    pub(super) label: Option<String>,
}

/// Verifies an upload and keeps what it is; on failure it is gone.
pub(super) fn commit(
    layout: &Layout,
    part: Part,
    announced: Announced,
) -> Result<BlobOutcome, OpError> {
    let kept = keep(layout, &part, announced);
    // A part that has become something has another name by now.
    part.discard();
    kept
}

fn keep(layout: &Layout, part: &Part, announced: Announced) -> Result<BlobOutcome, OpError> {
    let Announced { format, digest: expected, label } = announced;
    let raw = part.digest();
    if let Some(expected) = expected.filter(|&expected| expected != raw) {
        return Err(OpError::Digest { expected, found: raw });
    }
    match format {
        UploadFormat::Model => keep_model_file(layout, part, label),
        UploadFormat::Lora => keep_lora(layout, part, label),
        UploadFormat::Canonical => keep_canonical(layout, part, label),
    }
}

/// Makes an adapter of a LoRA file as it is found in the wild.
fn keep_lora(layout: &Layout, part: &Part, label: Option<String>) -> Result<BlobOutcome, OpError> {
    let (set, report) = adapter::read_lora(&part.source())?;
    let report = KeyReport {
        targets: count(report.targets.len()),
        unmatched: listed(&report.unmatched),
        ignored: count(report.ignored_keys),
    };
    let adapter = set.id();
    let (bytes, sidecar) = layout.store_adapter(adapter, &set, made_of(part, label))?;
    Ok(committed((adapter, bytes), sidecar, report))
}

/// Keeps an adapter that is canonical already.
fn keep_canonical(
    layout: &Layout,
    part: &Part,
    label: Option<String>,
) -> Result<BlobOutcome, OpError> {
    let bytes = part.len();
    if bytes > CANONICAL_BYTES_MAX {
        return Err(OpError::CanonicalTooLarge { bytes });
    }
    let set = PatchSet::from_source(&part.source())?;
    let report = KeyReport {
        targets: count(set.patches().len()),
        unmatched: listed(set.unmatched()),
        ignored: 0,
    };
    drop(set);
    let adapter = AdapterId::from(part.digest());
    let sidecar = layout.keep_part(BlobName::Adapter(adapter), part, made_of(part, label))?;
    Ok(committed((adapter, bytes), sidecar, report))
}

/// Keeps the file as it is; what is in it is for workers to judge.
fn keep_model_file(
    layout: &Layout,
    part: &Part,
    label: Option<String>,
) -> Result<BlobOutcome, OpError> {
    let bytes = part.len();
    if bytes > limits::MODEL_BYTES_MAX {
        return Err(OpError::ModelTooLarge { bytes });
    }
    let blob = part.digest();
    let sidecar = Sidecar { label, ..Sidecar::default() };
    let label = layout.keep_part(BlobName::ModelFile(blob), part, sidecar)?.label;
    Ok(BlobOutcome::CommittedModelFile(StoredModelFile { blob, bytes, label }))
}

fn made_of(part: &Part, label: Option<String>) -> Sidecar {
    Sidecar { label, raw: vec![part.digest()], reader: adapter::READER_VERSION }
}

fn committed(
    (adapter, bytes): (AdapterId, u64),
    sidecar: Sidecar,
    report: KeyReport,
) -> BlobOutcome {
    let blob = StoredBlob { adapter, bytes, label: sidecar.label, raw: sidecar.raw };
    BlobOutcome::Committed { blob, report }
}

/// As many of `keys` as fit in a reply, and a last entry that counts the others.
pub(super) fn listed(keys: &[String]) -> Vec<String> {
    let mut room = UNMATCHED_BYTES_MAX;
    let fits = |key: &&String| {
        let left = room.checked_sub(key.len());
        room = left.unwrap_or(0);
        left.is_some()
    };
    let mut listed: Vec<String> = keys.iter().take_while(fits).cloned().collect();
    if listed.len() < keys.len() {
        listed.push(format!("… and {} more", keys.len() - listed.len()));
    }
    listed
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
