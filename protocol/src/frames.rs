//! Messages as frames: `[ "LUNA/1", header, attachment* ]`, with an optional empty delimiter in
//! front, as REQ sockets put it there.

use bytes::Bytes;

use crate::{
    header::{self, Header, InvalidHeader, Peek},
    limits,
};

/// The first frame of every message: protocol and major version.
pub const MAGIC: &[u8] = b"LUNA/1";

/// A message whose frames are in order; its header is read by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Whether an empty frame came in front; replies mirror it.
    pub delimited: bool,
    /// The kind of message and the request it belongs to.
    pub peek: Peek,
    /// The header frame as it came, so that it can be forwarded unread.
    pub header: Bytes,
    /// Everything after the header.
    pub attachments: Vec<Bytes>,
}

/// Frames that are no message of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFrames {
    /// Not the magic frame first, or no header after it.
    #[error("expected the frames `LUNA/1`, header, attachments: {0}")]
    Shape(&'static str),
    /// Too many frames.
    #[error("the message has {0} frames: at most {max} are accepted", max = limits::FRAMES_MAX)]
    TooMany(usize),
    /// The header cannot be read.
    #[error(transparent)]
    Header(#[from] InvalidHeader),
}

impl Envelope {
    /// Puts the frames of one message in order and peeks into the header.
    ///
    /// # Errors
    /// When the frames are not `[""?, "LUNA/1", header, attachment*]` or over a limit.
    pub fn open(frames: Vec<Bytes>) -> Result<Self, InvalidFrames> {
        if frames.len() > limits::FRAMES_MAX {
            return Err(InvalidFrames::TooMany(frames.len()));
        }
        let delimited = is_delimited(&frames);
        let mut frames = frames.into_iter().skip(usize::from(delimited));
        match frames.next() {
            Some(magic) if magic == MAGIC => {}
            Some(_) => return Err(InvalidFrames::Shape("the first frame is another")),
            None => return Err(InvalidFrames::Shape("there is none")),
        }
        let header = frames.next().ok_or(InvalidFrames::Shape("the header is missing"))?;
        let peek = header::peek(&header)?;
        Ok(Self { delimited, peek, header, attachments: frames.collect() })
    }

    /// The header's fields, once the kind is known to be `H`'s.
    ///
    /// # Errors
    /// When a field is missing, of the wrong type or over a limit.
    pub fn read<H: Header>(&self) -> Result<H, InvalidHeader> {
        header::read(&self.header)
    }

    /// Whether this message is of `H`'s kind.
    pub fn is<H: Header>(&self) -> bool {
        self.peek.kind == H::KIND
    }
}

/// Whether the empty frame of a REQ socket comes first.
pub fn is_delimited(frames: &[Bytes]) -> bool {
    frames.first().is_some_and(Bytes::is_empty)
}

/// The frames of a message.
pub fn frames<H: Header>(header: &H, attachments: Vec<Bytes>) -> Vec<Bytes> {
    frames_of(header::write(header).into(), attachments)
}

/// The frames of a message whose header is written already.
pub fn frames_of(header: Bytes, attachments: Vec<Bytes>) -> Vec<Bytes> {
    let mut frames = Vec::with_capacity(2 + attachments.len());
    frames.push(Bytes::from_static(MAGIC));
    frames.push(header);
    frames.extend(attachments);
    frames
}

/// Puts the delimiter of a REQ socket in front where the request had one.
pub fn delimit(mut frames: Vec<Bytes>, delimited: bool) -> Vec<Bytes> {
    if delimited {
        frames.insert(0, Bytes::new());
    }
    frames
}
