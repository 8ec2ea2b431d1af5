//! A place to put load on: what is measured, with workers behind it.
//!
//! There are three kinds. At all of them the same clients send the same frames and get the same
//! replies:
//!
//! * **direct**: one ROUTER that answers, and nothing between it and the clients. What a round trip
//!   takes here, sockets and threads of the load itself take;
//! * **broker**: a Luna broker with workers;
//! * **proxy**: a libzmq proxy with workers that answer whatever comes. It reads nothing, decides
//!   nothing and remembers nothing.

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use futures::future::try_join_all;
use protocol::{Envelope, ErrorReply, frames, header::Header as _, reply::StatusReply};
use serde_json::json;
use tokio::{sync::oneshot, time::sleep};
use transport::{
    Dealer, DealerConfig, DealerEvent, Endpoint, Message, Router, RouterConfig, RouterEvent,
};

use crate::{
    subject::Subject,
    traffic::Traffic,
    worker::{WorkerPlan, work},
};

/// Longest time for connections to stand and workers to be known.
const PATIENCE: Duration = Duration::from_secs(20);

/// What stands there, with everything that it needs to be put under load.
#[derive(Debug)]
pub(crate) struct Site {
    subject: Option<Subject>,
    front: Endpoint,
    backend: Backend,
}

/// Workers behind a broker.
#[derive(Debug, Clone)]
pub(crate) struct Workforce {
    /// How many.
    pub(crate) workers: usize,
    /// Requests that each takes at once.
    pub(crate) slots: u32,
    /// How long a worker works on a request.
    pub(crate) service: Duration,
}

/// A thread that serves what comes out at the back.
#[derive(Debug)]
struct Backend {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<anyhow::Result<()>>>,
}

impl Site {
    /// A ROUTER that answers by itself.
    pub(crate) fn direct(traffic: &Arc<Traffic>) -> anyhow::Result<Self> {
        let config = RouterConfig { thread_name: "bench-direct", ..RouterConfig::default() };
        let router = Router::bind(&"tcp://127.0.0.1:0".parse()?, config)?;
        let front = router.endpoint().clone();
        let backend = Backend::start(echo_router(router, Arc::clone(traffic)))?;
        Ok(Self { subject: None, front, backend })
    }

    /// A broker whose workers are known and ready.
    pub(crate) async fn broker(
        executable: &Path,
        workforce: &Workforce,
        traffic: &Arc<Traffic>,
    ) -> anyhow::Result<Self> {
        let subject = Subject::broker(executable)?;
        let plan = |number| WorkerPlan {
            name: format!("bench-{number}"),
            endpoint: subject.back.clone(),
            slots: workforce.slots,
            service: workforce.service,
            traffic: Arc::clone(traffic),
        };
        let plans: Vec<_> = (0..workforce.workers).map(plan).collect();
        let backend =
            Backend::start(
                async move { try_join_all(plans.into_iter().map(work)).await.map(drop) },
            )?;
        let mut site = Self { front: subject.front.clone(), subject: Some(subject), backend };
        site.wait_for_workers(workforce.workers).await?;
        Ok(site)
    }

    /// A libzmq proxy with as many workers.
    pub(crate) fn proxy(
        python: &Path,
        workers: usize,
        traffic: &Arc<Traffic>,
    ) -> anyhow::Result<Self> {
        let subject = Subject::proxy(python)?;
        let (back, traffic) = (subject.back.clone(), Arc::clone(traffic));
        let backend = Backend::start(async move {
            let echo = |_| echo_dealer(back.clone(), Arc::clone(&traffic));
            try_join_all((0..workers).map(echo)).await.map(drop)
        })?;
        Ok(Self { front: subject.front.clone(), subject: Some(subject), backend })
    }

