//! Settings about memory and disk: how much of what is kept where.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use settings::{Reader, Settings, Time, within};
use worker_core::Tiers;

use super::{Directory, is_usable};

/// Most megabytes that a budget may have: a terabyte.
pub(super) const MB_MAX: u64 = 1 << 20;

/// Megabytes of the cache on disk, if there is one, unless told otherwise.
const DISK_MB_DEFAULT: u64 = 10 << 10;

/// Flags about memory and disk.
#[derive(Debug, Default, Args)]
pub(super) struct MemoryFlags {
    /// Memory for adapters on the device; those of one request must fit into it
    #[arg(long, value_name = "MB")]
    adapter_budget_mb: Option<String>,
    /// Main memory for adapters that left the device; 0 on a CPU, where both are one
    #[arg(long, value_name = "MB")]
    host_budget_mb: Option<String>,
    /// Directory in which adapters and uploaded models are kept over restarts, for this worker alone
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Disk space for adapters in the cache
    #[arg(long, value_name = "MB")]
    disk_budget_mb: Option<String>,
    /// Time without use after which an adapter leaves memory, for example 10m
    #[arg(long, value_name = "TIME")]
    adapter_ttl: Option<String>,
    /// Memory for models; those that do not fit are loaded when a request needs them. One that is
    /// being registered is read beside them
    #[arg(long, value_name = "MB")]
    model_budget_mb: Option<String>,
}

/// What may be kept where.
#[derive(Debug, Clone)]
pub(crate) struct MemoryConfig {
    /// Budgets of the adapters.
    pub(crate) tiers: Tiers,
    /// Where the cache on disk is, if there is one.
    pub(crate) cache: Option<PathBuf>,
    /// Bytes of all models in memory; unlimited without.
    pub(crate) model_budget_bytes: Option<u64>,
}

impl MemoryFlags {
    /// Puts what was given on the command line over the other sources.
    pub(super) fn set(&self, settings: Settings) -> Settings {
        settings
            .set_if("worker.adapter_budget_mb", self.adapter_budget_mb.as_ref())
            .set_if("worker.host_budget_mb", self.host_budget_mb.as_ref())
            .set_if("worker.cache", self.cache.as_ref().map(|path| path.display()))
            .set_if("worker.disk_budget_mb", self.disk_budget_mb.as_ref())
            .set_if("worker.adapter_ttl", self.adapter_ttl.as_ref())
            .set_if("worker.model_budget_mb", self.model_budget_mb.as_ref())
    }
}

impl MemoryConfig {
    pub(super) fn read(reader: &mut Reader) -> Self {
        let adapter_mb: u64 = reader.get(
            "worker.adapter_budget_mb",
            "memory for adapters on the device",
            1024,
            within(1..=MB_MAX),
        );
        let host_mb: u64 = reader.get(
            "worker.host_budget_mb",
            "main memory for adapters that left the device",
            0,
            within(0..=MB_MAX),
        );
        let cache: Option<Directory> = reader.get_optional(
            "worker.cache",
            "directory in which adapters and uploaded models are kept over restarts",
            is_usable,
        );
        let disk_mb: u64 = reader.get(
            "worker.disk_budget_mb",
            "disk space for adapters in the cache",
            DISK_MB_DEFAULT,
            within(1..=64 * MB_MAX),
        );
        let ttl = reader.get_optional(
            "worker.adapter_ttl",
            "time without use after which an adapter leaves memory",
            is_positive,
        );
        let model_mb: Option<u64> = reader.get_optional(
            "worker.model_budget_mb",
            "memory for models",
            within(1..=16 * MB_MAX),
        );
        let tiers = Tiers {
            device_budget_bytes: adapter_mb << 20,
            host_budget_bytes: host_mb << 20,
            disk_budget_bytes: if cache.is_some() { disk_mb << 20 } else { 0 },
            ttl: ttl.map(|ttl| ttl.0),
        };
        let model_budget_bytes = model_mb.map(|mb| mb << 20);
        Self { tiers, cache: cache.map(|Directory(path)| path), model_budget_bytes }
    }
}

fn is_positive(time: &Time) -> Result<(), String> {
    if time.0 > Duration::ZERO { Ok(()) } else { Err("write a time above 0s".to_owned()) }
}
