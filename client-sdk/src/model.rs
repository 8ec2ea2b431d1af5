//! Models that a farm is asked to serve: by path on the workers' machines, or by upload.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use adapter::ByteSource as _;
use protocol::{
    BlobDigest, Family, ModelName, limits,
    reply::RegisterModelReply,
    request::{self, ModelFile, UploadFormat},
};

use crate::{
    builder::check_timeout,
    client::Client,
    content::{Content, OpenFile},
    error::{Error, ErrorKind},
    file_source::FileSource,
    upload::{self, Parcel, Progress, on_a_thread},
};

/// Bytes that are read at once to compute a digest.
const HASHED_BYTES: usize = 1 << 20;

/// A model to serve: one checkpoint or stand-alone text encoder, or one stand-alone encoder for
/// every component of the family.
#[derive(Debug, Clone)]
pub struct RegisterModel {
    name: String,
    family: Family,
    files: Vec<Source>,
    timeout: Option<Duration>,
}

/// Where a file of the model is.
#[derive(Debug, Clone)]
enum Source {
    /// On the workers' machines.
    Path(String),
    /// Here; uploaded unless the farm holds it.
    Here(PathBuf),
    /// With the farm already.
    Blob(BlobDigest),
}

impl RegisterModel {
    /// A model that people will call `name`, without files yet.
    pub fn new(name: impl Into<String>, family: Family) -> Self {
        Self { name: name.into(), family, files: Vec::new(), timeout: None }
    }

    /// Adds a file by its absolute path on the workers' machines, in a directory that they allow.
    #[must_use]
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.files.push(Source::Path(path.into()));
        self
    }

    /// Adds a file that is here. It is uploaded first; nothing is sent if the farm holds it.
    #[must_use]
    pub fn upload(mut self, path: impl Into<PathBuf>) -> Self {
        self.files.push(Source::Here(path.into()));
        self
    }

    /// Adds a file that the farm holds, from [`Client::upload_model_file`].
    #[must_use]
    pub fn blob(mut self, blob: BlobDigest) -> Self {
        self.files.push(Source::Blob(blob));
        self
    }

    /// How long the workers may take to read the model; uploads are not counted.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// A model's file that the farm now holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadedFile {
    /// What to name in [`RegisterModel::blob`].
    pub blob: BlobDigest,
    /// Bytes that were sent; 0 when the farm held the file already.
    pub sent_bytes: u64,
}

pub(crate) async fn register(
    client: &Client,
    model: RegisterModel,
    mut progress: impl FnMut(&Path, Progress) + Send,
) -> Result<RegisterModelReply, Error> {
    let timeout = model.timeout.unwrap_or_else(|| client.timeout());
    check_timeout(timeout)?;
    let name: ModelName =
        model.name.parse().map_err(|error| Error::invalid(format!("model {error}")))?;
    let mut files = Vec::new();
    for source in model.files {
        files.push(match source {
            Source::Path(path) => ModelFile::Path(path),
            Source::Blob(blob) => ModelFile::Blob(blob),
            Source::Here(path) => {
                let step = |step| progress(&path, step);
                ModelFile::Blob(upload_file(client, &path, step).await?.blob)
            }
        });
    }
    let budget_ms = u32::try_from(timeout.as_millis()).ok();
    let family = model.family;
    client
        .ask_within(timeout, |id| request::RegisterModel { id, name, family, files, budget_ms })
        .await
}

pub(crate) async fn upload_file(
    client: &Client,
    path: &Path,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<UploadedFile, Error> {
    let label = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let path = path.to_owned();
    let (file, blob) = on_a_thread(move || open(path)).await?;
    let parcel = Parcel {
        content: Content::File(Arc::new(file)),
        format: UploadFormat::Model,
        digest: blob,
        label: label.unwrap_or_default(),
    };
    let sent_bytes = upload::send(client, &parcel, &mut progress).await?;
    Ok(UploadedFile { blob, sent_bytes })
}

/// Opens a file and computes its digest.
fn open(path: PathBuf) -> Result<(OpenFile, BlobDigest), Error> {
    let cannot = |error: std::io::Error| {
        Error::new(ErrorKind::Io, format!("cannot read `{}`: {error}", path.display()))
    };
    let source = FileSource::open(&path).map_err(cannot)?;
    let bytes = source.byte_len();
    if bytes > limits::MODEL_BYTES_MAX {
        let max = limits::MODEL_BYTES_MAX;
        let path = path.display();
        let message = format!("`{path}` has {bytes} bytes: at most {max} can be uploaded");
        return Err(Error::invalid(message));
    }
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while offset < bytes {
        let length = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(HASHED_BYTES);
        hasher.update(&source.read(offset, length).map_err(cannot)?);
        offset += length as u64;
    }
    let digest = BlobDigest::from_bytes(hasher.finalize().into());
    Ok((OpenFile { path, source }, digest))
}
