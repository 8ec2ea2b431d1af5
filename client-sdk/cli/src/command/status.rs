//! `luna status`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use luna_client::{ErrorKind, ModelName, StatusReply};
use settings::Time;

use crate::{
    args::{FarmArgs, StatusArgs},
    command::connect,
    output::{human_bytes, print_json, print_line, print_table},
};

/// How often a farm is asked that is waited for.
const PAUSE: Duration = Duration::from_millis(100);

/// Shows the farm's state; success means ready.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + args.farm.timeout.0;
    let status = loop {
        let status = ask(&args.farm, deadline).await;
        let is_last = !args.wait || Instant::now() + PAUSE >= deadline;
        match status {
            Ok(status) if status.ready || is_last => break status,
            Err(error) if is_last || !may_pass(&error) => return Err(error.into()),
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

/// One question, which may last no longer than until `deadline`.
async fn ask(farm: &FarmArgs, deadline: Instant) -> Result<StatusReply, luna_client::Error> {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
    // Rounded up: a message names this time, and zero would be refused.
    let left = Duration::from_millis(u64::try_from(left).unwrap_or(u64::MAX).saturating_add(1));
    let farm = FarmArgs { timeout: Time(farm.timeout.0.min(left)), ..farm.clone() };
    connect(&farm).await?.status().await
}

/// Whether waiting may help.
fn may_pass(error: &luna_client::Error) -> bool {
    error.kind() != ErrorKind::Invalid
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
    print_line(format_args!(
        "{} from the cache, {} shared, {} refused as too many, {} quarantined, {} ejections",
        counters.cache_hits,
        counters.coalesced,
        counters.refused_overload,
        counters.quarantined,
        counters.ejected
    ));
    let rows = status.workers.iter().map(|worker| {
        // In brackets where it is not in memory and is loaded when a request comes.
        let model = |name: &ModelName| {
            if worker.loaded.contains(name) { name.to_string() } else { format!("({name})") }
        };
        let models = worker.models.iter().map(model).collect::<Vec<_>>().join(" ");
        vec![
            worker.worker.to_string(),
            worker.device.clone(),
            worker.pid.to_string(),
            models,
            worker.resident.to_string(),
            worker.host.to_string(),
            worker.disk.to_string(),
            worker.in_flight.to_string(),
            match (&worker.drain_reason, worker.draining) {
                (Some(reason), true) => format!("draining: {reason}"),
                (None, true) => "draining".to_owned(),
                (_, false) => "serving".to_owned(),
            },
        ]
    });
    print_table(
        &[
            "worker",
            "device",
            "pid",
            "models",
            "LoRAs: device",
            "memory",
            "disk",
            "in flight",
            "state",
        ],
        rows,
    );
}
