//! Routing decisions over a large farm: 1,024 workers that hold 200 of 10,000 adapters each.
//!
//! `cargo bench -p luna-broker-core --bench routing`; one iteration is one decision and noting it.

use std::collections::BTreeMap;

use criterion::{Criterion, criterion_group, criterion_main};
use luna_broker_core::{
    WorkerPeer,
    cost::{CostModel, Shape},
    routing::{Ask, Busy, LaneInfo, Needed, RoutingTable},
};
use protocol::{
    AdapterId, Dtype, Family, ModelDigest, WorkerName, reply::ModelInfo, worker::Inventory,
};

const WORKERS: u64 = 1024;
const ADAPTERS: u64 = 10_000;
const HELD: u64 = 200;
const ADAPTER_BYTES: u64 = 20 << 20;

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide among 1024 workers");
    for (name, adapters) in [("no adapters", 0), ("one adapter", 1), ("three adapters", 3)] {
        let (mut table, costs) = (farm(), CostModel::default());
        let shape = Shape { model: MODEL.parse().expect("a name"), chunks: 1, stack: adapters > 0 };
        let mut number = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                number += 1;
                decide(&mut table, &costs, (number, adapters), &shape)
            });
        });
    }
    group.finish();
}

/// One request for adapters of Zipf-like popularity; the worker is busy with it from then on.
fn decide(
    table: &mut RoutingTable,
    costs: &CostModel,
    (number, adapters): (u64, u64),
    shape: &Shape,
) -> u64 {
    let stack: Vec<_> = (0..adapters)
        .map(|entry| {
            let draw = spread(number * 8 + entry) % ADAPTERS;
            let popular = draw * draw / ADAPTERS;
            Needed { adapter: adapter(popular), stored_bytes: Some(ADAPTER_BYTES) }
        })
        .collect();
    let ask = Ask { shape, digest: None, adapters: &stack, died_on: &[], number };
    let now_us = number * 5;
    let decision = table.decide(&ask, costs, now_us).expect("somebody can do it");
    let free_at_us = now_us + decision.score.total();
    table.set_busy(decision.peer, Busy { taken: 1, free_at_us, floor_us: 0 });
    decision.score.total()
}

fn farm() -> RoutingTable {
    let mut table = RoutingTable::new(0);
    let models = [model()];
    for worker in 0..WORKERS {
        let name: WorkerName = format!("gpu-{worker}").parse().expect("a name");
        let peer = WorkerPeer::new(worker);
        table.insert(peer, LaneInfo { name: &name, models: &models, slots: 2, draining: false });
        let device = (0..HELD).map(|held| adapter(spread(worker * HELD + held) % ADAPTERS));
        let models = vec![MODEL.parse().expect("a name")];
        let inventory = Inventory { device: device.collect(), models, ..Inventory::default() };
        table.set_inventory(peer, &inventory, []);
    }
    table
}

fn model() -> ModelInfo {
    ModelInfo {
        name: MODEL.parse().expect("a name"),
        digest: ModelDigest::of(b"sdxl"),
        family: Family::Sdxl,
        weights_dtype: Dtype::Float16,
        bytes: 1 << 30,
        chunk_tokens: BTreeMap::new(),
    }
}

fn adapter(number: u64) -> AdapterId {
    let mut digest = [0; 32];
    for (index, bytes) in digest.chunks_mut(8).enumerate() {
        bytes.copy_from_slice(&spread(number * 4 + index as u64).to_le_bytes());
    }
    AdapterId::from_bytes(digest)
}

/// `SplitMix64` of a number.
fn spread(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const MODEL: &str = "sdxl-base";

criterion_group!(benches, decisions);
criterion_main!(benches);
