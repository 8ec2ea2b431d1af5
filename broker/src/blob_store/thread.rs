//! The blob store on a thread of its own, so that the disk never delays an encode.

use std::{io, thread::JoinHandle};

use anyhow::{Context as _, bail};
use broker_core::{BlobCommand, BlobEvent, BlobOp, BlobOutcome};
use tokio::sync::mpsc;
use tracing::debug;

use super::{BlobStore, error::OpError};

/// Events beside the one for each command that may wait for the loop.
const EXTRA_EVENTS: usize = 64;

/// The thread and the channels to and from it.
#[derive(Debug)]
pub(crate) struct StoreThread {
    commands: mpsc::Sender<BlobCommand>,
    events: mpsc::Receiver<BlobEvent>,
    thread: JoinHandle<()>,
}

impl StoreThread {
    /// Starts the thread, which is given at most `commands_max` commands at once.
    pub(crate) fn spawn(store: BlobStore, commands_max: usize) -> io::Result<Self> {
        let (commands, accepted) = mpsc::channel(commands_max);
        let (sender, events) = mpsc::channel(commands_max + EXTRA_EVENTS);
        let thread = std::thread::Builder::new()
            .name("luna-store".to_owned())
            .spawn(move || work(store, accepted, &sender))?;
        Ok(Self { commands, events, thread })
    }

    /// Hands over a command. Never waits: the core gives only so many at once.
    pub(crate) fn send(&self, command: BlobCommand) -> anyhow::Result<()> {
        self.commands.try_send(command).ok().context("the blob store's thread does not keep up")
    }

    /// The next event. Cancel safe.
    pub(crate) async fn recv(&mut self) -> anyhow::Result<BlobEvent> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None => bail!("the blob store's thread has ended"),
        }
    }

    /// Ends the thread once it has done what it was given.
    pub(crate) fn close(self) {
        let Self { commands, events, thread } = self;
        drop((commands, events));
        if thread.join().is_err() {
            tracing::error!("the blob store's thread has panicked");
        }
    }
}

/// The thread: one command after the other, one event for each.
fn work(
    mut store: BlobStore,
    mut commands: mpsc::Receiver<BlobCommand>,
    events: &mpsc::Sender<BlobEvent>,
) {
    let mut in_trouble = false;
    while let Some(BlobCommand { ticket, op }) = commands.blocking_recv() {
        let (result, happened) = execute(&mut store, op, &mut in_trouble);
        let result = result.map_err(Into::into);
        for event in happened.into_iter().chain([BlobEvent::Done { ticket, result }]) {
            if events.blocking_send(event).is_err() {
                return; // The loop has ended, and nobody wants to know any more.
            }
        }
    }
}

/// Does one thing; returns its outcome, and the events beside it.
fn execute(
    store: &mut BlobStore,
    op: BlobOp,
    in_trouble: &mut bool,
) -> (Result<BlobOutcome, OpError>, Vec<BlobEvent>) {
    let mut happened = Vec::new();
    let proves = uses_disk(&op);
    let result = store.execute(op, &mut happened);
    let trouble = result.as_ref().err().and_then(OpError::trouble);
    if let Err(error) = &result {
        debug!(%error, "a command to the blob store failed");
    }
    if trouble.is_some() || *in_trouble && proves && result.is_ok() {
        *in_trouble = trouble.is_some();
        happened.push(BlobEvent::Health { trouble });
    }
    (result, happened)
}

/// Whether success says that the disk works. Opening an empty file works on a full disk, and
/// dropping an upload, which follows every failed step, cannot fail.
fn uses_disk(op: &BlobOp) -> bool {
    match op {
        BlobOp::Append { .. }
        | BlobOp::Commit { .. }
        | BlobOp::Read { .. }
        | BlobOp::Remember { .. } => true,
        BlobOp::Begin { .. } | BlobOp::Abort { .. } | BlobOp::Delete { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn trouble_lasts_until_the_disk_has_worked_again() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = BlobStore::open(directory.path()).unwrap();
        let uploads = directory.path().join("uploads");
        let begin = |name: &str| BlobOp::Begin { upload: name.parse().unwrap(), size: 1 };
        let abort = BlobOp::Abort { upload: "u1".parse().unwrap() };
        let mut in_trouble = false;
        let mut healths = |op| {
            let (result, events) = execute(&mut store, op, &mut in_trouble);
            let is_health = |event: &&BlobEvent| matches!(event, BlobEvent::Health { .. });
            (result.is_ok(), events.iter().filter(is_health).count())
        };

        fs::remove_dir(&uploads).unwrap();
        assert_eq!(healths(begin("u1")), (false, 1));
        assert_eq!(healths(abort), (true, 0), "dropping an upload proves nothing");
        fs::create_dir(&uploads).unwrap();
        assert_eq!(healths(begin("u2")), (true, 0), "an empty file proves nothing");
        let bytes = bytes::Bytes::from_static(b"x");
        let append = BlobOp::Append { upload: "u2".parse().unwrap(), bytes };
        assert_eq!(healths(append.clone()), (true, 1));
        assert_eq!(healths(append), (true, 0));
    }
}
