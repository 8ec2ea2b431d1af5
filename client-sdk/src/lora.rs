//! LoRA files: they become canonical here, and of a large one only the text-encoder part is read.

use std::path::Path;

use adapter::PatchSet;
use bytes::Bytes;
use protocol::{AdapterId, reply::KeyReport, request::UploadFormat};

use crate::{
    client::Client,
    content::Content,
    error::{Error, ErrorKind},
    file_source::FileSource,
    upload::{self, Parcel, Progress, on_a_thread},
};

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

pub(crate) async fn upload_file(
    client: &Client,
    path: &Path,
    progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let label = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let path = path.to_owned();
    let canonical = on_a_thread(move || {
        let source = FileSource::open(&path).map_err(|error| {
            Error::new(ErrorKind::Io, format!("cannot read `{}`: {error}", path.display()))
        })?;
        let read = adapter::read_lora(&source);
        read.map(canonical).map_err(|error| Error::from(error).about(&path.display()))
    });
    send(client, canonical.await?, label.unwrap_or_default(), progress).await
}

pub(crate) async fn upload_bytes(
    client: &Client,
    file: Bytes,
    label: &str,
    progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let canonical = on_a_thread(move || Ok(canonical(adapter::read_lora(&*file)?)));
    send(client, canonical.await?, label.to_owned(), progress).await
}

pub(crate) async fn upload_adapter(
    client: &Client,
    adapter: &PatchSet,
    label: &str,
    progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let report = adapter::KeyReport {
        targets: adapter.patches().keys().cloned().collect(),
        unmatched: adapter.unmatched().to_vec(),
        ..adapter::KeyReport::default()
    };
    let canonical = canonical((adapter.clone(), report));
    send(client, canonical, label.to_owned(), progress).await
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

async fn send(
    client: &Client,
    canonical: Canonical,
    label: String,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<Uploaded, Error> {
    let Canonical { adapter, bytes, report } = canonical;
    let parcel = Parcel {
        content: Content::Memory(bytes),
        format: UploadFormat::Canonical,
        digest: adapter.into(),
        label,
    };
    let sent_bytes = upload::send(client, &parcel, &mut progress).await?;
    Ok(Uploaded { adapter, report, sent_bytes })
}
