//! A closed loop: as soon as a reply comes, the next request goes out.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use futures::future::try_join_all;
use protocol::{Envelope, ErrorReply};
use tokio::time::timeout;
use transport::{Dealer, DealerEvent, Message};

use crate::{
    latency::Latencies,
    traffic::{Traffic, serial_of},
};

/// Silence after which a reply is taken for lost.
const SILENCE: Duration = Duration::from_secs(20);

/// A closed loop over several connections.
#[derive(Debug)]
pub(crate) struct ClosedLoop<'a> {
    /// What is sent.
    pub(crate) traffic: &'a Traffic,
    /// Requests under way, over all connections; at least one for each.
    pub(crate) in_flight: usize,
    /// How long new requests are sent.
    pub(crate) duration: Duration,
    /// Numbers the requests of a whole run, so that no two are alike.
    pub(crate) serials: &'a AtomicU32,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Round trips, from the call to send to the reply in hand.
    pub(crate) latencies: Latencies,
    /// From the first request to the last reply.
    pub(crate) elapsed: Duration,
}

impl ClosedLoop<'_> {
    /// Keeps the requests in flight and waits for the last reply.
    ///
    /// # Errors
    /// When a request is answered with an error or not at all.
    pub(crate) async fn run(&self, clients: &mut [Dealer]) -> anyhow::Result<Outcome> {
        let started = Instant::now();
        let count = clients.len();
        let depth = |index| self.in_flight / count + usize::from(index < self.in_flight % count);
        let drive = |(index, client)| self.drive(client, depth(index), started + self.duration);
        let tallies = try_join_all(clients.iter_mut().enumerate().map(drive)).await?;
        let mut outcome = Outcome { elapsed: started.elapsed(), ..Outcome::default() };
        for latencies in tallies {
            outcome.latencies.add(&latencies);
        }
        Ok(outcome)
    }

    /// One connection with `depth` requests under way.
    async fn drive(
        &self,
        client: &mut Dealer,
        depth: usize,
        until: Instant,
    ) -> anyhow::Result<Latencies> {
        let mut latencies = Latencies::default();
        let mut sent = BTreeMap::new();
        for _ in 0..depth {
            self.send(client, &mut sent)?;
        }
        while !sent.is_empty() {
            let event = timeout(SILENCE, client.recv()).await.context("replies are missing")?;
            let now = Instant::now();
            let serial = replied(event)?;
            // A reply to another request than those under way would be a defect of the broker.
            let at = sent.remove(&serial).context("a reply to no request came")?;
            latencies.record(now - at);
            if now < until {
                self.send(client, &mut sent)?;
            }
        }
        Ok(latencies)
    }

    fn send(&self, client: &Dealer, sent: &mut BTreeMap<u32, Instant>) -> anyhow::Result<()> {
        let serial = self.serials.fetch_add(1, Ordering::Relaxed);
        let message = Message::new(self.traffic.request(serial))?;
        sent.insert(serial, Instant::now());
        client.send(message)?;
        Ok(())
    }
}

/// The request that a reply is for.
fn replied(event: Option<DealerEvent>) -> anyhow::Result<u32> {
    let Some(DealerEvent::Message(message)) = event else { bail!("a connection was lost") };
    let envelope = Envelope::open(message.into_frames())?;
    if envelope.is::<ErrorReply>() {
        let error: ErrorReply = envelope.read()?;
        bail!("a request was answered with an error: {}: {}", error.code, error.message);
    }
    envelope.peek.id.as_ref().and_then(serial_of).context("a reply names no request")
}
