//! `luna drain worker` and `luna drain broker`.

use std::process::ExitCode;

use luna_client::DrainTarget;

use crate::{
    args::{DrainArgs, DrainCommand},
    command::connect,
    output::{print_json, print_line},
};

/// Has a worker or the broker take nothing new, or serve again.
pub(crate) async fn run(command: DrainCommand) -> anyhow::Result<ExitCode> {
    let (target, args) = match command {
        DrainCommand::Worker(worker) => (DrainTarget::Worker(worker.name), worker.drain),
        DrainCommand::Broker(args) => (DrainTarget::Broker, args),
    };
    let who = match &target {
        DrainTarget::Worker(name) => format!("worker `{name}`"),
        DrainTarget::Broker => "the broker".to_owned(),
    };
    let DrainArgs { farm, reason, undo, json } = args;
    let client = connect(&farm).await?;
    let reply =
        if undo { client.undo_drain(target).await? } else { client.drain(target, reason).await? };
    if json {
        print_json(&reply)?;
    } else if reply.draining {
        let in_flight = reply.in_flight;
        print_line(format_args!("{who} takes nothing new; it finishes {in_flight} requests"));
    } else {
        print_line(format_args!("{who} takes requests again"));
    }
    Ok(ExitCode::SUCCESS)
}
