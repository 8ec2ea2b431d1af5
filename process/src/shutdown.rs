//! When a process is told to stop.

use std::{future::pending, io};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// Resolves on SIGTERM, on Ctrl-C, and, `with_stdin`, when standard input closes: then a supervisor
/// that dies takes the process along. Names which it was. Call it in a tokio runtime.
///
/// # Errors
/// When the system gives no signal handler or no thread.
pub fn shutdown_reason(
    with_stdin: bool,
) -> io::Result<impl Future<Output = &'static str> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stdin_closed = with_stdin.then(watch_stdin).transpose()?;
    let closed = async move {
        match stdin_closed {
            // The watcher sends or ends, both when standard input is no more.
            Some(closed) => drop(closed.await),
            None => pending().await,
        }
    };
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM received",
            _ = interrupt.recv() => "SIGINT received",
            () = closed => "standard input closed",
        }
    })
}

/// Reads standard input to its end on a thread of its own: a read cannot be cancelled, and tokio
/// would wait for it when it stops.
fn watch_stdin() -> io::Result<oneshot::Receiver<()>> {
    let (closed, receiver) = oneshot::channel();
    let watch = move || {
        // An error ends it like the end of the input: there will be no more of it.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        // Nobody listens any more when the process is stopping already.
        let _ = closed.send(());
    };
    std::thread::Builder::new().name("luna-stdin".to_owned()).spawn(watch)?;
    Ok(receiver)
}
