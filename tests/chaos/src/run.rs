//! One run, from the solo answers to the report.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use luna_client::AdapterId;
use luna_e2e::Launcher;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    broken_upload,
    catalogue::Catalogue,
    farm::{Farm, quiet_farm},
    ledger::Ledger,
    load::{Load, Shared},
    log_line::LogLine,
    measure::{detections, gaps},
    oracle::Oracle,
    plan::{Fault, Plan, PlanSettings, Target},
    report::{Findings, Report},
    slow_reader,
    timeline::{Incident, What},
};

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct RunSettings {
    /// The same seed gives the same faults.
    pub seed: u64,
    /// How long the load lasts.
    pub duration: Duration,
    /// Workers of the farm.
    pub workers: usize,
    /// Clients that ask all the time.
    pub clients: usize,
    /// Different things that they ask for.
    pub entries: usize,
    /// Whether logs and store are kept also when nothing was wrong.
    pub keep: bool,
}

/// Runs the farm, the load and the faults; `tell` gets a line now and then.
///
/// # Errors
/// When the run could not be made. What went wrong within it is in the report.
pub async fn run(settings: RunSettings, mut tell: impl FnMut(&str)) -> Result<Report> {
    let RunSettings { seed, duration, workers, clients, entries, keep } = settings;
    let catalogue = Arc::new(Catalogue::new(entries));
    tell(&format!("seed {seed}: asking a quiet farm for {entries} solo answers"));
    let oracle = {
        let quiet = quiet_farm().await;
        Arc::new(Oracle::ask(&quiet.client().await, &catalogue).await?)
    };
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let farm = Farm::start(directory.path(), workers);
    upload_first(&farm, &catalogue).await?;
    farm.ready().await?;

    let plan = Plan::new(PlanSettings { seed, duration, workers });
    tell(&format!("{} faults in {} s", plan.faults().len(), duration.as_secs()));
    let ledger = Ledger::default();
    let endpoint = farm.endpoint().to_owned();
    let shared =
        Shared { catalogue: Arc::clone(&catalogue), oracle, ledger: ledger.clone(), endpoint };
    let mut load = Load::start(shared.clone(), clients, seed)?;
    let mut seen = carry_out(&plan, duration, &farm, &mut load, &shared).await?;
    load.stop().await?;
    tell("the load has stopped: checking the farm");
    seen.extend(check_quiet(&farm, &shared).await);

    let (broker_log, logs) = (parse(&farm.broker_log()), farm.logs());
    let (incidents, not_ended) = farm.end();
    seen.extend(not_ended);
    seen.extend(incidents.iter().filter_map(failure));
    let (warnings, alarms) = read_logs(&logs);
    seen.extend(alarms);
    let book = ledger.snapshot();
    let report = Report::new(Findings {
        seed,
        duration,
        workers,
        clients,
        plan,
        detections: detections(&incidents, &broker_log, Launcher::worker_name),
        gaps: gaps(&incidents, &book.answered),
        book,
        warnings,
        seen,
    });
    if keep || !report.has_passed() {
        tell(&format!("logs and store are kept in `{}`", directory.keep().display()));
    }
    Ok(report)
}

/// Uploads the LoRAs that are there from the start.
async fn upload_first(farm: &Farm, catalogue: &Catalogue) -> Result<()> {
    let client = farm.client()?;
    for lora in catalogue.loras.iter().filter(|lora| !lora.is_late) {
        client.upload_lora(&lora.path, |_| {}).await?;
    }
    Ok(())
}

/// Does what the plan says when it says so, and waits for the end. Returns what must not be.
async fn carry_out(
    plan: &Plan,
    duration: Duration,
    farm: &Farm,
    load: &mut Load,
    shared: &Shared,
) -> Result<Vec<String>> {
    let start = Instant::now();
    let mut strangers = JoinSet::new();
    for (number, planned) in (0..).zip(plan.faults()) {
        sleep_until(start + planned.at).await;
        let endpoint = shared.endpoint.clone();
        match planned.fault {
            Fault::Process(target, blow) => farm.strike(target, blow),
            Fault::ClientChurn { clients } => load.churn(clients).await?,
            Fault::SlowReader { requests, stay } => {
                strangers.spawn(async move {
                    slow_reader::run(endpoint, requests, stay).await;
                    Ok(())
                });
            }
            Fault::BrokenUpload(breakage) => {
                let file = shared.catalogue.loras[0].path.clone();
                strangers.spawn(async move {
                    broken_upload::run(endpoint, &file, number, breakage).await
                });
            }
        }
    }
    sleep_until(start + duration).await;
    let ended = strangers.join_all().await;
    Ok(ended.into_iter().filter_map(Result::err).collect())
}

/// Whether the farm is whole, idle and as right as before. Returns what is not.
async fn check_quiet(farm: &Farm, shared: &Shared) -> Vec<String> {
    if let Err(error) = farm.ready().await {
        return vec![format!("the farm does not come back: {error:#}")];
    }
    match recheck(farm, shared).await {
        Ok(seen) => seen,
        Err(error) => vec![format!("the quiet farm fails: {error:#}")],
    }
}

/// Asks for every entry once more, and for what is stored.
async fn recheck(farm: &Farm, shared: &Shared) -> Result<Vec<String>> {
    let Shared { catalogue, oracle, .. } = shared;
    let client = farm.client()?;
    for lora in &catalogue.loras {
        client.upload_lora(&lora.path, |_| {}).await?;
    }
    let mut seen = Vec::new();
    for entry in 0..catalogue.len() {
        let request = catalogue.request(entry, &oracle.adapters, Duration::from_mins(1), None);
        let encoding = client.encode(request).await.with_context(|| format!("entry {entry}"))?;
        seen.extend(oracle.check(entry, &encoding).err().map(|how| format!("afterwards: {how}")));
    }
    let known: BTreeSet<AdapterId> = oracle.adapters.iter().copied().collect();
    let stored: BTreeSet<AdapterId> =
        client.list_loras().await?.into_iter().map(|lora| lora.adapter).collect();
    if stored != known {
        seen.push(format!("the farm holds {} LoRAs instead of {}", stored.len(), known.len()));
    }
    Ok(seen)
}

fn failure(incident: &Incident) -> Option<String> {
    match &incident.what {
        What::Failed(how) => Some(format!("the {} {how}", incident.target)),
        What::Started
        | What::Killed
        | What::Paused
        | What::Resumed
        | What::Terminating
        | What::Terminated => None,
    }
}

fn parse(log: &str) -> Vec<LogLine> {
    log.lines().filter_map(LogLine::parse).collect()
}

/// Counts what processes warned of. Also returns errors, and lines that are none of the log's own,
/// such as those of a panic; an object that a kill cut off is left out.
fn read_logs(logs: &[(Target, String)]) -> (BTreeMap<String, usize>, Vec<String>) {
    let (mut warnings, mut alarms) = (BTreeMap::new(), Vec::new());
    for (target, log) in logs {
        for line in log.lines() {
            match LogLine::parse(line) {
                Some(LogLine { level, message, .. }) if level == "WARN" => {
                    *warnings.entry(format!("{}: {message}", kind(*target))).or_default() += 1;
                }
                Some(LogLine { level, .. }) if level != "ERROR" => {}
                None if line.starts_with('{') => {}
                Some(_) | None => alarms.push(format!("the {target} says: {line}")),
            }
        }
    }
    (warnings, alarms)
}

fn kind(target: Target) -> &'static str {
    match target {
        Target::Broker => "broker",
        Target::Worker(_) => "worker",
    }
}
