//! A farm on this machine: a broker and workers as child processes, started again when they die.

use std::time::{Duration, Instant};

use anyhow::bail;
use process::exit;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::child::{LogLine, Process, Program};

/// The first pause before a process is started again; it doubles with every quick death.
const PAUSE_FIRST: Duration = Duration::from_millis(200);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// A process that ran for this long has earned a short pause again.
const STEADY: Duration = Duration::from_secs(30);

/// The processes of a farm.
#[derive(Debug, Clone)]
pub(crate) struct FarmPlan {
    pub(crate) broker: Program,
    pub(crate) workers: Vec<Program>,
    /// How long each of them may take to drain.
    pub(crate) grace: Duration,
}

/// A running farm. Dropping it ends its processes, because their standard inputs close.
#[derive(Debug)]
pub(crate) struct Farm {
    broker: Supervised,
    workers: Vec<Supervised>,
    failures: mpsc::Receiver<String>,
}

/// A process that is kept running.
#[derive(Debug)]
struct Supervised {
    stop: watch::Sender<Stop>,
    task: JoinHandle<()>,
}

/// How a process is wanted to end; only ever sterner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    No,
    Drain,
    Kill,
}

impl Farm {
    /// Starts every process. Their log lines go to `logs`.
    pub(crate) fn start(plan: &FarmPlan, logs: &mpsc::Sender<LogLine>) -> Self {
        let (failed, failures) = mpsc::channel(1 + plan.workers.len());
        let supervise = |program: &Program| {
            let (stop, stopped) = watch::channel(Stop::No);
            let supervisor = Supervisor {
                program: program.clone(),
                logs: logs.clone(),
                stopped,
                failed: failed.clone(),
                grace: plan.grace,
            };
            Supervised { stop, task: tokio::spawn(supervisor.run()) }
        };
        let broker = supervise(&plan.broker);
        let workers = plan.workers.iter().map(supervise).collect();
        Self { broker, workers, failures }
    }

    /// Waits until a process has failed for good, and says why.
    pub(crate) async fn failed(&mut self) -> String {
        match self.failures.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Drains the workers, then the broker; what is left when `hurry` resolves is killed.
    pub(crate) async fn stop(self, hurry: impl Future<Output = ()>) {
        let all = self.workers.iter().chain([&self.broker]);
        let stops: Vec<_> = all.map(|process| process.stop.clone()).collect();
        let drained = self.drain();
        tokio::pin!(drained);
        tokio::select! {
            () = &mut drained => return,
            () = hurry => {}
        }
        for stop in &stops {
            ask(stop, Stop::Kill);
        }
        drained.await;
    }

    async fn drain(self) {
        for worker in &self.workers {
            ask(&worker.stop, Stop::Drain);
        }
        for worker in self.workers {
            // A supervisor that panicked has dropped its process, which ends it.
            let _ = worker.task.await;
        }
        ask(&self.broker.stop, Stop::Drain);
        let _ = self.broker.task.await;
    }
}

fn ask(stop: &watch::Sender<Stop>, how: Stop) {
    stop.send_modify(|asked| *asked = how.max(*asked));
}

/// Keeps one process running.
struct Supervisor {
    program: Program,
    logs: mpsc::Sender<LogLine>,
    stopped: watch::Receiver<Stop>,
    failed: mpsc::Sender<String>,
    grace: Duration,
}

impl Supervisor {
    async fn run(mut self) {
        let mut pause = PAUSE_FIRST;
        loop {
            let started = Instant::now();
            match self.run_once().await {
                Ok(Ended::Stopped) => return,
                Ok(Ended::Died(how)) => {
                    if started.elapsed() >= STEADY {
                        pause = PAUSE_FIRST;
                    }
                    self.log(format!("{how}, starting it again in {} ms", pause.as_millis())).await;
                }
                Err(error) => {
                    // Nobody listens once the farm is being dropped.
                    let _ = self.failed.send(format!("{error:#}")).await;
                    return;
                }
            }
            tokio::select! {
                () = asked(&mut self.stopped, Stop::Drain) => return,
                () = tokio::time::sleep(pause) => pause = PAUSE_MAX.min(pause * 2),
            }
        }
    }

