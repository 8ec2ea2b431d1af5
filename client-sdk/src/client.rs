//! The client: a cheap handle on one connection to a farm.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use adapter::PatchSet;
use bytes::Bytes;
use client_core::{Ask, Start, Unclaimed};
use protocol::{
    AdapterId, Header, ModelName, RequestId, header,
    reply::{
        EvictLoraReply, ExplainReply, HasLoraReply, ListLorasReply, ListModelsReply, LoraInfo,
        ModelStatus, RegisterModelReply, StatusReply,
    },
    request::{EvictLora, Explain, HasLora, ListLoras, ListModels, Status},
};
use tokio::sync::{mpsc, oneshot};
use transport::Endpoint;

use crate::{
    builder::ClientBuilder,
    call::Call,
    driver::{self, Command},
    encode::{EncodeRequest, Encoding, PendingEncode},
    error::Error,
    lora::{self, Uploaded},
    model::{self, RegisterModel, UploadedFile},
    upload::Progress,
};

/// A handle on one connection to a farm. Clones share the connection, which closes with the last.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// What all clones of a client have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) commands: mpsc::UnboundedSender<Command>,
    endpoint: Endpoint,
    timeout: Duration,
    connect_timeout: Duration,
    /// Makes this client's request ids different from all others'.
    nonce: u64,
    asked: AtomicU64,
    /// The connection for uploads, while there are any.
    uploads: Mutex<Weak<Self>>,
}

impl Client {
    /// Settings other than the defaults.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// Connects to the farm at `endpoint`: `tcp://HOST:PORT` or `ipc:///PATH`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) when `endpoint` is none, and
    /// [`ErrorKind::Unreachable`](crate::ErrorKind::Unreachable) when no farm answers there.
    pub async fn connect(endpoint: impl Into<String>) -> Result<Self, Error> {
        Self::builder().endpoint(endpoint).connect().await
    }

    pub(crate) fn new(
        endpoint: Endpoint,
        timeout: Duration,
        connect_timeout: Duration,
    ) -> Result<Self, Error> {
        let commands = driver::spawn(endpoint.clone(), connect_timeout)?;
        let (nonce, asked) = (rand::random(), AtomicU64::new(0));
        let uploads = Mutex::default();
        let shared = Shared { commands, endpoint, timeout, connect_timeout, nonce, asked, uploads };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Where the farm is expected.
    pub fn endpoint(&self) -> String {
        self.shared.endpoint.to_string()
    }

    /// Encodes prompts with a stack of LoRAs. Dropping the future cancels the request.
    ///
    /// # Errors
    /// Whatever the farm answers, and [`ErrorKind::Protocol`](crate::ErrorKind::Protocol) when the
    /// answer is not exactly what was asked for, so that no LoRA is ever left out in silence.
    pub async fn encode(&self, request: EncodeRequest) -> Result<Encoding, Error> {
        self.start_encode(request)?.outcome().await
    }

    /// Sends an encode without waiting for it, so that several are under way at once.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) when it cannot be put on the wire.
    pub fn start_encode(&self, request: EncodeRequest) -> Result<PendingEncode, Error> {
        let timeout = request.timeout_or(self.shared.timeout)?;
        let id = self.shared.next_id();
        let (header, attachments, expected) = request.into_wire(id.clone())?;
        let ask = Ask::Encode(Box::new(header), attachments);
        Ok(PendingEncode::new(self.start(Start { id, ask, timeout })?, expected))
    }

    /// Uploads the text-encoder part of a LoRA file; nothing is sent if the farm holds it already.
    ///
    /// The file is read and made canonical on a thread of its own, and of a large file only the
    /// text-encoder tensors are read. `progress` is called after every chunk.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) and [`ErrorKind::Adapter`](crate::ErrorKind::Adapter)
    /// for the file, else whatever the farm answers.
    pub async fn upload_lora(
        &self,
        path: impl AsRef<Path>,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Uploaded, Error> {
        lora::upload_file(self, path.as_ref(), progress).await
    }

    /// Uploads a LoRA file that is in memory, under a `label` for people.
    ///
    /// # Errors
    /// As [`Client::upload_lora`].
    pub async fn upload_bytes(
        &self,
        file: impl Into<Bytes>,
        label: &str,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Uploaded, Error> {
        lora::upload_bytes(self, file.into(), label, progress).await
    }

    /// Uploads an adapter that was made in memory, for example of `ComfyUI`'s patch objects, under
    /// a `label` for people.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn upload_adapter(
        &self,
        adapter: &PatchSet,
        label: &str,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Uploaded, Error> {
        lora::upload_adapter(self, adapter, label, progress).await
    }

    /// Asks which of `adapters` the farm holds.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn has_lora(&self, adapters: &[AdapterId]) -> Result<HasLoraReply, Error> {
        self.ask(|id| HasLora { id, adapters: adapters.to_vec() }).await
    }

    /// Lists the adapters that the farm holds, by id.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn list_loras(&self) -> Result<Vec<LoraInfo>, Error> {
        let reply: ListLorasReply = self.ask(|id| ListLoras { id }).await?;
        Ok(reply.loras)
    }

    /// Takes adapters out of the workers' memory, and with `delete` out of the blob store too.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn evict_lora(
        &self,
        adapters: &[AdapterId],
        delete: bool,
    ) -> Result<EvictLoraReply, Error> {
        self.ask(|id| EvictLora { id, adapters: adapters.to_vec(), delete }).await
    }

