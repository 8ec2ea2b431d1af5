//! The farm that is hurt: one supervised broker and several supervised workers.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use luna_client::{Client, StatusReply};
use luna_e2e::{Cluster, ClusterPlan, Launcher, models};
use tokio::time::{Instant, sleep};

use crate::{
    plan::{Blow, Target},
    supervisor::Supervisor,
    timeline::{Incident, Timeline},
};

/// Running processes. They end with [`Farm::end`].
#[derive(Debug)]
pub(crate) struct Farm {
    launcher: Launcher,
    timeline: Arc<Timeline>,
    broker: Supervisor,
    workers: Vec<Supervisor>,
}

impl Farm {
    /// Starts a farm with its files in `directory`; it is ready soon, see [`Farm::ready`].
    pub(crate) fn start(directory: &Path, workers: usize) -> Self {
        let launcher = plan()
            .worker_flags(&cache_flags(directory).each_ref().map(String::as_str))
            .launcher(directory);
        let timeline = Arc::new(Timeline::default());
        let supervise = |target| Supervisor::spawn(target, launcher.clone(), Arc::clone(&timeline));
        let broker = supervise(Target::Broker);
        let workers = (0..workers).map(|number| supervise(Target::Worker(number))).collect();
        Self { launcher, timeline, broker, workers }
    }

    /// Where clients connect.
    pub(crate) fn endpoint(&self) -> &str {
        self.launcher.endpoint()
    }

    /// Hurts a process.
    pub(crate) fn strike(&self, target: Target, blow: Blow) {
        match target {
            Target::Broker => self.broker.strike(blow),
            Target::Worker(number) => self.workers[number].strike(blow),
        }
    }

    /// A client with patience.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn client(&self) -> Result<Client> {
        let client = Client::builder().endpoint(self.endpoint()).connect_timeout(PATIENCE);
        client.build().context("cannot make a client")
    }

    /// Waits until all workers serve and nothing is under way.
    ///
    /// # Errors
    /// With the last status, when that takes too long.
    pub(crate) async fn ready(&self) -> Result<()> {
        let client = self.client()?;
        let end = Instant::now() + PATIENCE;
        loop {
            let status = client.status().await.context("the broker does not say how it is")?;
            if self.is_whole_and_idle(&status) {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("after {PATIENCE:?} not all workers serve or requests are left: {status:?}");
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn is_whole_and_idle(&self, status: &StatusReply) -> bool {
        let all = status.workers.len() == self.workers.len();
        status.ready && all && status.queued == 0 && status.in_flight == 0
    }

    /// What the broker has logged so far.
    pub(crate) fn broker_log(&self) -> String {
        std::fs::read_to_string(self.launcher.broker_log()).unwrap_or_default()
    }

    /// What each process has logged so far.
    pub(crate) fn logs(&self) -> Vec<(Target, String)> {
        let workers = (0..self.workers.len()).map(|number| {
            let log = std::fs::read_to_string(self.launcher.worker_log(number));
            (Target::Worker(number), log.unwrap_or_default())
        });
        std::iter::once((Target::Broker, self.broker_log())).chain(workers).collect()
    }

    /// Ends all processes with SIGTERM, workers first. Returns what happened to them, and a
    /// sentence for each that did not end.
    pub(crate) fn end(self) -> (Vec<Incident>, Vec<String>) {
        let supervisors = self.workers.into_iter().chain([self.broker]);
        let failures = supervisors.filter_map(|supervisor| supervisor.end().err()).collect();
        (self.timeline.incidents(), failures)
    }
}

/// Starts a quiet farm of one worker of the same kind as the others.
pub(crate) async fn quiet_farm() -> Cluster {
    plan().start().await
}

/// What all workers have in common: whoever answers, the bits are the same.
fn plan() -> ClusterPlan {
    Cluster::new()
        .model(&models::tiny_sd15())
        .model(&models::tiny_sdxl())
        .broker_flags(&["--log-format", "json", "--grace", GRACE])
        .worker_flags(&["--log-format", "json", "--grace", GRACE])
        .worker_flags(&["--execution-mode", "functional", "--lanes", "2"])
        // Less than all adapters need, so that they come and go.
        .worker_flags(&["--adapter-budget-mb", "1", "--merged-budget-mb", "1"])
}

/// Every worker keeps adapters on disk, so that a kill can come while one is written.
fn cache_flags(directory: &Path) -> [String; 4] {
    let cache = directory.join("{worker}.cache").display().to_string();
    ["--cache".to_owned(), cache, "--disk-budget-mb".to_owned(), "1".to_owned()]
}

/// Longest time for the farm to get ready.
const PATIENCE: Duration = Duration::from_mins(1);

/// For the processes' own end; shorter than whoever ends them waits.
const GRACE: &str = "5s";
