//! A client that sends frames as they are, well-formed or not. It shares no code with the SDK.
//!
//! Programs use `luna_client`; this is for what no well-behaved client sends.

use std::time::Duration;

use bytes::Bytes;
use protocol::{
    BlobDigest, Envelope, ErrorReply, Header, RequestId, UploadId,
    frames::{self, MAGIC},
    header, limits,
    reply::UploadLoraReply,
    request::{UploadFormat, UploadLora, UploadOp},
};
use tokio::time::timeout;
use transport::{Dealer, DealerConfig, DealerEvent, Message};

/// Longest time for any one event, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_mins(1);

/// Bytes of the largest message that this client sends: more than the broker accepts.
const MESSAGE_BYTES_MAX: usize = 128 << 20;

/// One connection to a broker.
#[derive(Debug)]
pub struct WireClient {
    dealer: Dealer,
    asked: u64,
}

impl WireClient {
    /// Connects to the broker at `endpoint`.
    pub async fn connect(endpoint: &str) -> Self {
        let config =
            DealerConfig { message_bytes_max: MESSAGE_BYTES_MAX, ..DealerConfig::default() };
        let endpoint = endpoint.parse().expect("the endpoint of a farm can be connected to");
        let dealer = Dealer::connect(&endpoint, config).expect("a thread can be started");
        let mut client = Self { dealer, asked: 0 };
        client.connected().await;
        client
    }

    /// Waits until the connection stands (again).
    pub async fn connected(&mut self) {
        let event = self.event().await;
        assert_eq!(event, DealerEvent::Connected, "instead of a connection");
    }

    /// Waits until the broker has closed the connection.
    pub async fn disconnected(&mut self) {
        let event = self.event().await;
        assert_eq!(event, DealerEvent::Disconnected, "instead of the end of the connection");
    }

    /// An id that this client has not used.
    pub fn next_id(&mut self) -> RequestId {
        self.asked += 1;
        format!("wire-{}", self.asked).parse().expect("letters, digits and a hyphen")
    }

    /// Sends these frames and nothing else.
    pub fn send_frames(&self, frames: Vec<Bytes>) {
        let message = Message::new(frames).expect("a message has frames");
        self.dealer.send(message).expect("the connection stands");
    }

    /// Sends these bytes as the header of a message.
    pub fn send_header(&self, header: impl Into<Bytes>) {
        self.send_frames(vec![Bytes::from_static(MAGIC), header.into()]);
    }

    /// Sends a message.
    pub fn send<H: Header>(&self, header: &H, attachments: Vec<Bytes>) {
        self.send_frames(frames::frames_of(header::write(header).into(), attachments));
    }

    /// Waits for the next message.
    pub async fn next(&mut self) -> Envelope {
        match self.event().await {
            DealerEvent::Message(message) => {
                Envelope::open(message.into_frames()).expect("the broker sends what can be read")
            }
            event @ (DealerEvent::Connected | DealerEvent::Disconnected) => {
                panic!("expected a message: {event:?}")
            }
        }
    }

    /// Waits for the next message, which must be an error.
    pub async fn next_error(&mut self) -> ErrorReply {
        let envelope = self.next().await;
        assert_eq!(envelope.peek.kind, ErrorReply::KIND, "expected an error");
        envelope.read().expect("the broker's errors can be read")
    }

    /// Sends a message and waits for the next one: the reply, or the error.
    ///
    /// # Errors
    /// The farm's error.
    pub async fn ask<H: Header, R: Header>(
        &mut self,
        header: &H,
        attachments: Vec<Bytes>,
    ) -> Result<(R, Vec<Bytes>), ErrorReply> {
        self.send(header, attachments);
        let envelope = self.next().await;
        if envelope.is::<ErrorReply>() {
            return Err(envelope.read().expect("the broker's errors can be read"));
        }
        assert_eq!(envelope.peek.kind, R::KIND, "the kind of the reply");
        let reply = envelope.read().expect("the broker's replies can be read");
        Ok((reply, envelope.attachments))
    }

    /// One step of an upload.
    ///
    /// # Errors
    /// The farm's error.
    pub async fn upload_step(
        &mut self,
        op: UploadOp,
        attachments: Vec<Bytes>,
    ) -> Result<UploadLoraReply, ErrorReply> {
        let step = UploadLora { id: self.next_id(), op };
        let (reply, _) = self.ask(&step, attachments).await?;
        Ok(reply)
    }

    /// Announces a file of `size` bytes; returns the upload.
    ///
    /// # Errors
    /// The farm's error.
    pub async fn begin(
        &mut self,
        size: usize,
        format: UploadFormat,
        digest: Option<BlobDigest>,
    ) -> Result<UploadId, ErrorReply> {
        let begin = UploadOp::Begin { size: size as u64, format, digest, label: None };
        let reply = self.upload_step(begin, Vec::new()).await?;
        Ok(reply.upload.expect("the farm does not hold the file yet"))
    }

    /// Uploads `file` as it is, whatever it is.
    ///
    /// # Errors
    /// The farm's error to the first step that failed.
    pub async fn upload(
        &mut self,
        file: &[u8],
        format: UploadFormat,
        digest: Option<BlobDigest>,
    ) -> Result<UploadLoraReply, ErrorReply> {
        let upload = self.begin(file.len(), format, digest).await?;
        let mut offset = 0;
        for chunk in file.chunks(limits::UPLOAD_CHUNK_BYTES_MAX) {
            let op = UploadOp::Chunk { upload: upload.clone(), offset };
            self.upload_step(op, vec![Bytes::copy_from_slice(chunk)]).await?;
            offset += chunk.len() as u64;
        }
        self.upload_step(UploadOp::Commit { upload }, Vec::new()).await
    }

    /// Closes the connection at once, whatever is under way.
    pub async fn close(self) {
        self.dealer.close().await;
    }

    async fn event(&mut self) -> DealerEvent {
        let event = timeout(PATIENCE, self.dealer.recv()).await.expect("something happens in time");
        event.expect("the socket's thread lives")
    }
}
