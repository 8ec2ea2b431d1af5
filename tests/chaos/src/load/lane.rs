//! One line of requests, each begun when the one before it has ended.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use luna_client::{Client, Encoding, Error, PendingEncode};
use rand::{RngExt as _, rngs::StdRng};
use tokio::time::{sleep, timeout};

use crate::{ledger::Ticket, load::Shared};

/// One line of requests.
pub(crate) struct Lane {
    pub(crate) shared: Shared,
    pub(crate) client: Client,
    /// The client's place.
    pub(crate) number: usize,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) random: StdRng,
}

/// How a client treats one request.
#[derive(Debug, Clone, Copy)]
enum Manner {
    /// It gives enough time and waits.
    Innocent,
    /// It gives this little time.
    Hurried(Duration),
    /// It gives enough time, and gives up after this.
    Fickle(Duration),
}

impl Lane {
    /// Asks until it is told to stop.
    pub(crate) async fn run(mut self) {
        let mut uploaded = BTreeSet::new();
        while !self.stop.load(Ordering::Relaxed) {
            sleep(self.pause()).await;
            let entry = self.shared.catalogue.pick(&mut self.random);
            if self.upload(entry, &mut uploaded).await {
                self.ask(entry).await;
            }
        }
    }

    /// Uploads the LoRAs of an entry that were not there from the start. Says whether all are there.
    async fn upload(&self, entry: usize, uploaded: &mut BTreeSet<usize>) -> bool {
        let Shared { catalogue, ledger, .. } = &self.shared;
        for number in catalogue.loras_of(entry) {
            let lora = &catalogue.loras[number];
            if !lora.is_late || uploaded.contains(&number) {
                continue;
            }
            let result = self.client.upload_lora(&lora.path, |_| {}).await;
            ledger.upload(result.as_ref().err());
            if result.is_err() {
                return false;
            }
            uploaded.insert(number);
        }
        true
    }

    async fn ask(&mut self, entry: usize) {
        let manner = self.manner();
        let budget = if let Manner::Hurried(budget) = manner { budget } else { BUDGET };
        let Shared { catalogue, oracle, ledger, .. } = &self.shared;
        let request = catalogue.request(entry, &oracle.adapters, budget, Some(&mut self.random));
        let ticket = ledger.open(self.number);
        let is_innocent = !matches!(manner, Manner::Hurried(_));
        let pending = match self.client.start_encode(request) {
            Ok(pending) => pending,
            Err(error) => return ticket.failed(&error, is_innocent),
        };
        let outcome = match manner {
            Manner::Innocent | Manner::Hurried(_) => within(pending, budget + SLACK).await,
            Manner::Fickle(patience) => match timeout(patience, pending.outcome()).await {
                Ok(outcome) => Ok(outcome),
                Err(_) => return ticket.cancelled(),
            },
        };
        match outcome {
            Ok(outcome) => {
                self.close(ticket, entry, &outcome, is_innocent);
                self.wait_as_told(&outcome).await;
            }
            Err(what) => ticket.lost(format!("client {}, entry {entry}: {what}", self.number)),
        }
    }

    fn close(
        &self,
        ticket: Ticket,
        entry: usize,
        outcome: &Result<Encoding, Error>,
        is_innocent: bool,
    ) {
        match outcome {
            Ok(encoding) => match self.shared.oracle.check(entry, encoding) {
                Ok(()) => ticket.answered(),
                Err(how) => ticket.wrong(how),
            },
            Err(error) => ticket.failed(error, is_innocent),
        }
    }

    /// A farm that is full says when to come again.
    async fn wait_as_told(&self, outcome: &Result<Encoding, Error>) {
        if let Some(pause) = outcome.as_ref().err().and_then(Error::retry_after) {
            sleep(pause.min(RETRY_PAUSE_MAX)).await;
        }
    }

    fn manner(&mut self) -> Manner {
        match self.random.random_range(0..20) {
            0 => Manner::Hurried(Duration::from_millis(self.random.random_range(1..60))),
            1 | 2 => Manner::Fickle(Duration::from_millis(self.random.random_range(0..30))),
            _ => Manner::Innocent,
        }
    }

    fn pause(&mut self) -> Duration {
        Duration::from_millis(self.random.random_range(PAUSE_MS))
    }
}

/// Waits for the outcome; nothing after `end` is a request that was lost.
async fn within(pending: PendingEncode, end: Duration) -> Result<Result<Encoding, Error>, String> {
    let id = pending.id().clone();
    let late = |_| format!("request `{id}` has no outcome after {end:?}");
    timeout(end, pending.outcome()).await.map_err(late)
}

/// Enough for an answer in spite of any fault of the plan, on a busy machine.
pub(crate) const BUDGET: Duration = Duration::from_secs(20);

/// After its budget a request has ended within the client's grace; the rest is for the machine.
const SLACK: Duration = Duration::from_secs(2);

/// Between an answer and the next request.
const PAUSE_MS: std::ops::Range<u64> = 0..150;

const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);
