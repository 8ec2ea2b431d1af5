//! The one error of the SDK: what programs decide by, and a sentence that says what to do.

use std::{fmt, time::Duration};

use adapter::{AdapterError, FileError};
use protocol::{ErrorCode, ErrorReply};

/// Why a call failed. The sentence says everything; there is no further source to ask.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    code: Option<ErrorCode>,
    message: String,
    is_retryable: bool,
    retry_after: Option<Duration>,
}

/// What went wrong, as far as a program can react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The farm answered with this code.
    Farm(ErrorCode),
    /// No answer came within the request's time budget.
    Timeout,
    /// No farm was ever reached at the endpoint.
    Unreachable,
    /// The request was refused here, before it was sent.
    Invalid,
    /// Too many requests of this client are open.
    Busy,
    /// The farm's answer does not fit the request; nothing of it was used.
    Protocol,
    /// A file cannot be read.
    Io,
    /// A file is not an acceptable LoRA.
    Adapter,
    /// The client's own thread has ended.
    Closed,
}

impl Error {
    /// What programs decide by.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same call may succeed when it is made again.
    pub fn is_retryable(&self) -> bool {
        self.is_retryable
    }

    /// When to try again, if the farm gave advice.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The farm's error code, or the one it would have answered with.
    pub fn code(&self) -> Option<ErrorCode> {
        self.code
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let is_retryable =
            matches!(kind, ErrorKind::Timeout | ErrorKind::Unreachable | ErrorKind::Busy);
        let code = match kind {
            ErrorKind::Farm(code) => Some(code),
            ErrorKind::Timeout => Some(ErrorCode::DeadlineExceeded),
            ErrorKind::Invalid => Some(ErrorCode::InvalidRequest),
            ErrorKind::Adapter => Some(ErrorCode::LoraRejected),
            ErrorKind::Unreachable
            | ErrorKind::Busy
            | ErrorKind::Protocol
            | ErrorKind::Io
            | ErrorKind::Closed => None,
        };
        Self { kind, code, message: message.into(), is_retryable, retry_after: None }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// The farm's answer is not one to this request: `what` says why.
    pub(crate) fn protocol(what: impl fmt::Display) -> Self {
        Self::new(
            ErrorKind::Protocol,
            format!("the farm's answer does not fit the request: {what}"),
        )
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the client's thread has ended: make a new client")
    }

    /// Puts what the error is about in front of its message.
    pub(crate) fn about(mut self, subject: &impl fmt::Display) -> Self {
        self.message = format!("`{subject}`: {}", self.message);
        self
    }
}

impl From<ErrorReply> for Error {
    fn from(reply: ErrorReply) -> Self {
        let ErrorReply { code, retryable, message, retry_after_ms, .. } = reply;
        Self {
            is_retryable: retryable,
            retry_after: retry_after_ms.map(|ms| Duration::from_millis(ms.into())),
            ..Self::new(ErrorKind::Farm(code), format!("{code}: {message}"))
        }
    }
}

impl From<AdapterError> for Error {
    fn from(error: AdapterError) -> Self {
        let is_io = matches!(error, AdapterError::File(FileError::Io(_)));
        if is_io {
            return Self::new(ErrorKind::Io, error.to_string());
        }
        let code = match error.kind() {
            adapter::ErrorKind::LoraRejected => ErrorCode::LoraRejected,
            adapter::ErrorKind::TooLarge => ErrorCode::TooLarge,
            adapter::ErrorKind::Unsupported => ErrorCode::Unsupported,
        };
        Self { code: Some(code), ..Self::new(ErrorKind::Adapter, error.to_string()) }
    }
}
