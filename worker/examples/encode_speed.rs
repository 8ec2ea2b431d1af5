//! How long the engine takes on this machine, and how much memory it holds: seeded weights of true
//! size, one prompt at a time, without and with a LoRA, in every mode.
//!
//! `cargo run --release -p luna-worker --example encode_speed -- [sd15|sdxl] [rounds]`

use std::{error::Error, fs, sync::Arc, time::Instant};

use candle_core::Device;
use fixtures::{Naming, Size, seeded_lora, to_safetensors, write_encoder};
use luna_worker::{
    conditioning::PromptTokens,
    execution::{EncodeJob, ModeSettings, Modes, StackEntry},
    weights::load,
};
use protocol::{CHUNK_TOKENS, ComponentTokens, Dtype, ExecutionMode, Family};

#[expect(clippy::print_stdout, reason = "the numbers are what it is for")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let family: Family = arguments.next().as_deref().unwrap_or("sd15").parse()?;
    let rounds: usize = arguments.next().as_deref().unwrap_or("10").parse()?;

    let folder = tempfile::tempdir()?;
    let mut files = Vec::new();
    for &component in family.components() {
        let file = folder.path().join(component.as_str()).join("model.safetensors");
        write_encoder(&file, Size::Full, component, Dtype::Float16, Naming::Hf)?;
        files.push(file.display().to_string());
    }
    let spec = format!("bench={family}:{}", files.join(",")).parse()?;
    let start = Instant::now();
    let model = load(&spec, Dtype::Float16, &Device::Cpu)?;
    let loaded = start.elapsed();
    let bytes = model.parameter_count() * 4;
    println!("load {loaded:.1?}, weights as f32 {} MiB", bytes >> 20);
    report_memory(bytes)?;

    let prompt = family.components().iter().map(|&component| {
        let chunks = vec![prompt::empty_chunk(component, CHUNK_TOKENS)];
        (component, ComponentTokens { chunks, ..ComponentTokens::default() })
    });
    let prompt: PromptTokens = prompt.collect();
    let file = to_safetensors(&seeded_lora(Size::Full, family, 1, 16))?;
    let adapter = adapter::read_lora(file.as_slice())?.0;
    let entry = StackEntry {
        id: adapter.id(),
        adapter: Arc::new(adapter),
        strength_patch: 0.8,
        strength_model: 1.0,
    };
    let base = EncodeJob::new([prompt.clone()], vec![]);
    let stacked = EncodeJob::new([prompt], vec![entry]);
    let (functional, locking) = (ExecutionMode::Functional, ExecutionMode::Locking);
    for (label, job, mode, merged_budget_bytes) in [
        ("base", &base, functional, 0),
        ("LoRA of rank 16, FUNCTIONAL", &stacked, functional, 0),
        ("LoRA of rank 16, LOCKING", &stacked, locking, 0),
        ("LoRA of rank 16, FUNCTIONAL, merged weights kept", &stacked, functional, u64::MAX),
    ] {
        let settings = ModeSettings { mode, merged_budget_bytes, ..ModeSettings::default() };
        let execution = Modes::new(settings);
        let mut times = Vec::new();
        for _ in 0..rounds {
            let start = Instant::now();
            execution.encode(&model, job)?;
            times.push(start.elapsed());
        }
        times.sort();
        println!("{label}: fastest {:.1?}, median {:.1?}", times[0], times[rounds / 2]);
        report_memory(bytes)?;
    }
    Ok(())
}

/// Prints resident memory now and at its highest, as parts of the weights in f32.
#[expect(clippy::print_stdout, reason = "the numbers are what it is for")]
#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52")]
fn report_memory(weights_bytes: usize) -> Result<(), Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    for field in ["VmHWM", "VmRSS", "RssAnon"] {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
        let kib: usize = line.split_whitespace().nth(1).unwrap_or("0").parse()?;
        println!(
            "  {field} {} MiB = {:.2} x weights",
            kib >> 10,
            (kib << 10) as f64 / weights_bytes as f64
        );
    }
    Ok(())
}
