//! Decisions over small farms, and what holds for every farm.

use proptest::prelude::*;
use protocol::{
    AdapterId, Dtype, Family, ModelDigest, WorkerName,
    reply::{ModelInfo, Refusal},
    worker::Inventory,
};

use super::{Ask, Busy, Decision, LaneInfo, Needed, RoutingTable};
use crate::{
    Health,
    cost::{CostModel, Shape, Tier},
    peer::WorkerPeer,
};

const MIB: u64 = 1 << 20;

#[test]
fn the_holder_wins_until_loading_elsewhere_is_faster() {
    let mut farm = Farm::new(2);
    farm.holds(0, &["anime"]);
    // 100 MiB over the network take a third of a second, and computing 5 ms.
    let stack = [stored("anime", 100 * MIB)];
    let picked = farm.decide(&stack).unwrap();
    assert_eq!((picked.peer, picked.score.load), (peer(0), 0));

    farm.busy(0, 1, 300_000);
    assert_eq!(farm.decide(&stack).unwrap().peer, peer(0), "waiting is faster than loading");
    farm.busy(0, 2, 300_000);
    let waits = farm.decide(&stack).unwrap();
    assert_eq!((waits.peer, waits.free), (peer(0), false));
    farm.busy(0, 2, 500_000);
    let spilled = farm.decide(&stack).unwrap();
    assert_eq!((spilled.peer, spilled.free), (peer(1), true));
    assert!(spilled.score.load > 300_000);
}

#[test]
fn a_nearer_tier_beats_a_farther_one() {
    let mut farm = Farm::new(4);
    let stack = [stored("anime", 100 * MIB)];
    let ids = vec![id("anime")];
    farm.table.set_inventory(peer(1), &Inventory { disk: ids.clone(), ..loaded() }, []);
    assert_eq!(farm.decide(&stack).unwrap().peer, peer(1));
    farm.table.set_inventory(peer(2), &Inventory { host: ids.clone(), ..loaded() }, []);
    assert_eq!(farm.decide(&stack).unwrap().peer, peer(2));
    farm.table.set_inventory(peer(3), &Inventory { device: ids, ..loaded() }, []);
    assert_eq!(farm.decide(&stack).unwrap().peer, peer(3));
    farm.table.set_inventory(peer(3), &loaded(), []);
    assert_eq!(farm.decide(&stack).unwrap().peer, peer(2), "what was let go of is not believed");
}

#[test]
fn a_worker_that_has_the_model_loaded_is_preferred() {
    let mut farm = Farm::new(3);
    for number in [0, 2] {
        farm.table.set_inventory(peer(number), &Inventory::default(), []);
    }
    assert_eq!(farm.decide(&[]).unwrap().peer, peer(1));
}

#[test]
fn every_broker_gives_a_cold_adapter_the_same_home_and_adapters_spread() {
    let home = |seed, name: &str| {
        let mut farm = Farm::seeded(8, seed);
        farm.decide(&[stored(name, MIB)]).unwrap().peer
    };
    let names: Vec<_> = (0..64).map(|number| format!("adapter {number}")).collect();
    let homes: Vec<_> = names.iter().map(|name| home(1, name)).collect();
    assert_eq!(homes, names.iter().map(|name| home(2, name)).collect::<Vec<_>>());
    for number in 0..8 {
        assert!(homes.contains(&peer(number)), "worker {number} is nobody's home");
    }
}

#[test]
fn a_home_that_is_busy_is_passed_over() {
    let mut farm = Farm::new(8);
    let stack = [stored("anime", MIB)];
    let home = farm.decide(&stack).unwrap().peer;
    farm.table.set_busy(home, Busy { taken: 1, free_at_us: 50_000, floor_us: 0 });
    assert_ne!(farm.decide(&stack).unwrap().peer, home);
}

#[test]
fn what_a_worker_was_given_it_will_hold() {
    let mut farm = Farm::new(4);
    let stack = [stored("anime", 100 * MIB)];
    let first = farm.decide(&stack).unwrap();
    farm.give(first.peer, &stack);
    assert_eq!(farm.decide(&stack).unwrap().peer, first.peer);
    assert_eq!(farm.decide(&stack).unwrap().score.load, 0);
}

#[test]
fn idle_workers_share_what_comes() {
    let mut farm = Farm::new(16);
    let mut given = [0; 16];
    for number in 0..1600 {
        farm.number = number;
        let picked = farm.decide(&[]).unwrap().peer;
        farm.give(picked, &[]);
        given[(0..16).position(|number| peer(number) == picked).unwrap()] += 1;
    }
    assert!(given.iter().all(|&count| (80..120).contains(&count)), "{given:?}");
}

