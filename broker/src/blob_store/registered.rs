//! What is registered, kept as one file beside the blobs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use broker_core::Registration;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::error::{IoContext as _, StoreError};

/// Bytes of the file that are read; a larger one is not ours.
const BYTES_MAX: u64 = 64 << 20;

/// The version of this format.
const VERSION: u32 = 1;

/// The content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Registered {
    version: u32,
    models: Vec<Registration>,
}

/// The file's content for these registrations.
pub(super) fn text(registrations: Vec<Registration>) -> Vec<u8> {
    let registered = Registered { version: VERSION, models: registrations };
    serde_json::to_vec_pretty(&registered).expect("registrations are plain JSON")
}

/// What was registered before the start. A file that is not of this form is set aside with a
/// warning: without it the farm works, and its clients register again.
///
/// # Errors
/// When the disk fails, or a newer broker wrote the file: then what it says must not get lost.
pub(super) fn load(path: &Path) -> Result<Vec<Registration>, StoreError> {
    let reason = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Ok(metadata) if metadata.len() > BYTES_MAX => {
            format!("it has {} bytes, more than {BYTES_MAX}", metadata.len())
        }
        found => {
            found.doing("read", path)?;
            match parse(&fs::read(path).doing("read", path)?) {
                Ok(Registered { version: VERSION, models }) => return Ok(models),
                Ok(Registered { version, .. }) => {
                    return Err(StoreError::Newer { file: path.to_owned(), version });
                }
                Err(reason) => reason,
            }
        }
    };
    let aside = free_name(path);
    fs::rename(path, &aside).doing("set aside", path)?;
    let (file, kept) = (path.display(), aside.display());
    warn!(%file, %kept, "no model is registered, the list cannot be read: {reason}");
    Ok(Vec::new())
}

/// The content of a file of this version. Of a newer one the version alone is read.
fn parse(text: &[u8]) -> Result<Registered, String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let text_error = |error: serde_json::Error| error.to_string();
    let Versioned { version } = serde_json::from_slice(text).map_err(text_error)?;
    if version > VERSION {
        return Ok(Registered { version, models: Vec::new() });
    }
    let registered: Registered = serde_json::from_slice(text).map_err(text_error)?;
    if version < VERSION {
        return Err(format!("its version is {version} instead of {VERSION}"));
    }
    Ok(registered)
}

/// A name beside `path` that no file has: an earlier one that was set aside stays.
fn free_name(path: &Path) -> PathBuf {
    let mut aside = path.with_extension("json.broken");
    let mut number = 1;
    while aside.exists() {
        number += 1;
        aside = path.with_extension(format!("json.broken-{number}"));
    }
    aside
}
