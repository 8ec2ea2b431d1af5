//! The `luna-broker` executable: a broker alone, as systemd starts it.

use std::process::ExitCode;

fn main() -> ExitCode {
    luna_broker::main_with_args(std::env::args_os().skip(1))
}
