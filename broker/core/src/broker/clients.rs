//! Messages of clients: reading them, and the requests that are answered at once.

use std::time::Instant;

use bytes::Bytes;
use protocol::{
    AdapterId, Envelope, ErrorCode, Failure, Header, InvalidFrames, InvalidHeader, frames, limits,
    reply::{CancelReply, EvictLoraReply, HasLoraReply},
    request::{
        Cancel, ClipEncode, Drain, EvictLora, Explain, HasLora, Heartbeat, ListLoras, ListModels,
        RegisterModel, Status, UploadLora, Warm,
    },
    worker::Evict,
};

use crate::{
    Broker,
    blob::{BlobName, BlobOp},
    command::Command,
    jobs::Purpose,
    peer::{ClientPeer, WorkerPeer},
    requests::ReplyTo,
};

impl Broker {
    pub(super) fn client_message(&mut self, peer: ClientPeer, frames: Vec<Bytes>, now: Instant) {
        let delimited = frames::is_delimited(&frames);
        let envelope = match Envelope::open(frames) {
            Ok(envelope) => envelope,
            Err(error) => return self.refuse(peer, delimited, invalid_frames(&error)),
        };
        if envelope.is::<Heartbeat>() {
            return self.answer_heartbeat(peer, delimited);
        }
        let Some(id) = envelope.peek.id.clone() else {
            return self.refuse(peer, delimited, without_id(&envelope.peek.kind));
        };
        let from = ReplyTo { client: peer, id, delimited };
        if self.is_pending(&from) {
            return; // The request that uses this id already is answered, and once.
        }
        if let Err(failure) = self.client_request(&from, &envelope, now) {
            self.fail(&from, failure);
        }
    }

    pub(super) fn client_gone(&mut self, peer: ClientPeer, now: Instant) {
        for key in self.requests.of_client(peer) {
            self.withdraw(key);
        }
        self.jobs.forget_client(peer);
        self.registrations.forget_client(peer);
        self.warms.forget_client(peer);
        self.leave_uploads(peer, now);
        self.dispatch(now);
    }

    fn client_request(
        &mut self,
        from: &ReplyTo,
        envelope: &Envelope,
        now: Instant,
    ) -> Result<(), Failure> {
        match envelope.peek.kind.as_str() {
            ClipEncode::KIND => self.encode(from, envelope, now)?,
            UploadLora::KIND => self.upload(from, envelope, now)?,
            HasLora::KIND => self.has_lora(from, &read(envelope)?)?,
            EvictLora::KIND => self.evict_lora(from, read(envelope)?, now)?,
            Cancel::KIND => self.cancel(from, &read(envelope)?, now),
            ListLoras::KIND => self.reply(from, &self.loras(from.id.clone())),
            RegisterModel::KIND => self.register_model(from, envelope, now)?,
            ListModels::KIND => self.reply(from, &self.models(from.id.clone())),
            Status::KIND => self.reply(from, &self.status(from.id.clone(), now)),
            Warm::KIND => self.warm(from, read(envelope)?, now)?,
            Drain::KIND => self.drain_on_order(from, read(envelope)?, now)?,
            Explain::KIND => self.explain(from, &read(envelope)?, now)?,
            kind => return Err(unknown_kind(kind)),
        }
        Ok(())
    }

    /// Whether the client waits for the answer to another request of this id.
    fn is_pending(&self, from: &ReplyTo) -> bool {
        self.requests.find(from.client, &from.id).is_some()
            || self.jobs.is_awaited(from.client, &from.id)
            || self.registrations.is_awaited(from.client, &from.id)
            || self.warms.is_awaited(from.client, &from.id)
    }

    fn refuse(&mut self, to: ClientPeer, delimited: bool, failure: Failure) {
        let frames = frames::frames(&failure.into_reply(None), Vec::new());
        let frames = frames::delimit(frames, delimited);
        self.commands.push_back(Command::SendClient { to, frames });
    }

    fn answer_heartbeat(&mut self, to: ClientPeer, delimited: bool) {
        let frames = frames::delimit(frames::frames(&Heartbeat {}, Vec::new()), delimited);
        self.commands.push_back(Command::SendClient { to, frames });
    }

    fn has_lora(&mut self, from: &ReplyTo, request: &HasLora) -> Result<(), Failure> {
        check_adapters(&request.adapters)?;
        let (present, missing): (Vec<_>, Vec<_>) =
            request.adapters.iter().partition(|adapter| self.is_known(adapter));
        for adapter in &present {
            self.blobs.touch(adapter);
        }
        self.reply(from, &HasLoraReply { id: from.id.clone(), present, missing });
        Ok(())
    }

