//! The `luna-worker` executable: a worker alone, as systemd starts it.

use std::process::ExitCode;

fn main() -> ExitCode {
    luna_worker::main_with_args(std::env::args_os().skip(1))
}
