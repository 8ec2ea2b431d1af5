//! `luna status`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use luna_client::StatusReply;

use crate::{
    args::StatusArgs,
    command::connect,
    output::{human_bytes, print_json, print_line, print_table},
};

/// How often a farm is asked that is waited for.
const PAUSE: Duration = Duration::from_millis(100);

/// Shows the farm's state; success means ready.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + args.farm.timeout.0;
    let status = loop {
        let status = match connect(&args.farm).await {
            Ok(client) => client.status().await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        match status {
            Ok(status) if status.ready || !args.wait || Instant::now() >= deadline => break status,
            Err(error) if !args.wait || Instant::now() >= deadline => return Err(error),
            Ok(_) | Err(_) => tokio::time::sleep(PAUSE).await,
        }
    };
    if args.json {
        print_json(&status)?;
    } else {
        show(&status);
    }
    Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(status: &StatusReply) {
    let uptime = Duration::from_millis(status.uptime_ms).as_secs();
    let state = if status.ready { "ready" } else { "NOT READY" };
    print_line(format_args!("{state}, broker {} up {uptime} s", status.version));
    for reason in &status.reasons {
        print_line(format_args!("  {reason}"));
    }
    let (queued, running) = (status.queued, status.in_flight);
    let loras = format!("{} LoRAs ({})", status.loras, human_bytes(status.lora_bytes));
    print_line(format_args!("{queued} queued, {running} in flight, {loras} stored"));
    let counters = &status.counters;
    print_line(format_args!(
        "{} accepted, {} answered, {} failed, {} requeued, {} workers lost",
        counters.accepted,
        counters.answered,
        counters.failed,
        counters.requeued,
        counters.workers_lost
    ));
    let rows = status.workers.iter().map(|worker| {
        let models = worker.models.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        vec![
            worker.worker.to_string(),
            worker.device.clone(),
            worker.pid.to_string(),
            models,
            worker.resident.to_string(),
            worker.in_flight.to_string(),
            if worker.draining { "draining" } else { "serving" }.to_owned(),
        ]
    });
    print_table(&["worker", "device", "pid", "models", "LoRAs", "in flight", "state"], rows);
}