    /// Asks where a request of this model, these adapters and so many chunks would go now, and why.
    /// Nothing is computed.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn explain(
        &self,
        model: ModelName,
        adapters: &[AdapterId],
        chunks: u32,
    ) -> Result<ExplainReply, Error> {
        let adapters = adapters.to_vec();
        self.ask(|id| Explain { id, model, model_digest: None, adapters, chunks }).await
    }

    /// Lists the models that workers serve.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn list_models(&self) -> Result<Vec<ModelStatus>, Error> {
        let reply: ListModelsReply = self.ask(|id| ListModels { id }).await?;
        Ok(reply.models)
    }

    /// Has the workers serve one more model, and uploads the files that are here. `progress` is
    /// called after every chunk, with the file that it is of.
    ///
    /// Success means that at least one worker serves it; the reply says which do and which do not.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) for a file, else whatever the farm answers: when
    /// every worker fails, the error of the first.
    pub async fn register_model(
        &self,
        model: RegisterModel,
        progress: impl FnMut(&Path, Progress) + Send,
    ) -> Result<RegisterModelReply, Error> {
        model::register(self, model, progress).await
    }

    /// Uploads a file of a model; nothing is sent if the farm holds it already. The file is read
    /// twice, first for its digest, and never held in memory as a whole.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) for the file, else whatever the farm answers.
    pub async fn upload_model_file(
        &self,
        path: impl AsRef<Path>,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<UploadedFile, Error> {
        model::upload_file(self, path.as_ref(), progress).await
    }

    /// Asks how the farm is.
    ///
    /// # Errors
    /// Whatever the farm answers.
    pub async fn status(&self) -> Result<StatusReply, Error> {
        self.ask(|id| Status { id }).await
    }

    /// Counts the replies that came for no open request: repeated ones, late ones, and those to
    /// requests that were cancelled. They were dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) when the client's thread has ended.
    pub async fn unclaimed_replies(&self) -> Result<Unclaimed, Error> {
        let (answer, count) = oneshot::channel();
        self.command(Command::Unclaimed(answer))?;
        count.await.map_err(|_| Error::closed())
    }

    /// Waits until a connection stands, for at most the connect timeout.
    pub(crate) async fn connected(&self) -> Result<(), Error> {
        let (id, timeout) = (self.shared.next_id(), self.shared.connect_timeout);
        self.start(Start { id, ask: Ask::Connection, timeout })?.outcome().await?;
        Ok(())
    }

    /// A handle on a connection for uploads alone, which closes with the last of them: on one that
    /// is shared, an encode would wait until the chunks before it are sent.
    pub(crate) fn for_uploads(&self) -> Result<Self, Error> {
        let Shared { endpoint, timeout, connect_timeout, .. } = &*self.shared;
        let mut uploads = self.shared.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = uploads.upgrade() {
            return Ok(Self { shared });
        }
        let client = Self::new(endpoint.clone(), *timeout, *connect_timeout)?;
        *uploads = Arc::downgrade(&client.shared);
        Ok(client)
    }

    /// Sends the message that `header` makes of a new id, and waits for its reply.
    pub(crate) async fn ask<H: Header, R: Header>(
        &self,
        header: impl FnOnce(RequestId) -> H,
    ) -> Result<R, Error> {
        let (reply, _) = self.start_plain(header, Vec::new())?.reply().await?;
        Ok(reply)
    }

    /// As [`Client::ask`], with a time budget of its own.
    pub(crate) async fn ask_within<H: Header, R: Header>(
        &self,
        timeout: Duration,
        header: impl FnOnce(RequestId) -> H,
    ) -> Result<R, Error> {
        let (reply, _) = self.start_within(timeout, header, Vec::new())?.reply().await?;
        Ok(reply)
    }

    /// Sends the message that `header` makes of a new id, without waiting.
    pub(crate) fn start_plain<H: Header>(
        &self,
        header: impl FnOnce(RequestId) -> H,
        attachments: Vec<Bytes>,
    ) -> Result<Call, Error> {
        self.start_within(self.shared.timeout, header, attachments)
    }

    /// The time budget of a request that names none.
    pub(crate) fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    /// Waits; the client's thread has the timer.
    pub(crate) async fn pause(&self, pause: Duration) -> Result<(), Error> {
        let (done, over) = oneshot::channel();
        self.command(Command::Pause(pause, done))?;
        over.await.map_err(|_| Error::closed())
    }

    fn start_within<H: Header>(
        &self,
        timeout: Duration,
        header: impl FnOnce(RequestId) -> H,
        attachments: Vec<Bytes>,
    ) -> Result<Call, Error> {
        let id = self.shared.next_id();
        let ask = Ask::Plain(header::write(&header(id.clone())).into(), attachments);
        self.start(Start { id, ask, timeout })
    }

    fn start(&self, start: Start) -> Result<Call, Error> {
        let (answer, outcome) = oneshot::channel();
        let call = Call::new(Arc::clone(&self.shared), start.id.clone(), outcome);
        self.command(Command::Start(start, answer))?;
        Ok(call)
    }

    fn command(&self, command: Command) -> Result<(), Error> {
        self.shared.commands.send(command).map_err(|_| Error::closed())
    }
}

impl Shared {
    /// An id that no other request has.
    pub(crate) fn next_id(&self) -> RequestId {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}-{number}", self.nonce).parse().expect("letters, digits and a hyphen")
    }
}
