//! Workers that compute nothing: they answer at once, or after a fixed time.
//!
//! Towards the broker they are workers like any other: announced, with heartbeats that list what
//! they hold, and one `done` for every `work`.

use std::{collections::VecDeque, future::pending, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use protocol::{Envelope, frames, header::Header as _, worker};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use transport::{Dealer, DealerConfig, DealerEvent, Endpoint, Message};

use crate::traffic::{MODEL, Traffic, digest};

/// How often a worker shows that it lives.
const ALIVE: Duration = Duration::from_millis(500);

/// What a worker is.
#[derive(Debug, Clone)]
pub(crate) struct WorkerPlan {
    /// Its name.
    pub(crate) name: String,
    /// The broker's endpoint for workers.
    pub(crate) endpoint: Endpoint,
    /// Requests that it takes at once; it works on one at a time.
    pub(crate) slots: u32,
    /// How long it works on one.
    pub(crate) service: Duration,
    /// What it answers.
    pub(crate) traffic: Arc<Traffic>,
}

/// A running worker.
#[derive(Debug)]
struct Worker {
    plan: WorkerPlan,
    dealer: Dealer,
    epoch: u64,
    /// What it holds, in the order of arrival: the dispatch, and the client's header.
    held: VecDeque<(u64, Bytes)>,
    /// When the first of them is done.
    done_at: Instant,
}

/// The header of an answer.
#[derive(Debug, Serialize)]
struct Done {
    kind: &'static str,
    epoch: u64,
    dispatch: u64,
}

/// Works until the future is dropped.
///
/// # Errors
/// When the socket fails or the broker says what no broker says.
pub(crate) async fn work(plan: WorkerPlan) -> anyhow::Result<()> {
    let config = DealerConfig { thread_name: "bench-worker", ..DealerConfig::default() };
    let dealer = Dealer::connect(&plan.endpoint, config)?;
    let (held, done_at) = (VecDeque::new(), Instant::now());
    Worker { plan, dealer, epoch: rand::random(), held, done_at }.run().await
}

impl Worker {
    async fn run(mut self) -> anyhow::Result<()> {
        let mut alive = interval(ALIVE);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let done = async {
                if self.held.is_empty() { pending().await } else { sleep_until(self.done_at).await }
            };
            tokio::select! {
                () = done => self.finish_first(),
                event = self.dealer.recv() => match event.context("a worker's socket failed")? {
                    DealerEvent::Connected => self.say(&self.ready(), Vec::new()),
                    DealerEvent::Disconnected => self.held.clear(),
                    DealerEvent::Message(message) => self.hear(message)?,
                },
                _ = alive.tick() => self.say(&self.alive(), Vec::new()),
            }
        }
    }

    fn hear(&mut self, message: Message) -> anyhow::Result<()> {
        let mut envelope = Envelope::open(message.into_frames())?;
        match envelope.peek.kind.as_str() {
            worker::Work::KIND => {
                let work: worker::Work = envelope.read()?;
                if envelope.attachments.is_empty() {
                    bail!("`work` came without the client's header");
                }
                self.begin(work.dispatch, envelope.attachments.swap_remove(0));
            }
            worker::CancelWork::KIND => {
                let cancelled: worker::CancelWork = envelope.read()?;
                self.cancel(cancelled.dispatch);
            }
            worker::Announce::KIND => self.say(&self.ready(), Vec::new()),
            _ => {}
        }
        Ok(())
    }

    fn begin(&mut self, dispatch: u64, request: Bytes) {
        if self.plan.service.is_zero() {
            return self.answer(dispatch, &request);
        }
        if self.held.is_empty() {
            self.done_at = Instant::now() + self.plan.service;
        }
        self.held.push_back((dispatch, request));
    }

    /// Forgets a request; the one in work is worked on to its end, as a real forward pass is.
    fn cancel(&mut self, dispatch: u64) {
        let in_work = self.held.front().map(|(first, _)| *first);
        self.held.retain(|(held, _)| *held != dispatch || Some(*held) == in_work);
    }

    fn finish_first(&mut self) {
        if let Some((dispatch, request)) = self.held.pop_front() {
            self.answer(dispatch, &request);
        }
        self.done_at = Instant::now() + self.plan.service;
    }

    fn answer(&self, dispatch: u64, request: &[u8]) {
        let Some((header, attachments)) = self.plan.traffic.reply(request) else { return };
        let done = Done { kind: worker::Done::KIND, epoch: self.epoch, dispatch };
        let mut answer = Vec::with_capacity(1 + attachments.len());
        answer.push(header);
        answer.extend(attachments);
        self.say(&done, answer);
    }

    /// Says something; what cannot be said while there is no connection is said at the next one.
    fn say(&self, header: &impl Serialize, attachments: Vec<Bytes>) {
        let header =
            rmp_serde::to_vec_named(header).expect("headers can be written as MessagePack");
        let frames = frames::frames_of(header.into(), attachments);
        let _ = self.dealer.send(Message::new(frames).expect("there are frames"));
    }

    fn ready(&self) -> Value {
        json!({
            "kind": "ready",
            "worker": self.plan.name,
            "epoch": self.epoch,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "device": "bench",
            "slots": self.plan.slots,
            "models": [{
                "name": MODEL,
                "digest": digest(),
                "family": "sd15",
                "weights_dtype": "float16",
                "bytes": 0,
                "chunk_tokens": { "clip_l": 77 },
            }],
            "revision": 1,
            "inventory": { "device": [], "host": [], "disk": [], "models": [MODEL] },
            "in_flight": self.in_flight(),
            "draining": false,
        })
    }

    fn alive(&self) -> Value {
        json!({
            "kind": "alive",
            "epoch": self.epoch,
            "revision": 1,
            "in_flight": self.in_flight(),
            "draining": false,
        })
    }

    fn in_flight(&self) -> Vec<u64> {
        self.held.iter().map(|(dispatch, _)| *dispatch).collect()
    }
}
