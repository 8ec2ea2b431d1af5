//! The blob store on a thread of its own, so that the disk never delays an encode.

use std::{collections::BTreeMap, io, thread::JoinHandle};

use anyhow::{Context as _, bail};
use broker_core::{BlobCommand, BlobEvent, BlobName, BlobOp, BlobOutcome, Ticket};
use tokio::sync::mpsc;
use tracing::debug;

use super::{
    BlobStore, Step,
    aside::{Finished, Lanes, Task},
    error::OpError,
};

/// Events beside the one for each command that may wait for the loop.
const EXTRA_EVENTS: usize = 64;

/// The thread and the channels to and from it.
#[derive(Debug)]
pub(crate) struct StoreThread {
    inputs: mpsc::Sender<Input>,
    events: mpsc::Receiver<BlobEvent>,
    thread: JoinHandle<()>,
}

/// What the thread waits for.
#[derive(Debug)]
enum Input {
    Command(BlobCommand),
    Finished(Ticket, Finished),
    /// Nobody wants anything more, or a thread aside has died.
    End,
}

impl StoreThread {
    /// Starts the thread, which is given at most `commands_max` commands at once.
    pub(crate) fn spawn(store: BlobStore, commands_max: usize) -> io::Result<Self> {
        // Each command comes in once, and once more when it was done aside.
        let (inputs, accepted) = mpsc::channel(2 * commands_max + EXTRA_EVENTS);
        let (events, happened) = mpsc::channel(commands_max + EXTRA_EVENTS);
        let back = inputs.clone();
        let lanes = Lanes::spawn(&store.layout, move |done| {
            let input = done.map_or(Input::End, |(ticket, done)| Input::Finished(ticket, done));
            // At the end nobody wants to know any more.
            let _ = back.blocking_send(input);
        })?;
        let desk = Desk {
            store,
            lanes,
            aside: BTreeMap::new(),
            behind: BTreeMap::new(),
            in_trouble: false,
            events,
        };
        let thread = std::thread::Builder::new()
            .name("luna-store".to_owned())
            .spawn(move || desk.work(accepted))?;
        Ok(Self { inputs, events: happened, thread })
    }

    /// Hands over a command. Never waits: the core gives only so many at once.
    pub(crate) fn send(&self, command: BlobCommand) -> anyhow::Result<()> {
        let sent = self.inputs.try_send(Input::Command(command));
        sent.ok().context("the blob store's thread does not keep up")
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
        let Self { inputs, events, thread } = self;
        drop(events);
        // A thread that has ended already takes nothing more.
        let _ = inputs.try_send(Input::End);
        if thread.join().is_err() {
            tracing::error!("the blob store's thread has panicked");
        }
    }
}

/// What the thread has in hand.
struct Desk {
    store: BlobStore,
    lanes: Lanes,
    /// Commands that are done aside, and whether their success says that the disk works.
    aside: BTreeMap<Ticket, bool>,
    /// Commands that wait until a blob is verified.
    behind: BTreeMap<BlobName, Vec<BlobCommand>>,
    in_trouble: bool,
    events: mpsc::Sender<BlobEvent>,
}

/// The thread has nothing more to do: nobody listens, or a lane has died.
struct Over;

impl Desk {
    /// The thread: one command after the other, one event for each.
    fn work(mut self, mut inputs: mpsc::Receiver<Input>) {
        while let Some(input) = inputs.blocking_recv() {
            let go_on = match input {
                Input::Command(command) => self.start(command),
                Input::Finished(ticket, finished) => self.finish(ticket, finished),
                Input::End => Err(Over),
            };
            if go_on.is_err() {
                break;
            }
        }
        // The lanes have nobody to hand anything to, and must not wait for that.
        drop(inputs);
        self.lanes.close();
        self.store.close();
    }