#[test]
fn whoever_cannot_or_will_not_is_refused_by_name() {
    let mut farm = Farm::new(7);
    farm.holds(0, &["kept"]);
    farm.table.set_draining(peer(1), true);
    farm.table.set_health(peer(2), Health::Ejected);
    farm.table.insert(peer(3), LaneInfo { slots: 0, ..lane(&name(3), &[model("sd15")]) });
    farm.table.insert(peer(4), lane(&name(4), &[model("sdxl")]));
    farm.died_on = vec![peer(5)];
    farm.holds(5, &["kept"]);
    farm.holds(2, &["kept"]);

    let kept = [Needed { adapter: id("kept"), stored_bytes: None }];
    let refused = farm.refusals(&kept);

    assert_eq!(
        refused,
        [
            None,
            Some(Refusal::Draining),
            Some(Refusal::Ejected),
            Some(Refusal::NoSlots),
            Some(Refusal::NotServed),
            Some(Refusal::DiedHere),
            Some(Refusal::LacksAdapter),
        ]
    );
    assert_eq!(farm.decide(&kept).unwrap().peer, peer(0));
}

#[test]
fn whoever_fails_is_better_than_nobody() {
    let mut farm = Farm::new(2);
    farm.table.set_health(peer(0), Health::Ejected);
    farm.table.set_draining(peer(1), true);
    assert_eq!(farm.decide(&[]).unwrap().peer, peer(0));
    farm.table.set_health(peer(0), Health::Well);
    farm.died_on = vec![peer(0)];
    assert_eq!(farm.decide(&[]).unwrap().peer, peer(0));
    farm.table.set_draining(peer(0), true);
    assert_eq!(farm.decide(&[]), None);
}

#[test]
fn a_probed_worker_has_one_slot() {
    let mut farm = Farm::new(1);
    farm.table.set_health(peer(0), Health::Probing);
    assert!(farm.decide(&[]).unwrap().free);
    farm.busy(0, 1, 1000);
    assert!(!farm.decide(&[]).unwrap().free);
}

#[test]
fn a_slow_worker_is_known_to_be_slow() {
    let mut farm = Farm::new(2);
    for _ in 0..50 {
        farm.table.observe_speed(peer(0), 50_000.0, 5_000);
    }
    for number in 0..20 {
        farm.number = number;
        assert_eq!(farm.decide(&[]).unwrap().peer, peer(1));
    }
    farm.busy(1, 1, 100_000);
    assert_eq!(farm.decide(&[]).unwrap().peer, peer(0), "slow is better than busy");
}

#[test]
fn a_number_that_is_used_again_has_nothing_of_the_worker_before() {
    let mut farm = Farm::new(2);
    farm.holds(0, &["anime"]);
    farm.table.remove(peer(0));
    farm.table.insert(peer(9), lane(&name(9), &[model("sd15")]));
    farm.table.set_inventory(peer(9), &loaded(), []);
    assert!(!farm.table.holds(peer(9), &id("anime")));
    assert!(farm.decide(&[stored("anime", MIB)]).unwrap().score.load > 0);
}

proptest! {
    #[test]
    fn the_decision_is_what_explain_says(
        workers in prop::collection::vec((0_usize..3, 0_u64..100_000, any::<bool>(), 0_u8..16), 1..12),
        needed in 0_u8..16,
        number: u64,
    ) {
        let names = ["a", "b", "c", "d"];
        let chosen = |bits: u8| {
            (0..4).filter(move |bit| bits & (1 << bit) != 0).map(|bit| names[bit])
        };
        let mut farm = Farm::new(workers.len() as u64);
        farm.number = number;
        for (number, &(taken, us, draining, held)) in (0..).zip(&workers) {
            farm.holds(number, &chosen(held).collect::<Vec<_>>());
            farm.busy(number, taken, us);
            farm.table.set_draining(peer(number), draining);
        }
        let stack: Vec<_> = chosen(needed).map(|name| stored(name, 10 * MIB)).collect();
        let decision = farm.decide(&stack);
        let verdicts = farm.explain(&stack);
        let scores = verdicts.iter().filter_map(|verdict| verdict.score.ok());
        match decision {
            None => prop_assert_eq!(scores.count(), 0),
            Some(decision) => {
                let best = scores.map(|score| score.total()).min().unwrap();
                prop_assert!(decision.score.total() <= best + best / super::SLACK_COLD.0);
                let same = |v: &&super::Verdict| v.peer == decision.peer;
                let verdict = verdicts.iter().find(same).unwrap();
                prop_assert_eq!(verdict.score, Ok(decision.score));
                prop_assert_eq!(verdict.free, decision.free);
            }
        }
        prop_assert_eq!(farm.decide(&stack), decision, "deciding changes nothing");
    }

    #[test]
    fn the_index_of_holders_follows_whatever_workers_report(
        reports in prop::collection::vec((0_u64..4, 0_u8..16, 0_u8..16, any::<bool>()), 0..40),
    ) {
        let names = ["a", "b", "c", "d"];
        let ids = |bits: u8| -> Vec<AdapterId> {
            (0..4).filter(|bit| bits & (1 << bit) != 0).map(|bit| id(names[bit])).collect()
        };
        let mut farm = Farm::new(4);
        let mut truth = vec![(0, 0); 4];
        for (number, device, disk, leaves) in reports {
            if leaves {
                farm.table.remove(peer(number));
                farm.table.insert(peer(number), lane(&name(number), &[model("sd15")]));
                truth[usize::try_from(number).unwrap()] = (0, 0);
            } else {
                let inventory = Inventory { device: ids(device), disk: ids(disk), ..loaded() };
                farm.table.set_inventory(peer(number), &inventory, []);
                truth[usize::try_from(number).unwrap()] = (device, disk);
            }
        }
        for (number, &(device, disk)) in (0..).zip(&truth) {
            for (bit, text) in names.iter().enumerate() {
                let held = (device | disk) & (1 << bit) != 0;
                prop_assert_eq!(farm.table.holds(peer(number), &id(text)), held);
            }
        }
        for (bit, text) in names.iter().enumerate() {
            let held = truth.iter().filter(|(device, disk)| (device | disk) & (1 << bit) != 0);
            prop_assert_eq!(farm.table.lanes.holders(&id(text)).len(), held.count());
        }
    }
}

