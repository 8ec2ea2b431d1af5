//! One process of the farm, on a thread of its own that starts it, hurts it and starts it again.

use std::{
    os::unix::process::ExitStatusExt as _,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use luna_e2e::{Launcher, Process, process::Signal};

use crate::{
    log_line::LogLine,
    plan::{Blow, Target},
    timeline::{Timeline, What},
};

/// Keeps one process running, but for what it is told to do to it.
#[derive(Debug)]
pub(crate) struct Supervisor {
    target: Target,
    blows: mpsc::Sender<Blow>,
    thread: JoinHandle<()>,
}

impl Supervisor {
    /// Starts the process and its thread.
    pub(crate) fn spawn(target: Target, launcher: Launcher, timeline: Arc<Timeline>) -> Self {
        let (blows, received) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut watched = Watched::start(target, launcher, timeline);
            loop {
                match received.recv_timeout(WATCH) {
                    Ok(blow) => watched.strike(blow),
                    Err(RecvTimeoutError::Timeout) => watched.check(),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            watched.end();
        });
        Self { target, blows, thread }
    }

    /// Does this to the process, after whatever is being done to it already.
    pub(crate) fn strike(&self, blow: Blow) {
        // A thread that has ended says so when it is joined.
        let _ = self.blows.send(blow);
    }

    /// Ends the process with SIGTERM. Blocks until it has.
    ///
    /// # Errors
    /// A sentence, when the process could not be brought to an end.
    pub(crate) fn end(self) -> Result<(), String> {
        drop(self.blows);
        self.thread.join().map_err(|_| format!("the {} did not end when told to", self.target))
    }
}

/// A process that is watched.
struct Watched {
    target: Target,
    launcher: Launcher,
    timeline: Arc<Timeline>,
    process: Process,
    /// Bytes of its log that earlier processes have written.
    log_start: usize,
}

impl Watched {
    fn start(target: Target, launcher: Launcher, timeline: Arc<Timeline>) -> Self {
        let process = start(target, &launcher, &timeline);
        Self { target, launcher, timeline, process, log_start: 0 }
    }

    fn strike(&mut self, blow: Blow) {
        self.check();
        match blow {
            Blow::Kill(pause) => {
                self.record(What::Killed);
                self.process.kill();
                thread::sleep(pause);
                self.restart();
            }
            Blow::Pause(pause) => {
                self.record(What::Paused);
                self.process.signal(Signal::STOP);
                thread::sleep(pause);
                self.process.signal(Signal::CONT);
                self.record(What::Resumed);
            }
            Blow::Restart => {
                self.terminate();
                self.restart();
            }
        }
    }

    /// Starts the process anew if it has ended by itself.
    fn check(&mut self) {
        if !self.process.is_running() {
            let status = self.process.wait();
            self.record(What::Failed(format!("ended by itself: {status}")));
            thread::sleep(RESTART);
            self.restart();
        }
    }

    fn terminate(&mut self) {
        self.record(What::Terminating);
        let status = self.process.terminate();
        // While it starts it has nothing to finish, and SIGTERM may end it at once.
        let was_starting = status.signal() == Some(Signal::TERM.as_raw()) && !self.has_served();
        self.record(if status.success() || was_starting {
            What::Terminated
        } else {
            What::Failed(format!("told to end: {status}"))
        });
    }

    fn has_served(&self) -> bool {
        let output = self.process.output();
        let lines = output.get(self.log_start..).unwrap_or(&output).lines();
        lines.filter_map(LogLine::parse).any(|line| SERVING.contains(&line.message.as_str()))
    }

    fn restart(&mut self) {
        self.log_start = self.process.output().len();
        self.process = start(self.target, &self.launcher, &self.timeline);
    }

    fn end(mut self) {
        self.check();
        self.terminate();
    }

    fn record(&self, what: What) {
        self.timeline.record(self.target, what);
    }
}

fn start(target: Target, launcher: &Launcher, timeline: &Timeline) -> Process {
    timeline.record(target, What::Started);
    match target {
        Target::Broker => launcher.start_broker(),
        Target::Worker(number) => launcher.start_worker(number),
    }
}

/// What processes log when they are ready to be told to end.
const SERVING: [&str; 2] = ["listening", "serving"];

/// How often it is looked at whether the process still runs.
const WATCH: Duration = Duration::from_millis(20);

/// Before a process that failed is started again.
const RESTART: Duration = Duration::from_millis(100);
