//! A child process that never outlives its test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::binary::luna;

/// Longest time for a process to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(20);

/// A `luna` process whose output goes to a file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `luna` with `arguments`; its output is appended to `log`.
    pub fn start(arguments: &[String], log: &Path) -> Self {
        let output =
            File::options().create(true).append(true).open(log).expect("the log is writable");
        let child = Command::new(luna())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("a file handle can be copied"))
            .stderr(output)
            .spawn()
            .expect("`luna` can be started");
        Self { child, log: log.to_path_buf() }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Ends the process as a crash would: SIGKILL, and no word to anybody.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a child has a process id"), signal).expect("the child is there");
    }

    /// Asks the process to end and waits until it has.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Waits until the process has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the process did not end:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything that the process has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Resident memory in bytes, as the kernel counts it now.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most resident memory so far, in bytes.
    pub fn resident_bytes_peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("the child is there");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a known field");
        let kilobytes: u64 =
            line.trim().trim_end_matches(" kB").parse().expect("the kernel counts in kB");
        kilobytes << 10
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<_> = output.lines().collect();
            let tail = lines[lines.len().saturating_sub(30)..].join("\n");
            let mut stderr = std::io::stderr().lock();
            let _ = std::io::Write::write_fmt(
                &mut stderr,
                format_args!("--- {}\n{tail}\n", self.log.display()),
            );
        }
    }
}
