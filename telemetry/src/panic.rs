//! Panics, logged like everything else.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::thread;

/// Logs every panic as an ERROR. If errors are filtered out, the former hook reports it: a panic
/// is never silent.
pub(crate) fn install_hook() {
    let former = take_hook();
    set_hook(Box::new(move |info| {
        if tracing::enabled!(tracing::Level::ERROR) {
            log(info);
        } else {
            former(info);
        }
    }));
}

fn log(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let message = info.payload_as_str().unwrap_or("a value that is not text");
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    // Captured only if `RUST_BACKTRACE` asks for it.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(thread, location, %backtrace, "panic: {message}");
    } else {
        tracing::error!(thread, location, "panic: {message}");
    }
}