    /// The process that is measured.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.subject.as_ref().map(Subject::pid)
    }

    /// What is measured, where that is worth telling.
    pub(crate) fn version(&self) -> Option<&str> {
        self.subject.as_ref().map(|subject| subject.version.as_str())
    }

    /// Fails if anything but the load has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.subject.as_mut().map_or(Ok(()), Subject::check)?;
        self.backend.check()
    }

    /// Connects `count` clients, each configured like this.
    pub(crate) async fn clients(
        &mut self,
        count: usize,
        config: &DealerConfig,
    ) -> anyhow::Result<Vec<Dealer>> {
        let connect = |_| Dealer::connect(&self.front, config.clone());
        let mut dealers: Vec<Dealer> = (0..count).map(connect).collect::<Result<_, _>>()?;
        let connected = async {
            for dealer in &mut dealers {
                let event = dealer.recv().await.context("a client's socket failed")?;
                ensure!(event == DealerEvent::Connected, "a client was disconnected at once");
            }
            anyhow::Ok(())
        };
        let connected = tokio::time::timeout(PATIENCE, connected).await;
        self.check()?;
        connected
            .with_context(|| format!("no {count} clients connected within {PATIENCE:?}"))??;
        Ok(dealers)
    }

    /// Asks the broker for its status until it serves with `count` workers.
    async fn wait_for_workers(&mut self, count: usize) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut clients = self.clients(1, &DealerConfig::default()).await?;
        while started.elapsed() < PATIENCE {
            let status = status(&mut clients[0]).await?;
            if status.ready && status.workers.len() == count {
                return Ok(());
            }
            self.check()?;
            sleep(Duration::from_millis(20)).await;
        }
        bail!("the broker did not know its {count} workers within {PATIENCE:?}")
    }
}

impl Backend {
    /// Runs `future` on a thread of its own until this is dropped.
    fn start(
        future: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = move || {
            runtime.block_on(async {
                tokio::select! {
                    result = future => result,
                    _ = stopped => Ok(()),
                }
            })
        };
        let thread = thread::Builder::new().name("bench-backend".to_owned()).spawn(body)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Fails with the reason if the thread has ended.
    fn check(&mut self) -> anyhow::Result<()> {
        let Some(thread) = self.thread.take_if(|thread| thread.is_finished()) else {
            return Ok(());
        };
        match thread.join() {
            Ok(result) => result.and_then(|()| bail!("the workers stopped")),
            Err(_) => bail!("the workers' thread panicked"),
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Whoever wanted to know of failures has checked.
            let _ = thread.join();
        }
    }
}

/// Answers whatever comes in at a ROUTER.
async fn echo_router(mut router: Router, traffic: Arc<Traffic>) -> anyhow::Result<()> {
    while let Some(event) = router.recv().await {
        let RouterEvent::Message { peer, message } = event else { continue };
        let Some(header) = message.frames().get(1) else { continue };
        let Some((header, attachments)) = traffic.reply(header) else { continue };
        router.send(&peer, Message::new(frames::frames_of(header, attachments))?)?;
    }
    bail!("the ROUTER's thread ended")
}

/// Answers whatever comes through a proxy: the client's routing id comes first and goes back first.
async fn echo_dealer(back: Endpoint, traffic: Arc<Traffic>) -> anyhow::Result<()> {
    let config = DealerConfig { thread_name: "bench-worker", ..DealerConfig::default() };
    let mut dealer = Dealer::connect(&back, config)?;
    while let Some(event) = dealer.recv().await {
        let DealerEvent::Message(message) = event else { continue };
        let [routing_id, _, header, ..] = message.frames() else { continue };
        let Some((header, attachments)) = traffic.reply(header) else { continue };
        let mut reply = frames::frames_of(header, attachments);
        reply.insert(0, routing_id.clone());
        dealer.send(Message::new(reply)?)?;
    }
    bail!("a worker's socket failed")
}

/// Asks a broker how it is.
async fn status(client: &mut Dealer) -> anyhow::Result<StatusReply> {
    let question = rmp_serde::to_vec_named(&json!({ "kind": "status", "id": "status" }))?;
    client.send(Message::new(frames::frames_of(question.into(), Vec::new()))?)?;
    match client.recv().await {
        Some(DealerEvent::Message(message)) => {
            let envelope = Envelope::open(message.into_frames())?;
            if envelope.is::<ErrorReply>() {
                let error: ErrorReply = envelope.read()?;
                bail!("the broker answered {}: {}", error.code, error.message);
            }
            ensure!(envelope.peek.kind == StatusReply::KIND, "not an answer to `status`");
            Ok(envelope.read()?)
        }
        Some(DealerEvent::Connected | DealerEvent::Disconnected) | None => {
            bail!("the broker closed the connection")
        }
    }
}
