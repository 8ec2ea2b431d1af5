//! Errors that a client is told about: their code and their sentence on the wire.

use std::error::Error;

use protocol::{ErrorCode, Failure};

use crate::weights::LoadError;

/// An error that travels to a client.
pub trait WireError: Error + Sized {
    /// What programs decide by.
    fn code(&self) -> ErrorCode;

    /// When trying again makes sense, for `overloaded`.
    fn retry_after_ms(&self) -> Option<u32> {
        None
    }

    /// The failure as it travels: the message and those of its causes in one line.
    fn to_failure(&self) -> Failure {
        let mut message = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Failure { code: self.code(), message, retry_after_ms: self.retry_after_ms() }
    }
}

impl WireError for LoadError {
    /// `invalid_request` for files that are no such model, `internal` where reading or the device
    /// failed.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Open { .. } | Self::ConfigUnreadable { .. } | Self::Device { .. } => {
                ErrorCode::Internal
            }
            Self::HeaderSize { .. }
            | Self::Header { .. }
            | Self::NoEncoder { .. }
            | Self::Foreign { .. }
            | Self::Twice { .. }
            | Self::Surplus { .. }
            | Self::MissingComponent { .. }
            | Self::MissingTensor { .. }
            | Self::Shape { .. }
            | Self::NotMatrix { .. }
            | Self::Dtype { .. }
            | Self::Layers { .. }
            | Self::Positions { .. }
            | Self::UnknownWidth { .. }
            | Self::Config { .. } => ErrorCode::InvalidRequest,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_bad_file_is_the_clients_mistake_and_a_bad_disk_is_not() {
        let file = "/models/clip.safetensors";
        let tensor = "text_model.final_layer_norm.bias".to_owned();
        let failure = LoadError::MissingTensor { file: file.into(), tensor }.to_failure();
        assert_eq!(failure.code, ErrorCode::InvalidRequest);
        for part in [file, "text_model.final_layer_norm.bias"] {
            assert!(failure.message.contains(part), "{failure}");
        }

        let source = io::Error::from_raw_os_error(5);
        let failure = LoadError::Open { file: file.into(), source }.to_failure();
        assert_eq!(failure.code, ErrorCode::Internal);
        let expected = "cannot open `/models/clip.safetensors`: Input/output error (os error 5)";
        assert_eq!((failure.message.as_str(), failure.retry_after_ms), (expected, None));
    }
}