    fn start(&mut self, command: BlobCommand) -> Result<(), Over> {
        let BlobCommand { ticket, op } = command;
        let proves = uses_disk(&op);
        let again = matches!(op, BlobOp::Read { .. }).then(|| op.clone());
        let mut happened = Vec::new();
        let step = self.store.start(op, &mut happened);
        self.tell(happened)?;
        match step {
            Step::Done(result) => self.done(ticket, proves, result),
            Step::Aside(task) => {
                self.aside.insert(ticket, proves);
                self.give(ticket, task)
            }
            Step::Behind(blob, task) => {
                let op = again.expect("only what reads a blob has it verified");
                self.behind.entry(blob).or_default().push(BlobCommand { ticket, op });
                task.map_or(Ok(()), |task| self.give(ticket, task))
            }
        }
    }

    fn finish(&mut self, ticket: Ticket, finished: Finished) -> Result<(), Over> {
        if let Finished::Verified { blob, found } = finished {
            let mut happened = Vec::new();
            let verified = self.store.verified(blob, found, &mut happened);
            self.tell(happened)?;
            let mut waiting = self.behind.remove(&blob).unwrap_or_default().into_iter();
            if let Err(error) = verified
                && let Some(first) = waiting.next()
            {
                self.done(first.ticket, true, Err(error))?;
            }
            return waiting.try_for_each(|command| self.start(command));
        }
        let result = self.store.finish(finished);
        let proves = self.aside.remove(&ticket).unwrap_or_default();
        self.done(ticket, proves, result)
    }

    fn give(&self, ticket: Ticket, task: Task) -> Result<(), Over> {
        self.lanes.give(ticket, task).map_err(|_| Over)
    }

    /// Tells how a command ended, and before that how the store is.
    fn done(
        &mut self,
        ticket: Ticket,
        proves: bool,
        result: Result<BlobOutcome, OpError>,
    ) -> Result<(), Over> {
        let health = health(&mut self.in_trouble, proves, &result);
        self.tell(health)?;
        let result = result.map_err(Into::into);
        self.tell([BlobEvent::Done { ticket, result }])
    }

    fn tell(&self, events: impl IntoIterator<Item = BlobEvent>) -> Result<(), Over> {
        let mut events = events.into_iter();
        events.try_for_each(|event| self.events.blocking_send(event).map_err(|_| Over))
    }
}

/// What the end of a command says about the store, if it is news.
fn health(
    in_trouble: &mut bool,
    proves: bool,
    result: &Result<BlobOutcome, OpError>,
) -> Option<BlobEvent> {
    let trouble = result.as_ref().err().and_then(OpError::trouble);
    if let Err(error) = result {
        debug!(%error, "a command to the blob store failed");
    }
    let is_news = trouble.is_some() || *in_trouble && proves && result.is_ok();
    is_news.then(|| {
        *in_trouble = trouble.is_some();
        BlobEvent::Health { trouble }
    })
}

/// Whether success says that the disk works. Opening an empty file works on a full disk, and
/// dropping an upload, which follows every failed step, cannot fail.
fn uses_disk(op: &BlobOp) -> bool {
    match op {
        BlobOp::Append { .. }
        | BlobOp::Commit { .. }
        | BlobOp::Read { .. }
        | BlobOp::Remember { .. } => true,
        BlobOp::Begin { .. }
        | BlobOp::Abort { .. }
        | BlobOp::Keep { .. }
        | BlobOp::DropParts { .. }
        | BlobOp::Delete { .. } => false,
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
        let begin =
            |name: &str| BlobOp::Begin { upload: name.parse().unwrap(), size: 1, part: None };
        let abort = BlobOp::Abort { upload: "u1".parse().unwrap() };
        let mut in_trouble = false;
        let mut healths = |op| {
            let proves = uses_disk(&op);
            let result = store.execute(op, &mut Vec::new());
            let news = health(&mut in_trouble, proves, &result);
            (result.is_ok(), news.iter().count())
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
