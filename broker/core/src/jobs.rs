//! Commands that the blob store has not answered yet, and who waits for the answers.
//!
//! The store is given a bounded number of commands at once, the rest waits here in order. So the
//! channel to it never fills up and the broker never waits for the disk.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Instant,
};

use protocol::{RequestId, UploadId, reply::EvictLoraReply};

use crate::{
    blob::{BlobCommand, BlobName, BlobOp, PartName, StoredBlob, StoredModelFile, Ticket},
    peer::{ClientPeer, WorkerPeer},
    requests::ReplyTo,
};

/// Why a command was given, and who is told how it ended.
#[derive(Debug)]
pub(crate) enum Purpose {
    Begin {
        upload: UploadId,
    },
    Append {
        upload: UploadId,
        bytes: usize,
        received: u64,
    },
    Commit {
        upload: UploadId,
    },
    Abort {
        received: u64,
    },
    /// What came of a file is kept, and counted as such already.
    Keep {
        part: PartName,
        received: u64,
    },
    DropParts,
    /// The adapters were taken out of the index already; they go back in if it fails.
    Delete {
        reply: Option<EvictLoraReply>,
        taken: Vec<StoredBlob>,
    },
    /// The same with files of models, which only make room for others.
    DeleteModelFiles {
        taken: Vec<StoredModelFile>,
    },
    /// What is registered is kept for the next start.
    Remember,
    Fetch {
        worker: WorkerPeer,
        blob: BlobName,
        offset: u64,
    },
}

/// One command on its way.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) purpose: Purpose,
    /// The client that waits, unless it left or gave up.
    pub(crate) reply_to: Option<ReplyTo>,
    /// When the client is told that the store does not answer.
    pub(crate) give_up: Instant,
}

/// Jobs by ticket, and the commands that were not handed out yet.
#[derive(Debug)]
pub(crate) struct Jobs {
    open: BTreeMap<Ticket, Job>,
    waiting: VecDeque<BlobCommand>,
    handed_out: usize,
    handed_out_max: usize,
    append_bytes: usize,
    next: u64,
}

impl Jobs {
    pub(crate) fn new(handed_out_max: usize) -> Self {
        Self {
            open: BTreeMap::new(),
            waiting: VecDeque::new(),
            handed_out: 0,
            handed_out_max,
            append_bytes: 0,
            next: 0,
        }
    }

    /// Adds a command at the end.
    pub(crate) fn add(&mut self, op: BlobOp, job: Job) {
        if let Purpose::Append { bytes, .. } = job.purpose {
            self.append_bytes += bytes;
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.open.insert(ticket, job);
        self.waiting.push_back(BlobCommand { ticket, op });
    }

    /// The next command for the store, if it has room for one.
    pub(crate) fn hand_out(&mut self) -> Option<BlobCommand> {
        if self.handed_out == self.handed_out_max {
            return None;
        }
        let command = self.waiting.pop_front()?;
        self.handed_out += 1;
        Some(command)
    }

    /// Closes the job that the store answered.
    pub(crate) fn finish(&mut self, ticket: Ticket) -> Option<Job> {
        let job = self.open.remove(&ticket)?;
        self.handed_out -= 1;
        if let Purpose::Append { bytes, .. } = job.purpose {
            self.append_bytes -= bytes;
        }
        Some(job)
    }

    /// Whether a client waits for the answer to `id`.
    pub(crate) fn is_awaited(&self, client: ClientPeer, id: &RequestId) -> bool {
        let awaits = |to: &ReplyTo| to.is(client, id);
        self.open.values().any(|job| job.reply_to.as_ref().is_some_and(awaits))
    }

    /// A client left: nobody waits for its answers.
    pub(crate) fn forget_client(&mut self, client: ClientPeer) {
        for job in self.open.values_mut() {
            job.reply_to.take_if(|to| to.client == client);
        }
    }

    /// Every client that waits; they do not wait any more.
    pub(crate) fn let_go(&mut self) -> Vec<ReplyTo> {
        self.open.values_mut().filter_map(|job| job.reply_to.take()).collect()
    }

    /// The clients that have waited too long; they do not wait any more. With the upload that the
    /// job was a step of.
    pub(crate) fn given_up(&mut self, now: Instant) -> Vec<(ReplyTo, Option<UploadId>)> {
        let mut given_up = Vec::new();
        for job in self.open.values_mut().filter(|job| job.give_up <= now) {
            if let Some(to) = job.reply_to.take() {
                given_up.push((to, job.purpose.upload().cloned()));
            }
        }
        given_up
    }

    /// When the next client has waited too long.
    pub(crate) fn next_give_up(&self) -> Option<Instant> {
        let awaited = self.open.values().filter(|job| job.reply_to.is_some());
        awaited.map(|job| job.give_up).min()
    }

    /// Bytes of chunks that are not written yet.
    pub(crate) fn append_bytes(&self) -> usize {
        self.append_bytes
    }

    /// Fetches of `worker` that are not answered yet.
    pub(crate) fn fetches(&self, worker: WorkerPeer) -> usize {
        let mine =
            |job: &&Job| matches!(job.purpose, Purpose::Fetch { worker: w, .. } if w == worker);
        self.open.values().filter(mine).count()
    }

    /// What workers are fetching now.
    pub(crate) fn fetched(&self) -> BTreeSet<BlobName> {
        let fetches = self.open.values().filter_map(|job| {
            if let Purpose::Fetch { blob, .. } = job.purpose { Some(blob) } else { None }
        });
        fetches.collect()
    }

    /// Commands that clients gave rise to, whether or not they still wait for the answers: what a
    /// client no longer waits for is still to be done.
    pub(crate) fn of_clients(&self) -> usize {
        self.open.values().filter(|job| !matches!(job.purpose, Purpose::Fetch { .. })).count()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

impl Purpose {
    /// The open upload that the job is a step of.
    pub(crate) fn upload(&self) -> Option<&UploadId> {
        match self {
            Self::Begin { upload } | Self::Append { upload, .. } | Self::Commit { upload } => {
                Some(upload)
            }
            Self::Abort { .. }
            | Self::Keep { .. }
            | Self::DropParts
            | Self::Delete { .. }
            | Self::DeleteModelFiles { .. }
            | Self::Remember
            | Self::Fetch { .. } => None,
        }
    }
}
