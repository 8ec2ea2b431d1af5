//! The state machine itself: what comes in, what goes out, and how an answer is sent.
//!
//! What happens with each kind of event is in the files below: [`clients`], [`encodes`], [`farm`],
//! [`models`], [`store`], [`uploading`] and [`fetches`]; how answers are shared, what faults lead
//! to and how routing is explained in [`answering`], [`faults`], [`suspects`] and [`explain`]; what
//! operators want, and adapters that come before requests, in [`draining`] and [`warming`].

mod answering;
mod clients;
mod draining;
mod encodes;
mod explain;
mod farm;
mod faults;
mod fetches;
mod models;
mod store;
mod suspects;
mod uploading;
mod warming;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use protocol::{Failure, Header, frames, reply::Counters};

use crate::{
    answers::Answers,
    blob::BlobEvent,
    blobs::BlobIndex,
    command::{Command, Notice},
    config::{Config, Limits},
    cost::CostModel,
    deaths::Deaths,
    drains::Drains,
    heat::Heat,
    in_flight::InFlight,
    isolation::Isolation,
    jobs::Jobs,
    model_files::ModelFiles,
    outliers::Outliers,
    peer::{ClientPeer, WorkerPeer},
    prefetches::PrefetchTable,
    queue::Queue,
    registrations::Registrations,
    requests::{ReplyTo, Requests},
    residency::ResidencyTable,
    retries::RetryBudget,
    routing::RoutingTable,
    strikes::Strikes,
    tasks::Tasks,
    uploads::Uploads,
    warms::Warms,
    workers::Workers,
};

/// The broker.
///
/// Its methods are of four kinds:
///
/// * A. [`is_idle`](Self::is_idle) and [`is_draining`](Self::is_draining) tell how it is;
/// * B. `handle_*` take in what happened;
/// * C. [`drain`](Self::drain) and [`give_up`](Self::give_up) change what it is up to;
/// * D. `poll_*` say what is to be done.
///
/// Drive it so: after every call of kind B or C, take [`poll_command`](Self::poll_command) until it
/// is empty, then ask [`poll_timeout`](Self::poll_timeout) when to call
/// [`handle_timeout`](Self::handle_timeout). `now` never goes back.
#[derive(Debug)]
pub struct Broker {
    pub(crate) config: Config,
    pub(crate) started: Instant,
    /// Whether the time in which the farm comes together is over.
    pub(crate) settled: bool,
    pub(crate) draining: Option<String>,
    /// Whether it drains because the process ends.
    pub(crate) stopping: bool,
    pub(crate) requests: Requests,
    pub(crate) tasks: Tasks,
    pub(crate) queue: Queue,
    pub(crate) in_flight: InFlight,
    pub(crate) workers: Workers,
    pub(crate) residency: ResidencyTable,
    pub(crate) routes: RoutingTable,
    pub(crate) costs: CostModel,
    pub(crate) answers: Answers,
    pub(crate) strikes: Strikes,
    pub(crate) deaths: Deaths,
    pub(crate) isolation: Isolation,
    pub(crate) outliers: Outliers,
    pub(crate) retries: RetryBudget,
    pub(crate) blobs: BlobIndex,
    pub(crate) model_files: ModelFiles,
    pub(crate) registrations: Registrations,
    pub(crate) blob_trouble: Option<String>,
    pub(crate) jobs: Jobs,
    pub(crate) uploads: Uploads,
    pub(crate) heat: Heat,
    pub(crate) prefetches: PrefetchTable,
    pub(crate) warms: Warms,
    pub(crate) drains: Drains,
    pub(crate) counters: Counters,
    commands: VecDeque<Command>,
}

impl Broker {
    /// A broker that starts `now`. Ids of dispatches, questions and uploads are derived from
    /// `seed`, which must be another one for every process, so that what is left of an earlier broker is not
    /// taken for this one's.
    pub fn new(config: Config, seed: u64, now: Instant) -> Self {
        let limits = config.limits();
        Self {
            started: now,
            settled: false,
            draining: None,
            stopping: false,
            requests: Requests::default(),
            tasks: Tasks::default(),
            queue: Queue::default(),
            in_flight: InFlight::new(seed),
            workers: Workers::default(),
            residency: ResidencyTable::default(),
            routes: RoutingTable::new(seed),
            costs: CostModel::default(),
            answers: Answers::new(limits.answers_bytes_max, limits.answers_age_max),
            strikes: Strikes::new(limits.losses_max, limits.quarantine),
            deaths: Deaths::default(),
            isolation: Isolation::default(),
            outliers: Outliers::default(),
            retries: RetryBudget::new(now),
            blobs: BlobIndex::default(),
            model_files: ModelFiles::default(),
            registrations: Registrations::new(seed),
            blob_trouble: None,
            jobs: Jobs::new(limits.store_commands_max),
            uploads: Uploads::new(seed),
            heat: Heat::default(),
            prefetches: PrefetchTable::default(),
            warms: Warms::default(),
            drains: Drains::default(),
            counters: Counters::default(),
            commands: VecDeque::new(),
            config,
        }
    }

