//! `luna demo`: a farm of two workers, seeded models, and LoRAs that come and go with requests.
//!
//! Weights are random but seeded, so the embeddings mean nothing and the distances do: a stack
//! moves the encoding, and the next request without one gets the base encoding back, bit by bit.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use fixtures::{Naming, Plan, Size};
use luna_client::{Client, EncodeRequest, Encoding};
use protocol::{AdapterId, AdapterSource, Component, Dtype, Family, ModelName};
use serde::Serialize;
use tokio::{io::AsyncWriteExt as _, sync::mpsc, task::JoinHandle};
use worker::model::ModelSpec;

use crate::{
    args::DemoArgs,
    command::lora,
    output::{bytes_bar, print_json, print_line, print_table, spinner},
    up::{Farm, FarmOptions, LogLine, next_stop_signal, threads_per_worker, wait_ready},
};

/// Workers of the demo's farm.
const WORKERS: u32 = 2;

/// Longest time for the workers to load a model.
const READY_PATIENCE: Duration = Duration::from_mins(2);

/// Longest time for each process to stop.
const GRACE: Duration = Duration::from_secs(10);

/// Lines of the farm's log that a failure shows.
const LOG_TAIL: usize = 20;

const PROMPTS: [&str; 2] = ["a photo of a (red:1.3) cat", "an old harbour at dusk, oil painting"];

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    prompt: String,
    stack: String,
    worker: String,
    adapters: String,
    time_ms: f64,
    /// Relative L2 distance from the prompt's first encoding without LoRAs.
    distance: f64,
}

/// Runs the demo.
pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    // The socket's path must be short, so it never lies in a directory that the user names.
    let temporary = tempfile::tempdir().context("cannot make a temporary directory")?;
    let directory = args.dir.clone().unwrap_or_else(|| temporary.path().to_path_buf());
    let size = if args.tiny { Size::Tiny } else { Size::Full };
    let files = Files::write(&directory, size)?;

    let endpoint = format!("ipc://{}", temporary.path().join("luna.sock").display());
    let (logs, lines) = mpsc::channel(1024);
    let log = directory.join("farm.log");
    let logger = log_to(&log, lines)?;
    let mut farm = Farm::start(&files.farm_options(&endpoint, &directory).plan()?, &logs);
    drop(logs);
    let outcome = tokio::select! {
        rows = show(&endpoint, &files) => rows,
        failure = farm.failed() => Err(anyhow::Error::msg(failure)),
        signal = crate::up::stop_signal() => Err(anyhow::anyhow!("{} received", signal?)),
    };
    farm.stop(async {
        next_stop_signal().await;
    })
    .await;
    logger.await.context("the log could not be written")?;
    match outcome {
        Ok(rows) => report(&args, &rows),
        Err(error) => {
            Err(error.context(format!("the demo failed; the farm's last lines:\n{}", tail(&log))))
        }
    }
}

/// What the demo writes before it starts.
struct Files {
    model: PathBuf,
    loras: Vec<PathBuf>,
}

impl Files {
    fn write(directory: &Path, size: Size) -> anyhow::Result<Self> {
        let (dtype, rank) = match size {
            Size::Tiny => (Dtype::Float32, 4),
            Size::Full => (Dtype::Float16, 16),
        };
        let base = directory.join(size.as_str());
        let model = base.join("clip_l").join("model.safetensors");
        let loras: Vec<_> = ["ink", "neon", "watercolour"]
            .map(|name| base.join(format!("{name}.safetensors")))
            .into();
        let mut plan = Plan::default();
        plan.add_encoder(&model, size, Component::ClipL, dtype, Naming::Hf);
        for (seed, path) in (1..).zip(&loras) {
            plan.add_seeded_lora(path, size, Family::Sd15, seed, rank);
        }
        let bar = bytes_bar("writing seeded weights");
        bar.set_length(plan.bytes_total());
        plan.write(&mut |progress| bar.set_position(progress.bytes_done))?;
        bar.finish_and_clear();
        Ok(Self { model, loras })
    }

    fn farm_options(&self, endpoint: &str, directory: &Path) -> FarmOptions {
        let name: ModelName = "demo".parse().expect("`demo` is a name");
        FarmOptions {
            models: vec![ModelSpec { name, family: Family::Sd15, files: vec![self.model.clone()] }],
            embeddings: None,
            workers: WORKERS,
            endpoint: endpoint.to_owned(),
            worker_endpoint: None,
            weights_dtype: Some(Dtype::Float16),
            threads: Some(threads_per_worker(WORKERS)),
            lanes: None,
            execution_mode: None,
            fidelity: None,
            cache: None,
            journal: None,
            model_roots: Vec::new(),
            store: Some(directory.join("store")),
            worker_exe: None,
            grace: Some(GRACE),
            patience: GRACE,
            json_logs: false,
        }
    }
}

