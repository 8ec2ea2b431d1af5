//! What clients cost that are connected and ask for nothing.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures::future::join_all;
use protocol::{frames, request};
use serde::Serialize;
use tokio::time::sleep;
use transport::{Dealer, DealerConfig, Heartbeat, Message};

use crate::{
    proc_stat::{cpu_time, resident_bytes},
    site::{Site, Workforce},
    traffic::Traffic,
};

/// How often an idle client of the SDK sends a heartbeat.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// How long the broker is watched.
const WATCH: Duration = Duration::from_secs(3);

/// Idle clients and what the broker spends on them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IdleReport {
    /// Connected clients, each with a heartbeat every half second.
    pub clients: usize,
    /// How long it took until all of them were connected and answered, in milliseconds.
    pub connect_ms: f64,
    /// Resident memory of the broker without them.
    pub resident_bytes_before: u64,
    /// Resident memory of the broker with them.
    pub resident_bytes: u64,
    /// CPU time of the broker, as a share of one core.
    pub cpu_share: f64,
}

/// Connects `count` clients to a fresh broker and watches it.
pub(crate) async fn measure(executable: &Path, count: usize) -> anyhow::Result<IdleReport> {
    let workforce = Workforce { workers: 2, slots: 1, service: Duration::ZERO };
    let traffic = Arc::new(Traffic::new(0, 64)?);
    let mut site = Site::broker(executable, &workforce, &traffic).await?;
    let pid = site.pid().context("a broker is a process")?;
    let resident_bytes_before = resident_bytes(pid)?;

    let started = Instant::now();
    let mut clients = site.clients(count, &config()).await?;
    for client in &clients {
        client.send(Message::new(heartbeat())?)?;
    }
    for client in &mut clients {
        client.recv().await.context("an idle client's socket failed")?;
    }
    let connect_ms = started.elapsed().as_secs_f64() * 1e3;

    // Every client has sent heartbeats before anything is measured.
    sleep(2 * HEARTBEAT).await;
    let (watched, cpu) = (Instant::now(), cpu_time(pid)?);
    sleep(WATCH).await;
    let spent = cpu_time(pid)?.saturating_sub(cpu);
    let cpu_share = spent.as_secs_f64() / watched.elapsed().as_secs_f64();
    let resident_bytes = resident_bytes(pid)?;
    site.check()?;
    join_all(clients.into_iter().map(Dealer::close)).await;
    Ok(IdleReport { clients: count, connect_ms, resident_bytes_before, resident_bytes, cpu_share })
}

fn config() -> DealerConfig {
    let message = Message::new(heartbeat()).expect("there are frames");
    DealerConfig {
        thread_name: "bench-idle",
        heartbeat: Some(Heartbeat { message, interval: HEARTBEAT }),
        connect_timeout: Duration::from_secs(10),
        ..DealerConfig::default()
    }
}

fn heartbeat() -> Vec<Bytes> {
    frames::frames(&request::Heartbeat {}, Vec::new())
}
