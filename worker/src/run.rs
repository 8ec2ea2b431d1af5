//! From arguments to a serving worker, and from there to an exit code.

use std::{
    ffi::OsString,
    fs::File,
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
    sync::Arc,
};

use anyhow::Context as _;
use candle_core::Device;
use clap::Parser as _;
use process::exit;
use telemetry::LogConfig;
use tokio::sync::mpsc;
use transport::{Dealer, DealerConfig};
use worker_core::Scheduler;

use crate::{
    blob_cache::{BlobCache, CacheThread},
    config::{Config, Flags},
    embeddings::EmbeddingDirectory,
    engine::Engine,
    execution::Modes,
    executor::Executor,
    journal::Journal,
    models::{Catalogue, ModelDirectory, ModelFiles, ModelLoader, load},
    service::{HEARTBEAT, Identity, Parts, Service},
};

/// Heartbeats that a silent broker may miss before the connection is made anew.
const LIVENESS_HEARTBEATS: u32 = 4;

/// Candle and the kernels below it read their number of threads from here.
const THREADS_VARIABLE: &str = "RAYON_NUM_THREADS";

/// Candle's threads spin this often before they sleep; its default of 25,000 burns the cores of
/// whoever shares the machine.
const SPIN_VARIABLE: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
const SPIN_LIMIT: &str = "100";

/// A cache that cannot be used (`EX_CANTCREAT`).
const EXIT_CACHE: u8 = 73;