async fn show(endpoint: &str, files: &Files) -> anyhow::Result<Vec<Row>> {
    let waiting = spinner("starting a broker and two workers");
    let ready = wait_ready(endpoint, READY_PATIENCE).await;
    waiting.finish_and_clear();
    if let Err(reasons) = ready {
        bail!("the farm did not get ready in {} s: {reasons}", READY_PATIENCE.as_secs());
    }
    let client = Client::builder().endpoint(endpoint).connect().await?;
    let mut adapters = Vec::new();
    for path in &files.loras {
        adapters.push(lora::upload(&client, path).await?.adapter);
    }
    let (ink, neon, colour) = (adapters[0], adapters[1], adapters[2]);
    let stacks: [(&str, &[(AdapterId, f64)]); 5] = [
        ("none", &[]),
        ("ink:0.8", &[(ink, 0.8)]),
        ("ink:0.8 again", &[(ink, 0.8)]),
        ("ink:0.8 neon:0.5 watercolour:-0.3", &[(ink, 0.8), (neon, 0.5), (colour, -0.3)]),
        ("none again", &[]),
    ];
    let encoding = spinner("encoding");
    let mut rows = Vec::new();
    for prompt in PROMPTS {
        let mut base = None;
        for (name, stack) in stacks {
            let started = Instant::now();
            let request = stack
                .iter()
                .fold(EncodeRequest::new("demo").prompt(prompt), |request, (adapter, strength)| {
                    request.lora(*adapter, *strength)
                });
            let encoded = client.encode(request).await?;
            let time = started.elapsed();
            let base = base.get_or_insert_with(|| encoded.clone());
            rows.push(row(prompt, name, &encoded, base, time));
        }
    }
    encoding.finish_and_clear();
    Ok(rows)
}

fn row(prompt: &str, stack: &str, encoding: &Encoding, base: &Encoding, time: Duration) -> Row {
    let count =
        |source| encoding.receipt.stack.iter().filter(|entry| entry.source == source).count();
    let adapters = match (count(AdapterSource::Broker), count(AdapterSource::Resident)) {
        (0, 0) => "-".to_owned(),
        (loaded, 0) => format!("{loaded} loaded"),
        (0, resident) => format!("{resident} resident"),
        (loaded, resident) => format!("{loaded} loaded, {resident} resident"),
    };
    Row {
        prompt: prompt.to_owned(),
        stack: stack.to_owned(),
        worker: encoding.receipt.worker.to_string(),
        adapters,
        time_ms: time.as_secs_f64() * 1e3,
        distance: distance(encoding, base),
    }
}

/// ‖a − b‖₂ / ‖b‖₂ over `cond` and `pooled`.
fn distance(encoding: &Encoding, base: &Encoding) -> f64 {
    let elements = |encoding: &Encoding| {
        let first = &encoding.conditionings[0];
        first.cond.data.iter().chain(&first.pooled.data).map(|x| f64::from(*x)).collect::<Vec<_>>()
    };
    let norm = |elements: &[f64]| elements.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (a, b) = (elements(encoding), elements(base));
    let differences: Vec<_> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
    norm(&differences) / norm(&b)
}

fn report(args: &DemoArgs, rows: &[Row]) -> anyhow::Result<ExitCode> {
    if args.json {
        print_json(&rows)?;
    } else {
        let cells = rows.iter().map(|row| {
            vec![
                row.prompt.clone(),
                row.stack.clone(),
                row.worker.clone(),
                row.adapters.clone(),
                format!("{:.0} ms", row.time_ms),
                if row.distance == 0.0 { "0".to_owned() } else { format!("{:.3}", row.distance) },
            ]
        });
        print_table(&["prompt", "stack", "worker", "adapters", "time", "distance"], cells);
    }
    let is_base = |row: &&Row| row.stack.starts_with("none");
    if rows.iter().filter(is_base).any(|row| row.distance != 0.0) {
        bail!("an encoding without LoRAs changed after LoRA requests: this must never happen");
    }
    if rows.iter().filter(|row| !is_base(row)).any(|row| row.distance == 0.0) {
        bail!("an encoding with LoRAs is the base encoding: this must never happen");
    }
    if !args.json {
        print_line(format_args!(
            "\nEvery stack moved the encoding, and without one it was the base again, bit by bit."
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the farm's log lines to `path`.
fn log_to(path: &Path, mut lines: mpsc::Receiver<LogLine>) -> anyhow::Result<JoinHandle<()>> {
    let file =
        std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut file = tokio::fs::File::from_std(file);
    Ok(tokio::spawn(async move {
        while let Some(LogLine { name, line }) = lines.recv().await {
            // A log that cannot be written must not stop the farm.
            let _ = file.write_all(format!("{name:8} | {line}\n").as_bytes()).await;
        }
        let _ = file.flush().await;
    }))
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL)..].iter().fold(String::new(), |mut tail, line| {
        let _ = writeln!(tail, "  {line}");
        tail
    })
}
