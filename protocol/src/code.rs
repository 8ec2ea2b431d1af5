//! Error codes: stable names that programs decide by, and the error they travel in.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::RequestId;

macro_rules! error_codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, retryable: $retryable:literal;)+) => {
        /// Why a request failed. The names never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $($(#[$doc])* $variant,)+
        }

        impl ErrorCode {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// Whether the same request may succeed when it is sent again.
            pub const fn is_retryable(self) -> bool {
                match self {
                    $(Self::$variant => $retryable,)+
                }
            }
        }
    };
}

error_codes! {
    /// The request cannot be understood or contradicts itself.
    InvalidRequest = "invalid_request", retryable: false;
    /// No worker serves a model of this name or digest.
    UnknownModel = "unknown_model", retryable: false;
    /// The farm does not hold this adapter; upload it first.
    UnknownLora = "unknown_lora", retryable: false;
    /// The uploaded bytes are not an acceptable LoRA file.
    LoraRejected = "lora_rejected", retryable: false;
    /// The adapter does not fit the model.
    LoraMismatch = "lora_mismatch", retryable: false;
    /// Something is larger than its limit.
    TooLarge = "too_large", retryable: false;
    /// The farm is full; try again after `retry_after_ms`.
    Overloaded = "overloaded", retryable: true;
    /// The farm's disk has no room left; an operator has to make some.
    StoreFull = "store_full", retryable: true;
    /// The time budget ran out.
    DeadlineExceeded = "deadline_exceeded", retryable: true;
    /// The workers that held the request died.
    WorkerLost = "worker_lost", retryable: true;
    /// The client cancelled the request.
    Cancelled = "cancelled", retryable: false;
    /// The farm does not know who asks.
    Unauthorized = "unauthorized", retryable: false;
    /// Who asks may not do this.
    Forbidden = "forbidden", retryable: false;
    /// This version of the farm cannot do this.
    Unsupported = "unsupported", retryable: false;
    /// A defect of the farm.
    Internal = "internal", retryable: false;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ErrorCode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text).ok_or(())
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ErrorCode {
    /// A code from a newer peer reads as `internal`; its message still tells.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Ok(text.parse().unwrap_or(Self::Internal))
    }
}

/// A code with the sentence for people: the value at fault and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Failure {
    /// What programs decide by.
    pub code: ErrorCode,
    /// What people read.
    pub message: String,
    /// When trying again makes sense, for `overloaded` and `store_full`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u32>,
}

impl Failure {
    /// A failure without advice on when to try again.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None }
    }

    /// The reply that carries this failure.
    pub fn into_reply(self, id: Option<RequestId>) -> ErrorReply {
        let retryable = self.code.is_retryable();
        let Self { code, message, retry_after_ms } = self;
        ErrorReply { id, code, retryable, message, retry_after_ms }
    }
}

/// The terminal reply of a request that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// The request that failed; absent when its id could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<RequestId>,
    /// What programs decide by.
    pub code: ErrorCode,
    /// Whether the same request may succeed when it is sent again.
    pub retryable: bool,
    /// What people read.
    pub message: String,
    /// When trying again makes sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u32>,
}

impl From<ErrorReply> for Failure {
    fn from(reply: ErrorReply) -> Self {
        let ErrorReply { code, message, retry_after_ms, .. } = reply;
        Self { code, message, retry_after_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_back_from_its_name() {
        for code in ErrorCode::ALL {
            assert_eq!(code.as_str().parse(), Ok(*code));
        }
    }
}
