//! The processes that are measured: a broker, and a libzmq proxy to compare it with.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use tempfile::TempDir;
use transport::Endpoint;

/// The proxy's program.
const PROXY: &str = include_str!("zmq_proxy.py");

/// A process between clients and workers. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Subject {
    child: Child,
    /// Where clients connect.
    pub(crate) front: Endpoint,
    /// Where workers connect.
    pub(crate) back: Endpoint,
    /// What it is, where that is worth telling.
    pub(crate) version: String,
    directory: TempDir,
}

/// What the proxy prints when it is bound.
#[derive(Debug, Deserialize)]
struct Bound {
    front: String,
    back: String,
    version: String,
}

impl Subject {
    /// Starts `executable broker` with a store of its own.
    pub(crate) fn broker(executable: &Path) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let (front, back) = (free_endpoint()?, free_endpoint()?);
        let mut command = Command::new(executable);
        command.args(["broker", "--exit-on-stdin-eof", "--endpoint", &front.to_string()]);
        command.args(["--worker-endpoint", &back.to_string(), "--store"]);
        command.arg(directory.path().join("store"));
        let log = File::create(log(&directory)).context("cannot write the broker's log")?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).spawn();
        let child =
            child.with_context(|| format!("cannot start `{} broker`", executable.display()))?;
        Ok(Self { child, front, back, version: String::new(), directory })
    }

    /// Starts a proxy and waits until it is bound.
    ///
    /// # Errors
    /// When `python` cannot be started or lacks pyzmq, among others.
    pub(crate) fn proxy(python: &Path) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let errors = File::create(log(&directory)).context("cannot write the proxy's log")?;
        let mut command = Command::new(python);
        command.args(["-c", PROXY]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let child = command.spawn();
        let mut child = child.with_context(|| format!("cannot start `{}`", python.display()))?;
        let stdout = child.stdout.take().context("standard output was asked for")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("cannot read from the proxy")?;
        if line.is_empty() {
            child.wait().context("cannot wait for the proxy")?;
            bail!("the proxy ended: {}", last_line(&log(&directory)));
        }
        let Bound { front, back, version } = serde_json::from_str(&line)
            .with_context(|| format!("the proxy printed `{}`", line.trim()))?;
        let (front, back) = (front.parse()?, back.parse()?);
        Ok(Self { child, front, back, version, directory })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with its last words if it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().context("cannot look after the process that is measured")? {
            None => Ok(()),
            Some(status) => {
                bail!("what is measured ended ({status}): {}", last_line(&log(&self.directory)))
            }
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // It holds nothing that would be missed, and may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log(directory: &TempDir) -> PathBuf {
    directory.path().join("log")
}

fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("it said nothing").to_owned()
}

/// An address that nothing listened on a moment ago.
fn free_endpoint() -> anyhow::Result<Endpoint> {
    let listener = TcpListener::bind("127.0.0.1:0").context("there is no free port")?;
    let address = listener.local_addr().context("a bound socket has an address")?;
    Ok(format!("tcp://{address}").parse()?)
}
