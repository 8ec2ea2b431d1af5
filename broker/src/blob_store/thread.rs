//! The blob store on a thread of its own, so that the disk never delays an encode.

use std::{io, thread::JoinHandle};

use anyhow::{Context as _, bail};
use broker_core::{BlobCommand, BlobEvent};
use tokio::sync::mpsc;
use tracing::debug;

use super::BlobStore;

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
        let mut happened = Vec::new();
        let result = store.execute(op, &mut happened);
        let trouble = result.as_ref().err().and_then(super::OpError::trouble);
        if let Err(error) = &result {
            debug!(%error, "a command to the blob store failed");
        }
        if trouble.is_some() || in_trouble && result.is_ok() {
            in_trouble = trouble.is_some();
            happened.push(BlobEvent::Health { trouble });
        }
        let result = result.map_err(Into::into);
        for event in happened.into_iter().chain([BlobEvent::Done { ticket, result }]) {
            if events.blocking_send(event).is_err() {
                return; // The loop has ended, and nobody wants to know any more.
            }
        }
    }
}
