//! One request under way, as its caller holds it. Dropping it cancels the request.

use std::sync::Arc;

use bytes::Bytes;
use protocol::{Envelope, ErrorReply, Header, RequestId};
use tokio::sync::oneshot;

use crate::{client::Shared, driver::Command, error::Error};

/// A request that was handed to the client's thread.
#[derive(Debug)]
pub(crate) struct Call {
    outcome: oneshot::Receiver<Result<Option<Envelope>, Error>>,
    guard: CancelOnDrop,
}

/// Tells the thread that nobody waits any more, unless the outcome came.
#[derive(Debug)]
struct CancelOnDrop {
    shared: Arc<Shared>,
    request: RequestId,
    is_finished: bool,
}

impl Call {
    /// The receiving side of a request that was just started.
    pub(crate) fn new(
        shared: Arc<Shared>,
        request: RequestId,
        outcome: oneshot::Receiver<Result<Option<Envelope>, Error>>,
    ) -> Self {
        Self { outcome, guard: CancelOnDrop { shared, request, is_finished: false } }
    }

    /// The id that the farm knows the request by.
    pub(crate) fn id(&self) -> &RequestId {
        &self.guard.request
    }

    /// Waits for the outcome: the terminal reply, or nothing when only a connection was asked for.
    pub(crate) async fn outcome(mut self) -> Result<Option<Envelope>, Error> {
        let outcome = (&mut self.outcome).await;
        self.guard.is_finished = true;
        outcome.unwrap_or_else(|_| Err(Error::closed()))
    }

    /// Waits for a reply of kind `R`, with its attachments.
    pub(crate) async fn reply<R: Header>(self) -> Result<(R, Vec<Bytes>), Error> {
        let Some(envelope) = self.outcome().await? else {
            return Err(Error::protocol("it has none"));
        };
        if envelope.is::<ErrorReply>() {
            let reply: ErrorReply = envelope.read().map_err(Error::protocol)?;
            return Err(reply.into());
        }
        if !envelope.is::<R>() {
            let (kind, expected) = (&envelope.peek.kind, R::KIND);
            return Err(Error::protocol(format!("its kind is `{kind}` instead of `{expected}`")));
        }
        let reply = envelope.read().map_err(Error::protocol)?;
        Ok((reply, envelope.attachments))
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if !self.is_finished {
            let (request, cancel) = (self.request.clone(), self.shared.next_id());
            // A thread that ended has nothing to cancel.
            let _ = self.shared.commands.send(Command::Cancel { request, cancel });
        }
    }
}