/// Workers `gpu-0`, `gpu-1`, ... of two slots that have `sd15` loaded.
struct Farm {
    table: RoutingTable,
    costs: CostModel,
    died_on: Vec<WorkerPeer>,
    number: u64,
}

impl Farm {
    fn new(workers: u64) -> Self {
        Self::seeded(workers, 0)
    }

    fn seeded(workers: u64, seed: u64) -> Self {
        let mut table = RoutingTable::new(seed);
        for number in 0..workers {
            table.insert(peer(number), lane(&name(number), &[model("sd15")]));
            table.set_inventory(peer(number), &loaded(), []);
        }
        Self { table, costs: CostModel::default(), died_on: Vec::new(), number: 0 }
    }

    fn holds(&mut self, number: u64, names: &[&str]) {
        let device = names.iter().map(|name| id(name)).collect();
        self.table.set_inventory(peer(number), &Inventory { device, ..loaded() }, []);
    }

    fn busy(&mut self, number: u64, taken: usize, us: u64) {
        self.table.set_busy(peer(number), Busy { taken, free_at_us: us, floor_us: 0 });
    }

    fn decide(&mut self, stack: &[Needed]) -> Option<Decision> {
        let shape = shape(stack);
        let (table, ask) = (&mut self.table, ask(&shape, stack, &self.died_on, self.number));
        table.decide(&ask, &self.costs, 0)
    }

    fn give(&mut self, peer: WorkerPeer, stack: &[Needed]) {
        let shape = shape(stack);
        self.table.given(peer, &ask(&shape, stack, &[], 0));
    }

    fn explain(&mut self, stack: &[Needed]) -> Vec<super::Verdict> {
        let shape = shape(stack);
        let (table, ask) = (&mut self.table, ask(&shape, stack, &self.died_on, self.number));
        table.explain(&ask, &self.costs, 0)
    }

    fn refusals(&mut self, stack: &[Needed]) -> Vec<Option<Refusal>> {
        self.explain(stack).into_iter().map(|verdict| verdict.score.err()).collect()
    }
}

fn ask<'a>(
    shape: &'a Shape,
    adapters: &'a [Needed],
    died_on: &'a [WorkerPeer],
    number: u64,
) -> Ask<'a> {
    Ask { shape, digest: None, adapters, died_on, number }
}

fn shape(stack: &[Needed]) -> Shape {
    Shape { model: "sd15".parse().unwrap(), chunks: 1, stack: !stack.is_empty() }
}

fn lane<'a>(name: &'a WorkerName, models: &'a [ModelInfo]) -> LaneInfo<'a> {
    LaneInfo { name, models, slots: 2, draining: false }
}

fn model(name: &str) -> ModelInfo {
    ModelInfo {
        name: name.parse().unwrap(),
        digest: ModelDigest::of(name.as_bytes()),
        family: Family::Sd15,
        weights_dtype: Dtype::Float16,
        bytes: 250 * MIB,
        chunk_tokens: std::collections::BTreeMap::new(),
    }
}

fn loaded() -> Inventory {
    Inventory { models: vec!["sd15".parse().unwrap()], ..Inventory::default() }
}

fn stored(name: &str, bytes: u64) -> Needed {
    Needed { adapter: id(name), stored_bytes: Some(bytes) }
}

fn id(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}

fn name(number: u64) -> WorkerName {
    format!("gpu-{number}").parse().unwrap()
}

fn peer(number: u64) -> WorkerPeer {
    WorkerPeer::new(number)
}

#[test]
fn a_load_is_named_when_all_of_it_comes_from_one_place() {
    let mut farm = Farm::new(1);
    let stack = [stored("a", 10), stored("b", 20), stored("c", 40)];
    farm.holds(0, &["a"]);
    let decision = farm.decide(&stack).unwrap();
    let loading = farm.table.loading(&decision, &stack);
    assert_eq!((loading.from, loading.any), (Some((Tier::Broker, 60)), true));
    let mixed = Inventory { disk: vec![id("b")], ..loaded() };
    farm.table.set_inventory(peer(0), &mixed, []);
    let decision = farm.decide(&stack).unwrap();
    assert_eq!(farm.table.loading(&decision, &stack).from, None);
    farm.holds(0, &["a", "b", "c"]);
    let decision = farm.decide(&stack).unwrap();
    let loading = farm.table.loading(&decision, &stack);
    assert_eq!((loading.from, loading.any), (None, false));
}