    /// Whether nobody waits for anything.
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0
            && self.registrations.is_idle()
            && self.warms.is_empty()
            && self.jobs.is_empty()
            && self.commands.is_empty()
    }

    /// Whether [`drain`](Self::drain) was called.
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Takes in a message of a client.
    pub fn handle_client(&mut self, peer: ClientPeer, frames: Vec<Bytes>, now: Instant) {
        self.client_message(peer, frames, now);
        self.hand_out();
    }

    /// Takes in that a client is disconnected: nobody waits for its answers.
    pub fn handle_client_gone(&mut self, peer: ClientPeer, now: Instant) {
        self.client_gone(peer, now);
        self.hand_out();
    }

    /// Takes in a message of a worker.
    pub fn handle_worker(&mut self, peer: WorkerPeer, frames: Vec<Bytes>, now: Instant) {
        self.worker_message(peer, frames, now);
        self.tend_prefetches(now);
        self.hand_out();
    }

    /// Takes in that a worker is disconnected.
    pub fn handle_worker_gone(&mut self, peer: WorkerPeer, now: Instant) {
        self.worker_gone(peer, now);
        self.tend_prefetches(now);
        self.hand_out();
    }

    /// Takes in what happened in the blob store.
    pub fn handle_blob(&mut self, event: BlobEvent, now: Instant) {
        self.blob_event(event, now);
        self.hand_out();
    }

    /// Takes in that time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire_requests(now);
        self.lose_silent_workers(now);
        self.tend_prefetches(now);
        self.answer_warms(now);
        self.expire_registrations(now);
        self.expire_uploads(now);
        self.answers.forget_old(now);
        self.probe_outliers(now);
        self.settle(now);
        self.dispatch(now);
        self.hand_out();
    }

    /// Takes no new encodes and uploads from now on; what was accepted is finished.
    pub fn drain(&mut self, reason: impl Into<String>) {
        self.draining = Some(reason.into());
        self.stopping = true;
        self.answer_all_warms();
    }

    /// Answers everything that is left: the process ends now, and clients may try again.
    pub fn give_up(&mut self, reason: &str) {
        self.answer_rest(reason);
        self.hand_out();
    }

    /// The next thing to do.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout), unless something else happens before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let limits = self.limits();
        let times = [
            self.requests.next_deadline(),
            self.workers.next_silence(limits.worker_silence),
            self.registrations.next_timeout(),
            self.uploads.next_idle(limits.upload_idle),
            self.jobs.next_give_up(),
            self.answers.next_expiry(),
            self.outliers.next_due(),
            self.warms.next_deadline(),
            (!self.settled).then(|| self.settles_at()),
        ];
        times.into_iter().flatten().min()
    }

    pub(crate) fn limits(&self) -> &Limits {
        self.config.limits()
    }

    /// When the farm has come together: after the grace period of the start, or a little after the
    /// first worker announced itself.
    fn settles_at(&self) -> Instant {
        let Limits { startup_grace, startup_settle, .. } = *self.limits();
        let grace = self.started + startup_grace;
        self.workers.first_ready().map_or(grace, |first| grace.min(first + startup_settle))
    }

    fn settle(&mut self, now: Instant) {
        if !self.settled && self.settles_at() <= now {
            self.settled = true;
            self.refuse_hopeless();
        }
    }

    /// Goes on with whoever waits for adapters that are being fetched, if any fetch has ended.
    fn tend_prefetches(&mut self, now: Instant) {
        if self.prefetches.take_changed() {
            self.answer_warms(now);
            self.release_drained();
        }
    }

    fn reply<H: Header>(&mut self, to: &ReplyTo, header: &H) {
        self.reply_frames(to, frames::frames(header, Vec::new()));
    }

    fn reply_frames(&mut self, to: &ReplyTo, frames: Vec<Bytes>) {
        let frames = frames::delimit(frames, to.delimited);
        self.commands.push_back(Command::SendClient { to: to.client, frames });
    }

    fn fail(&mut self, to: &ReplyTo, failure: Failure) {
        self.reply(to, &failure.into_reply(Some(to.id.clone())));
    }

    fn tell<H: Header>(&mut self, worker: WorkerPeer, header: &H) {
        let frames = frames::frames(header, Vec::new());
        self.commands.push_back(Command::SendWorker { to: worker, frames });
    }

    fn notice(&mut self, notice: Notice) {
        self.commands.push_back(Command::Notice(notice));
    }

    /// Gives the blob store as many of the waiting commands as it takes.
    fn hand_out(&mut self) {
        while let Some(command) = self.jobs.hand_out() {
            self.commands.push_back(Command::Blob(command));
        }
    }
}

/// A span since the start, as routing counts time.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A duration as the wire has it.
fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
