//! What the broker is told: who this worker is, what it holds, what it needs, and answers.

use bytes::Bytes;
use protocol::{
    ErrorCode, ErrorReply, Failure, Header, RequestId, frames, header, limits,
    worker::{Alive, Done, Fetch, Inventory, Ready},
};
use transport::{DealerSendErrorKind, Message};
use worker_core::{ChunkRequest, DispatchId};

use super::{Identity, Service};
use crate::{engine::Reply, journal::Journal};

/// An inventory of more adapters than this is told with the next heartbeat, not at once.
const AT_ONCE_MAX: usize = 256;

impl Service {
    pub(super) fn send_ready(&mut self) {
        let Identity { worker, epoch, device, .. } = self.identity.clone();
        // One more than there are lanes, so that none of them ever waits for the network.
        let slots = u32::try_from(self.executor.lanes() + 1).unwrap_or(u32::MAX);
        let ready = Ready {
            worker,
            epoch,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device,
            slots,
            models: self.catalogue.infos(),
            revision: self.scheduler.revision(),
            inventory: self.inventory(),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            draining: self.draining,
            died_with: self.journal.as_ref().map(Journal::deaths).unwrap_or_default(),
        };
        self.announced_revision = Some(ready.revision);
        self.digest = Some((ready.revision, ready.inventory.digest()));
        self.send(&ready, Vec::new());
    }

    pub(super) fn send_alive(&mut self) {
        let revision = self.scheduler.revision();
        let changed = self.announced_revision != Some(revision);
        let alive = Alive {
            epoch: self.identity.epoch,
            revision,
            inventory: changed.then(|| self.inventory()),
            resident_digest: Some(self.resident_digest()),
            in_flight: self.scheduler.in_flight().map(|dispatch| dispatch.0).collect(),
            prefetching: self.scheduler.prefetching().collect(),
            draining: self.draining,
            drain_reason: self.drain.reason.clone(),
        };
        if self.send(&alive, Vec::new()) {
            self.announced_revision = Some(revision);
        }
    }

    /// Routing by residency is only as good as the news: a change is told at once, unless telling
    /// is a burden.
    pub(super) fn announce_change(&mut self) {
        let revision = self.scheduler.revision();
        if self.announced_revision.is_some_and(|told| told != revision)
            && self.scheduler.registry().len() <= AT_ONCE_MAX
        {
            self.send_alive();
        }
    }

    /// What this worker holds, the nearest and most recently used first where there is a limit.
    fn inventory(&self) -> Inventory {
        let registry = self.scheduler.registry();
        let most = limits::INVENTORY_ADAPTERS_MAX;
        let device: Vec<_> = registry.on_device().take(most).collect();
        let host: Vec<_> = registry.on_host().take(most - device.len()).collect();
        let disk = registry.on_disk().take(most - device.len() - host.len()).collect();
        let models = self.scheduler.models().loaded().cloned().collect();
        Inventory { device, host, disk, models }
    }

    /// Tells what this worker holds in one number.
    fn resident_digest(&mut self) -> u64 {
        let revision = self.scheduler.revision();
        match self.digest {
            Some((of, digest)) if of == revision => digest,
            _ => {
                let digest = self.inventory().digest();
                self.digest = Some((revision, digest));
                digest
            }
        }
    }

    pub(super) fn send_fetch(&self, chunk: ChunkRequest) {
        let ChunkRequest { blob, offset, length } = chunk;
        self.send(&Fetch { blob, offset, length }, Vec::new());
    }

    pub(super) fn send_failure(
        &self,
        dispatch: DispatchId,
        id: Option<RequestId>,
        failure: Failure,
    ) {
        let code = failure.code;
        let reply: ErrorReply = failure.into_reply(id.clone());
        let header = Bytes::from(header::write(&reply));
        let Some(id) = id else {
            self.send(&self.failed(dispatch, code), vec![header]);
            return;
        };
        self.send_done(&self.failed(dispatch, code), id, vec![header]);
    }

    pub(super) fn send_reply(&self, dispatch: DispatchId, id: RequestId, reply: Reply) {
        let Reply { times, header, attachments } = reply;
        let done = Done {
            epoch: self.identity.epoch,
            dispatch: dispatch.0,
            failed: None,
            compute_ms: Some(times.compute_ms),
            load_ms: Some(times.load_ms),
        };
        self.send_done(&done, id, std::iter::once(header).chain(attachments).collect());
    }

    /// Sends a reply; one too large for the wire becomes an error of that kind. One that is not
    /// taken for another reason is computed again: the broker misses it in the next heartbeat.
    fn send_done(&self, done: &Done, id: RequestId, frames: Vec<Bytes>) {
        let sent = self.try_send(done, frames);
        if let Err(DealerSendErrorKind::TooLarge { bytes, max }) = sent {
            let message = format!(
                "the reply has {bytes} bytes, at most {max} can be sent: ask for fewer prompts or chunks at once"
            );
            let reply = Failure::new(ErrorCode::TooLarge, message).into_reply(Some(id));
            let header = Bytes::from(header::write(&reply));
            self.send(&Done { failed: Some(ErrorCode::TooLarge), ..done.clone() }, vec![header]);
        }
    }

    fn failed(&self, dispatch: DispatchId, code: ErrorCode) -> Done {
        let (epoch, dispatch) = (self.identity.epoch, dispatch.0);
        Done { epoch, dispatch, failed: Some(code), ..Done::default() }
    }

    /// Sends to the broker; says whether the socket took it. What is not taken while the broker is
    /// away needs no keeping: after the reconnect clients ask again and `ready` tells the rest.
    pub(super) fn send<H: Header>(&self, message: &H, attachments: Vec<Bytes>) -> bool {
        self.try_send(message, attachments).is_ok()
    }

    fn try_send<H: Header>(
        &self,
        message: &H,
        attachments: Vec<Bytes>,
    ) -> Result<(), DealerSendErrorKind> {
        let frames = frames::frames(message, attachments);
        let message = Message::new(frames).expect("a message has magic and header");
        self.broker.send(message).map_err(|error| {
            tracing::debug!(kind = H::KIND, %error, "not sent");
            error.kind
        })
    }
}
