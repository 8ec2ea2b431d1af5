//! Names of things: content digests, request ids and the names people give.
//!
//! Adapters and models are named by the BLAKE3 digest of their content, so a name can be checked
//! wherever bytes arrive and two parties can never mean different bytes by the same name.
//! Digests travel and print as 64 lower-case hexadecimal digits.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes of a BLAKE3 digest.
const DIGEST_BYTES: usize = 32;

/// Longest accepted name of a model, worker or upload, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Why a text is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// Not 64 hexadecimal digits.
    #[error("`{0}` is not a BLAKE3 digest: expected 64 hexadecimal digits")]
    Digest(String),
    /// Empty, too long, or with characters that do not belong in a name.
    #[error(
        "`{0}` is not a name: expected 1 to {NAME_BYTES_MAX} letters, digits, `.`, `_`, `-`, `:`, `@` or `/`"
    )]
    Name(String),
}

macro_rules! digest_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; DIGEST_BYTES]);

        impl $name {
            /// The id of `content`: its BLAKE3 digest.
            pub fn of(content: &[u8]) -> Self {
                Self(blake3::hash(content).into())
            }

            /// The id with these digest bytes.
            pub const fn from_bytes(digest: [u8; DIGEST_BYTES]) -> Self {
                Self(digest)
            }

            /// The digest's bytes.
            pub const fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
                &self.0
            }

            /// The first 12 hexadecimal digits: enough for people, never for identity.
            pub fn short(&self) -> String {
                self.to_string()[..12].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&blake3::Hash::from_bytes(self.0).to_hex(), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let hash = blake3::Hash::from_hex(text).map_err(|_| InvalidId::Digest(clip(text)))?;
                Ok(Self(hash.into()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let allowed = |c: char| c.is_alphanumeric() || "._-:@/".contains(c);
                if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.chars().all(allowed) {
                    return Err(InvalidId::Name(clip(text)));
                }
                Ok(Self(text.to_owned()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

digest_id! {
    /// What a `clip_encode` asks for, without who asks and how long there is for it: the broker's
    /// digest of the rest of its header and of its attachments. Equal requests have equal answers.
    RequestDigest
}

digest_id! {
    /// The text-encoder part of one LoRA-like file: the digest of its canonical bytes.
    AdapterId
}

digest_id! {
    /// A model's weights as a worker holds them: the digest of its components' tensors.
    ModelDigest
}

digest_id! {
    /// Bytes as they were uploaded, whatever they hold.
    BlobDigest
}

impl From<AdapterId> for BlobDigest {
    /// The bytes that an adapter's id is the digest of: its canonical form.
    fn from(adapter: AdapterId) -> Self {
        Self(adapter.0)
    }
}

impl From<BlobDigest> for AdapterId {
    /// The adapter whose canonical form has this digest, if there is one.
    fn from(blob: BlobDigest) -> Self {
        Self(blob.0)
    }
}

name_id! {
    /// What people call a model, for example `sdxl-base`.
    ModelName
}

name_id! {
    /// What people call a worker, for example `gpu-0`.
    WorkerName
}

name_id! {
    /// One request of one client; the client chooses it and finds it in every reply.
    RequestId
}

name_id! {
    /// One upload under way; the broker chooses it.
    UploadId
}

/// Cuts what somebody sent us to a length fit for an error message.
fn clip(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_from_its_text() {
        let id = AdapterId::of(b"abc");
        assert_eq!(id.to_string().parse::<AdapterId>().unwrap(), id);
        assert_eq!(id.to_string().len(), 64);
        assert!(id.to_string().starts_with(&id.short()));
    }

    #[test]
    fn a_wrong_digest_is_named_in_the_error() {
        let error = "xyz".parse::<AdapterId>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`xyz` is not a BLAKE3 digest: expected 64 hexadecimal digits"
        );
    }

    #[test]
    fn names_refuse_control_characters_and_excess() {
        assert!("gpu-0@host/1".parse::<WorkerName>().is_ok());
        for bad in ["", "a b", "a\n", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad:?} was accepted");
        }
    }
}