    async fn run_once(&mut self) -> anyhow::Result<Ended> {
        let mut process = self.program.start(&self.logs)?;
        if let Some(pid) = process.pid() {
            self.log(format!("started as process {pid}")).await;
        }
        let status = tokio::select! {
            () = asked(&mut self.stopped, Stop::Drain) => None,
            status = process.wait() => Some(status?),
        };
        let Some(status) = status else {
            self.end(process).await;
            return Ok(Ended::Stopped);
        };
        let name = &self.program.name;
        match status.code() {
            Some(code) if exit::HOPELESS.map(i32::from).contains(&code) => {
                match process.last_line().await {
                    Some(line) => bail!("{name} ended with exit code {code}: {line}"),
                    None => bail!("{name} ended with exit code {code}"),
                }
            }
            _ => Ok(Ended::Died(format!("{name} ended unexpectedly ({status})"))),
        }
    }

    async fn end(&mut self, process: Process) {
        process.terminate();
        // Its own grace period ends first, so that it can say what it left behind.
        let grace = self.grace + Duration::from_secs(2);
        let patience = async {
            tokio::select! {
                () = tokio::time::sleep(grace) => {}
                () = asked(&mut self.stopped, Stop::Kill) => {}
            }
        };
        if !process.finish(patience).await {
            self.log("did not drain in time and was killed".to_owned()).await;
        }
    }

    async fn log(&self, line: String) {
        let line =
            LogLine { name: "up".to_owned(), line: format!("{}: {line}", self.program.name) };
        // The printer ends last; without it there is nobody to tell.
        let _ = self.logs.send(line).await;
    }
}

/// Resolves when the farm is to stop in this way or a sterner one, or is gone.
async fn asked(stopped: &mut watch::Receiver<Stop>, how: Stop) {
    // Without a sender nobody can ask, and nobody wants the process either.
    let _ = stopped.wait_for(|asked| *asked >= how).await;
}

enum Ended {
    Stopped,
    Died(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_cannot_get_better_ends_the_farm_with_its_own_words() {
        let script = "sleep 0.05; echo '`/store` is in use by another broker' >&2; exit 75";
        let plan = FarmPlan {
            broker: program("broker", script),
            workers: Vec::new(),
            grace: Duration::from_mins(5),
        };
        let (logs, _lines) = mpsc::channel(64);
        let mut farm = Farm::start(&plan, &logs);
        let failed = tokio::time::timeout(Duration::from_secs(30), farm.failed());
        assert_eq!(
            failed.await.expect("it is not started again"),
            "broker ended with exit code 75: `/store` is in use by another broker"
        );
        farm.stop(std::future::ready(())).await;
    }

    #[tokio::test]
    async fn a_farm_that_does_not_drain_is_killed_when_there_is_a_hurry() {
        let deaf = "trap '' TERM; echo deaf; exec sleep 600";
        let plan = FarmPlan {
            broker: program("broker", deaf),
            workers: vec![program("cpu-0", deaf)],
            grace: Duration::from_mins(5),
        };
        let (logs, mut lines) = mpsc::channel(64);
        let farm = Farm::start(&plan, &logs);
        drop(logs);
        let mut seen = Vec::new();
        while seen.iter().filter(|line| *line == "deaf").count() < 2 {
            seen.push(lines.recv().await.expect("both say that they are deaf").line);
        }

        let stopped = farm.stop(std::future::ready(()));
        tokio::time::timeout(Duration::from_secs(30), stopped).await.expect("it is killed at once");
        let mut killed = 0;
        while let Some(LogLine { line, .. }) = lines.recv().await {
            killed += usize::from(line.ends_with("was killed"));
        }
        assert_eq!(killed, 2);
    }

    fn program(name: &str, script: &str) -> Program {
        Program {
            name: name.to_owned(),
            executable: "/bin/sh".into(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            environment: Vec::new(),
        }
    }
}
