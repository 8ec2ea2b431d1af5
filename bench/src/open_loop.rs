//! An open loop: requests go out when they are due, whatever has become of earlier ones.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use futures::future::try_join_all;
use protocol::{Envelope, ErrorCode, ErrorReply};
use tokio::time::timeout_at;
use transport::{Dealer, DealerEvent, DealerReceiver, DealerSendErrorKind, DealerSender, Message};

use crate::{
    latency::Latencies,
    schedule::{Arrival, Schedule},
    traffic::{Traffic, serial_of},
};

/// Time from the call to the first request, for the pacing thread to start.
const LEAD: Duration = Duration::from_millis(20);

/// Load with a schedule: one connection for each of its streams.
#[derive(Debug)]
pub(crate) struct OpenLoop {
    /// When what is due.
    pub(crate) schedule: Schedule,
    /// What is sent.
    pub(crate) traffic: Arc<Traffic>,
    /// A good reply comes within this time of when it was due. The load waits as long for the last.
    pub(crate) budget: Duration,
    /// The part of the schedule, at its begin, that is not counted.
    pub(crate) warm_up: Duration,
    /// The length of the whole schedule.
    pub(crate) duration: Duration,
}

/// What became of the requests of one stream that were due after the warm-up.
#[derive(Debug, Default)]
pub(crate) struct StreamTally {
    /// Requests that were due.
    pub(crate) offered: u64,
    /// Good replies.
    pub(crate) good: Latencies,
    /// Good replies that came between the end of the warm-up and the end of the schedule, also to
    /// requests that were due before.
    pub(crate) good_in_window: u64,
    /// Replies that came after the budget.
    pub(crate) late: u64,
    /// Requests that were answered `overloaded`.
    pub(crate) rejected: Latencies,
    /// What `retry_after_ms` said then, and how often.
    pub(crate) retry_after_ms: BTreeMap<u32, u64>,
    /// Requests that were answered with another error.
    pub(crate) failed: BTreeMap<String, u64>,
    /// Requests that could not be sent, because the broker did not read.
    pub(crate) unsent: u64,
    /// Requests that were not answered at all.
    pub(crate) lost: u64,
}

/// What became of all of them.
#[derive(Debug)]
pub(crate) struct OpenOutcome {
    /// One for each stream.
    pub(crate) streams: Vec<StreamTally>,
    /// How much later than due requests were sent.
    pub(crate) lateness: Latencies,
}

/// What the pacing thread has to say.
struct Paced {
    lateness: Latencies,
    unsent: Vec<u64>,
}

impl OpenLoop {
    /// Sends everything when it is due and waits for the replies.
    ///
    /// # Errors
    /// When a connection is lost, or something comes that is no reply.
    pub(crate) async fn run(
        self,
        clients: Vec<Dealer>,
        serials: &AtomicU32,
    ) -> anyhow::Result<OpenOutcome> {
        let count = u32::try_from(self.schedule.arrivals().len())?;
        let first = serials.fetch_add(count, Ordering::Relaxed);
        let start = Instant::now() + LEAD;
        let (senders, receivers): (Vec<_>, Vec<_>) = clients.into_iter().map(Dealer::split).unzip();
        let load = Arc::new(self);
        let pacing = {
            let load = Arc::clone(&load);
            let body = move || load.pace(&senders, first, start);
            thread::Builder::new().name("bench-pacer".to_owned()).spawn(body)?
        };
        let collect = |(stream, receiver)| load.collect(stream, receiver, first, start);
        let mut streams = try_join_all(receivers.into_iter().enumerate().map(collect)).await?;
        let Ok(paced) = pacing.join() else { bail!("the pacing thread panicked") };
        let Paced { lateness, unsent } = paced?;
        for (stream, unsent) in streams.iter_mut().zip(unsent) {
            stream.unsent = unsent;
            stream.lost = stream.lost.saturating_sub(unsent);
        }
        Ok(OpenOutcome { streams, lateness })
    }

    /// Sends each request when it is due.
    fn pace(&self, senders: &[DealerSender], first: u32, start: Instant) -> anyhow::Result<Paced> {
        let mut paced = Paced { lateness: Latencies::default(), unsent: vec![0; senders.len()] };
        for (serial, arrival) in (first..).zip(self.schedule.arrivals()) {
            let message = Message::new(self.traffic.request(serial))?;
            let due = start + arrival.due;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            paced.lateness.record(due.elapsed());
            match senders[arrival.stream].send(message) {
                Ok(()) => {}
                Err(error) if error.kind == DealerSendErrorKind::Full => {
                    paced.unsent[arrival.stream] += u64::from(arrival.due >= self.warm_up);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(paced)
    }

    /// Takes the replies of one stream until all are there or the last one's time is over.
    async fn collect(
        &self,
        stream: usize,
        mut receiver: DealerReceiver,
        first: u32,
        start: Instant,
    ) -> anyhow::Result<StreamTally> {
        let arrivals = self.schedule.arrivals();
        let is_ours = |arrival: &&Arrival| arrival.stream == stream;
        let mut waiting = arrivals.iter().filter(is_ours).count();
        let is_counted = |arrival: &&Arrival| arrival.due >= self.warm_up;
        let offered = arrivals.iter().filter(is_ours).filter(is_counted).count();
        let mut tally = StreamTally { offered: offered as u64, ..StreamTally::default() };
        let end = start + self.duration + self.budget;
        while waiting > 0 {
            let Ok(event) = timeout_at(end.into(), receiver.recv()).await else { break };
            let now = Instant::now();
            let envelope = match event.context("a client's socket failed")? {
                DealerEvent::Message(message) => Envelope::open(message.into_frames())?,
                DealerEvent::Connected | DealerEvent::Disconnected => {
                    bail!("a client was disconnected")
                }
            };
            let serial = envelope.peek.id.as_ref().and_then(serial_of);
            let index = serial.and_then(|serial| serial.checked_sub(first));
            let arrival = index.and_then(|index| arrivals.get(index as usize));
            let arrival = arrival.context("a reply to no request came")?;
            ensure!(arrival.stream == stream, "a reply went to another client");
            waiting -= 1;
            self.count(&mut tally, &envelope, now - start, arrival.due)?;
        }
        let seen = tally.good.count() + tally.late + tally.rejected.count();
        tally.lost = tally.offered - seen - tally.failed.values().sum::<u64>();
        receiver.close().await;
        Ok(tally)
    }

    /// Counts a reply that came at `at`; both times since the start.
    fn count(
        &self,
        tally: &mut StreamTally,
        envelope: &Envelope,
        at: Duration,
        due: Duration,
    ) -> anyhow::Result<()> {
        let latency = at.saturating_sub(due);
        let is_counted = due >= self.warm_up;
        if !envelope.is::<ErrorReply>() {
            let is_good = latency <= self.budget;
            let in_window = (self.warm_up..self.duration).contains(&at);
            tally.good_in_window += u64::from(is_good && in_window);
            if is_counted && is_good {
                tally.good.record(latency);
            } else if is_counted {
                tally.late += 1;
            }
            return Ok(());
        }
        if !is_counted {
            return Ok(());
        }
        let error: ErrorReply = envelope.read()?;
        if error.code == ErrorCode::Overloaded {
            tally.rejected.record(latency);
            *tally.retry_after_ms.entry(error.retry_after_ms.unwrap_or(0)).or_default() += 1;
        } else {
            *tally.failed.entry(error.code.to_string()).or_default() += 1;
        }
        Ok(())
    }
}