    fn evict_lora(
        &mut self,
        from: &ReplyTo,
        request: EvictLora,
        now: Instant,
    ) -> Result<(), Failure> {
        check_adapters(&request.adapters)?;
        self.check_store_room()?;
        let (evicted, unknown): (Vec<_>, Vec<_>) =
            request.adapters.into_iter().partition(|adapter| self.is_known(adapter));
        self.evict_from_workers(&evicted);
        let reply = EvictLoraReply { id: from.id.clone(), evicted, unknown };
        if request.delete {
            self.answers.forget_adapters(&reply.evicted);
        }
        let taken: Vec<_> = if request.delete {
            reply.evicted.iter().filter_map(|adapter| self.blobs.remove(adapter)).collect()
        } else {
            Vec::new()
        };
        if taken.is_empty() {
            self.reply(from, &reply);
        } else {
            let blobs = taken.iter().map(|blob| BlobName::Adapter(blob.adapter)).collect();
            let purpose = Purpose::Delete { reply: Some(reply), taken };
            self.give_job(BlobOp::Delete { blobs }, purpose, Some(from.clone()), now);
        }
        Ok(())
    }

    /// Tells every worker which of `adapters` to let go, wherever it has them or is fetching them to.
    fn evict_from_workers(&mut self, adapters: &[AdapterId]) {
        let peers: Vec<WorkerPeer> = self.workers.iter().map(|(peer, _)| peer).collect();
        for peer in peers {
            let holds = |adapter: &&AdapterId| {
                self.residency.holds(peer, adapter)
                    || self.prefetches.fetchers(adapter).any(|fetcher| fetcher == peer)
            };
            let held: Vec<_> = adapters.iter().filter(holds).copied().collect();
            if !held.is_empty() {
                self.tell(peer, &Evict { adapters: held });
            }
        }
    }

    fn cancel(&mut self, from: &ReplyTo, request: &Cancel, now: Instant) {
        let key = self.requests.find(from.client, &request.request);
        let encode = key.and_then(|key| self.withdraw(key)).map(|encode| encode.reply_to);
        if encode.is_some() {
            self.counters.failed += 1;
        }
        let cancelled =
            encode.or_else(|| self.registrations.withdraw(from.client, &request.request));
        if let Some(to) = &cancelled {
            let message = format!("the client cancelled request `{}`", request.request);
            self.fail(to, Failure::new(ErrorCode::Cancelled, message));
        }
        self.reply(from, &CancelReply { id: from.id.clone(), cancelled: cancelled.is_some() });
        self.dispatch(now);
    }

    /// Whether the farm holds this adapter.
    pub(super) fn is_known(&self, adapter: &AdapterId) -> bool {
        self.blobs.contains(adapter) || self.residency.is_held(adapter)
    }
}

/// The fields of a request, or the answer to one that has others.
pub(super) fn read<H: Header>(envelope: &Envelope) -> Result<H, Failure> {
    envelope.read().map_err(|error| Failure::new(ErrorCode::InvalidRequest, error.to_string()))
}

pub(super) fn check_adapters(adapters: &[AdapterId]) -> Result<(), Failure> {
    if adapters.len() > limits::ADAPTERS_MAX {
        let message = format!(
            "`adapters` has {} entries: at most {} are accepted",
            adapters.len(),
            limits::ADAPTERS_MAX
        );
        return Err(Failure::new(ErrorCode::TooLarge, message));
    }
    Ok(())
}

fn invalid_frames(error: &InvalidFrames) -> Failure {
    let code = match error {
        InvalidFrames::TooMany(_) | InvalidFrames::Header(InvalidHeader::TooLarge { .. }) => {
            ErrorCode::TooLarge
        }
        InvalidFrames::Shape(_) | InvalidFrames::Header(_) => ErrorCode::InvalidRequest,
    };
    Failure::new(code, error.to_string())
}

fn without_id(kind: &str) -> Failure {
    if protocol::request::REQUEST_KINDS.contains(&kind) {
        let message = format!("the `{kind}` request has no `id`: choose one for every request");
        return Failure::new(ErrorCode::InvalidRequest, message);
    }
    unknown_kind(kind)
}

fn unknown_kind(kind: &str) -> Failure {
    let known = protocol::request::REQUEST_KINDS.join("`, `");
    let message = format!("unknown kind of request `{kind:.80}`: expected one of `{known}`");
    Failure::new(ErrorCode::Unsupported, message)
}
