//! What is registered, kept as one file beside the blobs.

use std::{fs, io, path::Path};

use broker_core::Registration;
use serde::{Deserialize, Serialize};
use tracing::warn;

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

/// What was registered before the start. A file that cannot be read is set aside with a warning:
/// without it the farm works, and its clients register again.
pub(super) fn load(path: &Path) -> Vec<Registration> {
    let reason = match read(path) {
        Ok(found) => return found,
        Err(reason) => reason,
    };
    let aside = path.with_extension("json.broken");
    let kept = match fs::rename(path, &aside) {
        Ok(()) => format!("it is kept as `{}`", aside.display()),
        Err(error) => format!("it cannot be set aside: {error}"),
    };
    warn!(file = %path.display(), "no model is registered, the list cannot be read: {reason}; {kept}");
    Vec::new()
}

fn read(path: &Path) -> Result<Vec<Registration>, String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
        Ok(metadata) if metadata.len() > BYTES_MAX => {
            return Err(format!("it has {} bytes, more than {BYTES_MAX}", metadata.len()));
        }
        Ok(_) => {}
    }
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let registered: Registered =
        serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    match registered.version {
        VERSION => Ok(registered.models),
        other => Err(format!("its version is {other} instead of {VERSION}")),
    }
}
