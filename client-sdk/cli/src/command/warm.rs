//! `luna warm`.

use std::process::ExitCode;

use luna_client::{Warm, WarmReply, WorkerName};

use crate::{
    args::WarmArgs,
    command::connect,
    output::{print_json, print_table},
};

/// Has workers bring LoRAs into memory; after a wait, success means that all of them are there.
pub(crate) async fn run(args: WarmArgs) -> anyhow::Result<ExitCode> {
    let mut warm = Warm::new(args.adapters).workers(args.workers);
    if let Some(model) = args.model {
        warm = warm.model(model);
    }
    if let Some(wait) = args.wait {
        warm = warm.wait(wait.0);
    }
    let reply = connect(&args.farm).await?.warm(warm).await?;
    if args.json {
        print_json(&reply)?;
    } else {
        show(&reply);
    }
    let is_held = reply.adapters.iter().all(|adapter| !adapter.held.is_empty());
    let is_waited_for = args.wait.is_some();
    Ok(if is_held || !is_waited_for { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(reply: &WarmReply) {
    let names = |workers: &[WorkerName]| {
        workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    let rows = reply.adapters.iter().map(|adapter| {
        vec![adapter.adapter.to_string(), names(&adapter.held), names(&adapter.fetching)]
    });
    print_table(&["adapter", "in memory of", "being fetched by"], rows);
}
