//! Clients under load: many SDK clients that ask at once, and check what they get.

mod lane;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use luna_client::Client;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    catalogue::Catalogue,
    ledger::Ledger,
    load::lane::{BUDGET, Lane},
    oracle::Oracle,
};

/// What all clients share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) catalogue: Arc<Catalogue>,
    pub(crate) oracle: Arc<Oracle>,
    pub(crate) ledger: Ledger,
    pub(crate) endpoint: String,
}

/// Clients that ask until they are told to stop.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Shared,
    stop: Arc<AtomicBool>,
    seats: Vec<Seat>,
    random: StdRng,
}

/// A place for one client after the other.
#[derive(Debug)]
struct Seat {
    client: Client,
    lanes: JoinSet<()>,
}

impl Load {
    /// Starts `clients` clients.
    ///
    /// # Errors
    /// When a client cannot be made.
    pub(crate) fn start(shared: Shared, clients: usize, seed: u64) -> Result<Self> {
        let (stop, random) = (Arc::default(), StdRng::seed_from_u64(seed));
        let mut load = Self { shared, stop, seats: Vec::new(), random };
        for number in 0..clients {
            let seat = load.seat(number)?;
            load.seats.push(seat);
        }
        Ok(load)
    }

    /// Some clients go at once, whatever they wait for, and others take their places.
    ///
    /// # Errors
    /// When a client cannot be made.
    pub(crate) async fn churn(&mut self, clients: usize) -> Result<()> {
        for _ in 0..clients {
            let number = self.random.random_range(0..self.seats.len());
            let seat = self.seat(number)?;
            let Seat { client, mut lanes } = std::mem::replace(&mut self.seats[number], seat);
            self.shared.ledger.unclaimed(client.unclaimed_replies().await?);
            self.burst(&client, number)?;
            drop(client);
            lanes.abort_all();
            while lanes.join_next().await.is_some() {}
        }
        Ok(())
    }

    /// Asks for something that the client will not wait for.
    fn burst(&mut self, client: &Client, number: usize) -> Result<()> {
        let Shared { catalogue, oracle, ledger, .. } = &self.shared;
        let mut tickets = Vec::new();
        for _ in 0..BURST {
            let entry = catalogue.pick(&mut self.random);
            let request = catalogue.request(entry, &oracle.adapters, BUDGET, None);
            tickets.push((ledger.open(number), client.start_encode(request)?));
        }
        Ok(())
    }

    /// Lets every client finish what it has asked for.
    ///
    /// # Errors
    /// When one does not come to an end.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for Seat { client, lanes } in &mut self.seats {
            while let Some(ended) = timeout(STOP, lanes.join_next()).await.context(ENDLESS)? {
                ended.context("a line of requests broke off")?;
            }
            self.shared.ledger.unclaimed(client.unclaimed_replies().await?);
        }
        Ok(())
    }

    fn seat(&mut self, number: usize) -> Result<Seat> {
        let client = Client::builder()
            .endpoint(&self.shared.endpoint)
            .connect_timeout(BUDGET)
            .timeout(UPLOAD_STEP)
            .build()
            .context("cannot make a client")?;
        let mut lanes = JoinSet::new();
        for _ in 0..LANES {
            let lane = Lane {
                shared: self.shared.clone(),
                client: client.clone(),
                number,
                stop: Arc::clone(&self.stop),
                random: StdRng::seed_from_u64(self.random.random()),
            };
            lanes.spawn(lane.run());
        }
        Ok(Seat { client, lanes })
    }
}

/// How long a line of requests may take to end: uploads, a request and a pause.
const STOP: Duration = Duration::from_mins(2);
const ENDLESS: &str = "a line of requests does not end";

/// Requests that a client has open at once, at most.
const LANES: usize = 3;

/// Requests that a client sends just before it goes.
const BURST: usize = 5;

/// Time for one step of an upload.
const UPLOAD_STEP: Duration = Duration::from_secs(20);
