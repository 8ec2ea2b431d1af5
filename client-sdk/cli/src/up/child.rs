//! One process of a farm: started, listened to, started again, ended.

use std::{
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    task::JoinHandle,
};

/// Bytes of a log line; a longer one is passed on in pieces.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Time for the last line to arrive after the end of its process.
const LAST_LINE_PATIENCE: Duration = Duration::from_secs(1);

/// How to start a process of the farm.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// What people call it: `broker`, `cpu-0`.
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
}

/// A line that a process logged.
#[derive(Debug)]
pub(crate) struct LogLine {
    pub(crate) name: String,
    pub(crate) line: String,
}

/// A running process. It ends when this value is dropped, because its standard input closes.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Held open, because its end is the sign to stop; `wait` would close it if it lay in `child`.
    _stdin: Option<ChildStdin>,
    /// Each ends with the last line of one of its outputs, standard error first.
    outputs: Vec<JoinHandle<Option<String>>>,
}

impl Program {
    /// Starts the process in a group of its own, so that a Ctrl-C at the terminal reaches `luna up`
    /// alone, which then drains the farm in order.
    pub(crate) fn start(&self, logs: &mpsc::Sender<LogLine>) -> anyhow::Result<Process> {
        let mut child = Command::new(&self.executable)
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| {
                format!("cannot start {} ({})", self.name, self.executable.display())
            })?;
        let mut outputs = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            outputs.push(forward(self.name.clone(), stderr, logs.clone()));
        }
        if let Some(stdout) = child.stdout.take() {
            outputs.push(forward(self.name.clone(), stdout, logs.clone()));
        }
        let stdin = child.stdin.take();
        Ok(Process { child, _stdin: stdin, outputs })
    }
}

impl Process {
    /// The process id, until the process has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the end.
    pub(crate) async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// The last line that the process wrote, once it has ended.
    pub(crate) async fn last_line(self) -> Option<String> {
        for output in self.outputs {
            // A child of the process may hold the output open for ever.
            let last = tokio::time::timeout(LAST_LINE_PATIENCE, output).await;
            if let Ok(Ok(Some(line))) = last {
                return Some(line);
            }
        }
        None
    }

    /// Asks the process to drain and end.
    pub(crate) fn terminate(&self) {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended on its own in the meantime.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Waits for the end until `patience` resolves, then kills. Says whether it ended by itself.
    pub(crate) async fn finish(mut self, patience: impl Future<Output = ()>) -> bool {
        tokio::select! {
            biased;
            _ = self.child.wait() => return true,
            () = patience => {}
        }
        // The process may have ended between the two.
        let _ = self.child.kill().await;
        false
    }
}

/// Passes every line on, until the process closes its end. Returns the last one.
fn forward(
    name: String,
    output: impl AsyncRead + Send + Unpin + 'static,
    logs: mpsc::Sender<LogLine>,
) -> JoinHandle<Option<String>> {
    tokio::spawn(async move {
        let mut output = BufReader::new(output);
        let mut last = None;
        while let Ok(Some(line)) = next_line(&mut output).await {
            last = Some(line.clone());
            if logs.send(LogLine { name: name.clone(), line }).await.is_err() {
                break;
            }
        }
        last
    })
}

/// The next line without its end; of one that is too long, the next piece. Bytes that are no text
/// are replaced: a process must not lose its log, or its life, to one of them.
async fn next_line(output: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut bounded = output.take(LINE_BYTES_MAX);
    if bounded.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    let text = line.strip_suffix(b"\n").unwrap_or(&line);
    Ok(Some(String::from_utf8_lossy(text.strip_suffix(b"\r").unwrap_or(text)).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_goes_on_after_bytes_that_are_no_text_and_after_a_line_without_end() {
        let long = "x".repeat(usize::try_from(LINE_BYTES_MAX).unwrap());
        let written = [b"one\r\n\xff\n\n", long.as_bytes(), b"rest\nlast"].concat();
        let mut output = written.as_slice();
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut output).await.unwrap() {
            lines.push(line);
        }
        assert_eq!(lines, ["one", "\u{fffd}", "", &long, "rest", "last"]);
    }
}
