//! The OS thread that owns one socket: how it is started, stopped and waited for.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

/// A named thread that runs until it is told to stop. Dropping it stops it and waits.
#[derive(Debug)]
pub(crate) struct SocketThread {
    stop: watch::Sender<bool>,
    /// Resolves when the thread's body has returned.
    ended: oneshot::Receiver<()>,
    join: Option<JoinHandle<()>>,
}

/// The thread's side of the request to stop.
#[derive(Clone, Debug)]
pub(crate) struct Stop(watch::Receiver<bool>);

impl SocketThread {
    /// Starts `body` on a thread called `name` (the kernel shows its first 15 bytes).
    pub(crate) fn spawn(name: &str, body: impl FnOnce(Stop) + Send + 'static) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = oneshot::channel();
        let join = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _end = end;
            body(Stop(stopped));
        })?;
        Ok(Self { stop, ended, join: Some(join) })
    }

    /// Stops the thread and waits for its end without blocking the caller's runtime.
    pub(crate) async fn close(mut self) {
        self.stop.send_replace(true);
        // Both answers mean that the body has returned.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for SocketThread {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(join) = self.join.take()
            && join.join().is_err()
        {
            tracing::error!("a socket thread panicked");
        }
    }
}

impl Stop {
    /// Waits for the request to stop; also resolves when nobody is left to make it. Cancel safe.
    pub(crate) async fn requested(&mut self) {
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// Builds the runtime of one socket. `zeromq` 0.7.0 must not run on more than one thread.
pub(crate) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Waits until the tasks that `zeromq` left behind, its writers, have ended, or until `deadline`.
pub(crate) async fn tasks_ended(deadline: Instant) {
    const POLL: Duration = Duration::from_millis(1);
    let metrics = Handle::current().metrics();
    while metrics.num_alive_tasks() > 0 && Instant::now() < deadline {
        sleep(POLL).await;
    }
}
