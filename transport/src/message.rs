//! A multipart message: one or more frames of bytes, none of them interpreted here.

use bytes::Bytes;
use zeromq::ZmqMessage;

/// One multipart message without the routing id: at least one frame, any of which may be empty.
///
/// Cloning copies the list of frames and shares their bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Never empty: ZMTP cannot express a message of no frames.
    frames: Vec<Bytes>,
}

/// A list of no frames, which ZMTP cannot express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message needs at least one frame, which may be empty")]
pub struct EmptyMessage;

impl Message {
    /// Makes a message of `frames`.
    ///
    /// # Errors
    /// [`EmptyMessage`] if there are none.
    pub fn new(frames: Vec<Bytes>) -> Result<Self, EmptyMessage> {
        if frames.is_empty() { Err(EmptyMessage) } else { Ok(Self { frames }) }
    }

    /// Returns the frames in wire order, at least one.
    pub fn frames(&self) -> &[Bytes] {
        &self.frames
    }

    /// Gives up the frames in wire order, at least one.
    pub fn into_frames(self) -> Vec<Bytes> {
        self.frames
    }

    /// Counts the bytes of all frames, without their ZMTP headers.
    pub fn byte_len(&self) -> usize {
        self.frames.iter().map(Bytes::len).sum()
    }

    /// Ties `guard` to the message, so that it is dropped when the last clone of the last frame
    /// is: for a message handed to `zeromq`, once that frame has been encoded for the wire.
    pub(crate) fn guarded(mut self, guard: impl Send + 'static) -> Self {
        let frame = self.frames.pop().expect("a message has at least one frame");
        self.frames.push(Bytes::from_owner(Guarded { frame, _guard: guard }));
        self
    }

    /// Converts what `zeromq` received after the routing id was taken off.
    pub(crate) fn from_zmq(message: ZmqMessage) -> Result<Self, EmptyMessage> {
        Self::new(message.into_vec())
    }

    /// Converts to what `zeromq` sends.
    pub(crate) fn into_zmq(self) -> ZmqMessage {
        ZmqMessage::try_from(self.frames).expect("a message has at least one frame")
    }
}

impl TryFrom<Vec<Bytes>> for Message {
    type Error = EmptyMessage;

    fn try_from(frames: Vec<Bytes>) -> Result<Self, Self::Error> {
        Self::new(frames)
    }
}

impl From<Bytes> for Message {
    /// Makes a message of one frame.
    fn from(frame: Bytes) -> Self {
        Self { frames: vec![frame] }
    }
}

impl From<&'static str> for Message {
    /// Makes a message of one frame.
    fn from(frame: &'static str) -> Self {
        Self::from(Bytes::from_static(frame.as_bytes()))
    }
}

/// A frame that keeps a guard alive as long as anybody holds its bytes.
struct Guarded<G> {
    frame: Bytes,
    _guard: G,
}

impl<G> AsRef<[u8]> for Guarded<G> {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_message_of_no_frames_is_refused() {
        assert_eq!(Message::new(Vec::new()), Err(EmptyMessage));
        assert_eq!(Message::new(vec![Bytes::new()]).unwrap().byte_len(), 0);
    }

    #[test]
    fn a_guard_lives_as_long_as_the_last_frame_even_an_empty_one() {
        for last in [Bytes::new(), Bytes::from_static(b"payload")] {
            let frames = vec![Bytes::from_static(b"header"), last];
            let guard = Arc::new(());
            let message = Message::new(frames.clone()).unwrap().guarded(Arc::clone(&guard));
            assert_eq!(message.frames(), frames);

            let copy = message.clone();
            drop(message);
            assert_eq!(Arc::strong_count(&guard), 2);
            drop(copy);
            assert_eq!(Arc::strong_count(&guard), 1);
        }
    }
}