/// Runs a worker with these arguments, the program's name left out.
pub fn main_with_args(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> ExitCode {
    let arguments = arguments.into_iter().map(Into::into);
    let arguments = std::iter::once(OsString::from("luna-worker")).chain(arguments);
    let flags = match Flags::try_parse_from(arguments) {
        Ok(flags) => flags,
        Err(answer) => {
            // Nothing can be said where nothing can be written.
            let _ = answer.print();
            let is_mistake = answer.use_stderr();
            return if is_mistake { ExitCode::from(exit::USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let config = match Config::load(&flags, std::env::vars_os()) {
        Ok(config) => config,
        Err(mistakes) => return fail(exit::CONFIG, &mistakes),
    };
    if flags.check_config {
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{}", config.effective);
        return ExitCode::SUCCESS;
    }
    if let Err(error) = ensure_threads(config.threads) {
        return fail(exit::CONFIG, &error);
    }
    match start_logs(&config) {
        Ok(()) => {}
        Err(error) => return fail(exit::CONFIG, &error),
    }
    let prepared = match prepare(&config) {
        Ok(prepared) => prepared,
        Err((code, error)) => {
            tracing::error!("{error:#}");
            return ExitCode::from(code);
        }
    };
    match serve(&config, &flags, prepared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    // Nothing can be said where nothing can be written.
    let _ = writeln!(std::io::stderr(), "luna-worker: {error}");
    ExitCode::from(code)
}

/// Starts this process anew with the number of threads in its environment, if it is not there: the
/// kernels read it from nowhere else, and a running program cannot change its environment safely.
fn ensure_threads(threads: u32) -> anyhow::Result<()> {
    let wanted = OsString::from(threads.to_string());
    if std::env::var_os(THREADS_VARIABLE).as_ref() == Some(&wanted) {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    // Not the path: the file there may be a newer one by now.
    let error = Command::new("/proc/self/exe")
        .arg0(arguments.next().unwrap_or_else(|| "luna-worker".into()))
        .args(arguments)
        .env(THREADS_VARIABLE, wanted)
        .env(SPIN_VARIABLE, SPIN_LIMIT)
        .exec();
    Err(error).context("cannot start this executable again with its number of threads")
}

fn start_logs(config: &Config) -> anyhow::Result<()> {
    let log = LogConfig::from_vars(config.name.as_str(), std::env::vars_os())?;
    telemetry::init(&LogConfig { format: config.log_format, ..log })?;
    Ok(())
}

/// What a worker has before the broker hears of it.
pub(crate) struct Prepared {
    engine: Engine,
    device: Device,
    scheduler: Scheduler,
    catalogue: Catalogue,
    cache: Option<BlobCache>,
}

/// Loads everything that is needed before the broker hears of this worker.
pub(crate) fn prepare(config: &Config) -> Result<Prepared, (u8, anyhow::Error)> {
    let device = config.device.open().map_err(|error| (exit::UNAVAILABLE, error.into()))?;
    let mut scheduler = Scheduler::new(worker_core::Config {
        lanes: config.execution.lanes,
        tiers: config.memory.tiers,
        model_budget_bytes: config.memory.model_budget_bytes,
    });
    let cache = open_cache(config, &mut scheduler).map_err(|error| (EXIT_CACHE, error))?;
    let catalogue =
        load_models(config, &device, &mut scheduler).map_err(|error| (exit::DATA, error))?;
    if catalogue.is_empty() {
        tracing::warn!("no model to serve: give --model NAME=FAMILY:FILE, or register one");
    }
    let embeddings = config.embeddings.clone().map(EmbeddingDirectory::new);
    let engine = Engine {
        worker: config.name.clone(),
        tokenizer: prompt::Tokenizer::new(),
        embeddings,
        modes: Modes::new(config.execution.modes),
    };
    Ok(Prepared { engine, device, scheduler, catalogue, cache })
}

/// Opens the cache on disk, if there is to be one, and tells the scheduler what is in it.
fn open_cache(config: &Config, scheduler: &mut Scheduler) -> anyhow::Result<Option<BlobCache>> {
    let Some(directory) = &config.memory.cache else { return Ok(None) };
    let (cache, found) = BlobCache::open(directory, config.memory.tiers.disk_budget_bytes)?;
    tracing::info!(directory = %directory.display(), adapters = found.len(), "cache opened");
    for blob in found {
        scheduler.handle_disk_found(blob.digest.into(), blob.bytes);
    }
    Ok(Some(cache))
}

/// Reads every model once, because its digest must be known; keeps what the budget allows.
fn load_models(
    config: &Config,
    device: &Device,
    scheduler: &mut Scheduler,
) -> anyhow::Result<Catalogue> {
    let mut catalogue = Catalogue::default();
    for spec in &config.models {
        let model = load(spec, config.weights_dtype, device)
            .with_context(|| format!("cannot load model `{}`", spec.name))?;
        catalogue.register(spec.clone(), &Arc::new(model), scheduler)?;
        if catalogue.weights(&spec.name).is_none() {
            tracing::info!(model = %spec.name, "no room for the model: it is loaded when needed");
        }
    }
    Ok(catalogue)
}

/// Starts the threads that the service works with.
pub(crate) fn assemble(config: &Config, prepared: Prepared) -> anyhow::Result<Parts> {
    let Prepared { engine, device, scheduler, catalogue, cache } = prepared;
    let identity = Identity {
        worker: config.name.clone(),
        epoch: random()?,
        device: config.device.to_string(),
        mode: config.execution.modes.mode,
    };
    let (arrived, arrivals) = mpsc::unbounded_channel();
    let executor =
        Executor::spawn(engine, config.execution.lanes).context("cannot start the lanes")?;
    let loader = ModelLoader::spawn(config.weights_dtype, device, arrived.clone())
        .context("cannot start the thread that loads models")?;
    let directory = match &config.memory.cache {
        Some(cache) => ModelDirectory::kept(cache.clone()),
        None => ModelDirectory::temporary(random()?),
    };
    let (roots, path) = (config.model_roots.clone(), directory.path().to_owned());
    let files = ModelFiles::spawn(roots, path, arrived.clone())
        .context("cannot start the thread of models' files")?;
    let cache = cache
        .map(|cache| CacheThread::spawn(cache, arrived.clone()))
        .transpose()
        .context("cannot start the thread of the cache")?;
    let journal = open_journal(config, &identity);
    Ok(Parts {
        identity,
        journal,
        scheduler,
        catalogue,
        loader,
        files,
        directory,
        cache,
        executor,
        arrivals,
        arrived,
    })
}

/// Opens the journal, if there is to be one. A worker without it serves as well.
fn open_journal(config: &Config, identity: &Identity) -> Option<Journal> {
    let directory = config.journal.as_ref()?;
    match Journal::open(directory, &identity.worker, identity.epoch) {
        Ok(journal) => Some(journal),
        Err(error) => {
            tracing::warn!("{error}: serving without a journal");
            None
        }
    }
}

fn serve(config: &Config, flags: &Flags, prepared: Prepared) -> anyhow::Result<()> {
    let parts = assemble(config, prepared)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let shutdown = process::shutdown_reason(flags.exit_on_stdin_eof)
            .context("cannot watch for signals and standard input")?;
        let shutdown = async { tracing::info!(reason = shutdown.await, "told to stop") };
        let dealer_config = DealerConfig {
            liveness: Some(LIVENESS_HEARTBEATS * HEARTBEAT),
            ..DealerConfig::default()
        };
        let dealer = Dealer::connect(&config.endpoint, dealer_config)?;
        let worker = &parts.identity.worker;
        tracing::info!(%worker, endpoint = %config.endpoint, "serving");
        Service::serve(parts, dealer, shutdown, config.grace).await?;
        Ok(())
    })
}

/// A random number: the broker tells a restarted worker from the old one by it, and a temporary
/// directory has a name that nobody guesses.
fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(u64::from_le_bytes(bytes))
}
