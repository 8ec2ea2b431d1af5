//! The speed and size figures of a farm on this machine:
//! `cargo run --release --package luna-e2e --example figures`.
//!
//! It starts farms of real processes and prints medians; nothing is asserted, because other
//! programs share the machine.

#![expect(clippy::print_stdout, reason = "printing is what it is for")]

use std::time::Instant;

use fixtures::Size;
use luna_client::{Client, Dtype, EncodeRequest, Family};
use luna_e2e::{Cluster, models};

/// Encodes that are measured, after some that are not.
const ROUNDS: usize = 40;
const WARM_UP: usize = 5;

/// Parameters of CLIP-L that a worker holds.
const PARAMETERS: f64 = 123_060_480.0;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    start_up().await;
    let model = models::spec("full", Size::Full, Family::Sd15, Dtype::Float16);
    let mut cluster =
        Cluster::new().model(&model).weights_dtype(Dtype::Float16).threads(2).start().await;
    let client = cluster.client().await;
    let worker = cluster.worker(0);
    println!("CLIP-L at true size, one CPU worker with 2 threads, float16 weights, f32 math");
    let share = |bytes: u64| {
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = bytes as f64 / (PARAMETERS * 4.0);
        format!("{} MB, {ratio:.2} of the weights in f32", bytes >> 20)
    };
    println!("  memory after loading: {}", share(worker.resident_bytes()));
    println!("  peak while loading:   {}", share(worker.resident_bytes_peak()));
    overhead(&client, "no LoRA", |request| request).await;
    let path = models::seeded_lora(Size::Full, 1, 16);
    let adapter = client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter;
    overhead(&client, "one LoRA of rank 16", |request| request.lora(adapter, 0.8)).await;
    let worker = cluster.worker(0);
    println!("  peak with LoRAs:      {}", share(worker.resident_bytes_peak()));
}

/// From starting the processes to the first encode of a farm of two workers with tiny models.
async fn start_up() {
    let model = models::tiny_sd15();
    let mut times = Vec::new();
    for _ in 0..5 {
        let started = Instant::now();
        let cluster = Cluster::new().workers(2).model(&model).start().await;
        let client = cluster.client().await;
        client.encode(EncodeRequest::new("tiny").prompt("a cat")).await.expect("the farm answers");
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    println!(
        "broker and 2 workers with tiny models, start to first answer: {:.0} ms",
        median(&mut times)
    );
}

/// What the farm adds to the worker's own computing, seen from the client.
async fn overhead(client: &Client, name: &str, with: impl Fn(EncodeRequest) -> EncodeRequest) {
    let (mut totals, mut computes, mut overheads) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM_UP + ROUNDS {
        let request = with(EncodeRequest::new("full").prompt("a photo of a red cat"));
        let started = Instant::now();
        let encoding = client.encode(request).await.expect("the farm answers");
        let total = started.elapsed().as_secs_f64() * 1e3;
        if round >= WARM_UP {
            totals.push(total);
            computes.push(encoding.receipt.times.compute_ms);
            overheads.push(total - encoding.receipt.times.compute_ms);
        }
    }
    let worst = overheads.iter().copied().fold(0.0, f64::max);
    println!(
        "  {name}: {:.1} ms at the client, {:.1} ms on the device, the farm adds {:.2} ms (worst {worst:.2} ms)",
        median(&mut totals),
        median(&mut computes),
        median(&mut overheads)
    );
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
