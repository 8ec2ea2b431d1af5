//! Many more adapters than there is room for, counted against a plain model of LRU.

use std::{collections::VecDeque, time::Duration};

use super::*;
use crate::Counters;

const ADAPTERS: u64 = 10_000;
const CAPACITY: usize = 50;

#[test]
fn ten_thousand_adapters_through_room_for_fifty_are_counted_exactly() {
    let mut farm = Farm::new(0);
    let mut reference = Reference::default();
    for number in requests() {
        farm.encode(number);
        reference.encode(number);
    }
    let counters = farm.scheduler.registry().counters();
    let Reference { hits, misses, evictions, .. } = reference;
    assert_eq!(counters, Counters { hits, misses, evictions, ..Counters::default() });
    assert!(hits > 1_000 && misses >= ADAPTERS, "the mix is a mix: {counters:?}");

    let registry = farm.scheduler.registry();
    let resident: Vec<_> = registry.on_device().collect();
    let expected: Vec<_> = reference.order.iter().rev().map(|number| id(*number)).collect();
    assert_eq!(resident, expected, "most recently used first");
    assert_eq!(registry.device_bytes(), CAPACITY as u64);
}

#[test]
fn with_a_disk_every_adapter_is_fetched_once() {
    let mut farm = Farm::new(ADAPTERS);
    let mut reference = Reference::default();
    for number in requests() {
        farm.encode(number);
        reference.encode(number);
    }
    let counters = farm.scheduler.registry().counters();
    let Reference { hits, misses, evictions, .. } = reference;
    let disk_hits = misses - ADAPTERS;
    let expected = Counters { hits, disk_hits, misses: ADAPTERS, evictions, host_hits: 0 };
    assert_eq!(counters, expected);
    assert_eq!(farm.scheduler.registry().disk_bytes(), ADAPTERS);
}

/// Every adapter once, and after each a few recent and a few old ones again.
fn requests() -> impl Iterator<Item = u64> {
    (0..ADAPTERS).flat_map(|number| {
        // A multiplicative hash stands in for chance.
        let mixed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        let recent = number.saturating_sub(mixed % 70);
        let old = mixed % (number + 1);
        [Some(number), Some(recent), (mixed % 5 == 0).then_some(old)].into_iter().flatten()
    })
}

/// LRU as the textbook has it, with room for [`CAPACITY`] adapters of one byte.
#[derive(Default)]
struct Reference {
    /// The one used longest ago in front.
    order: VecDeque<u64>,
    hits: u64,
    misses: u64,
    evictions: u64,
}

impl Reference {
    fn encode(&mut self, number: u64) {
        match self.order.iter().position(|held| *held == number) {
            Some(index) => {
                self.hits += 1;
                self.order.remove(index);
            }
            None => self.misses += 1,
        }
        self.order.push_back(number);
        if self.order.len() > CAPACITY {
            self.order.pop_front();
            self.evictions += 1;
        }
    }
}

/// A scheduler whose shell does at once what it is told.
struct Farm {
    scheduler: Scheduler,
    dispatches: u64,
    now: Instant,
}

impl Farm {
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn new(disk_budget_bytes: u64) -> Self {
        let device_budget_bytes = CAPACITY as u64;
        let tiers = Tiers { device_budget_bytes, disk_budget_bytes, ..Tiers::default() };
        let config = Config { lanes: 1, tiers, model_budget_bytes: None };
        let mut scheduler = Scheduler::new(config);
        scheduler.register_model("sd15".parse().unwrap(), 1).unwrap();
        Self { scheduler, dispatches: 0, now: Instant::now() }
    }

    fn encode(&mut self, number: u64) {
        self.dispatches += 1;
        let adapters = BTreeSet::from([id(number)]);
        let needs = Needs { model: "sd15".parse().unwrap(), exclusive: false, adapters };
        let deadline = self.now + Duration::from_secs(10);
        self.scheduler.handle_work(DispatchId(self.dispatches), needs, deadline, self.now);
        let mut ran = 0;
        while let Some(command) = self.scheduler.poll_command() {
            match command.clone() {
                Command::Fetch(adapter) => {
                    self.scheduler.handle_loaded(adapter, 1, Origin::Broker, self.now);
                }
                Command::ReadDisk(adapter) => {
                    self.scheduler.handle_loaded(adapter, 1, Origin::Disk, self.now);
                }
                Command::Run(run) => {
                    ran += 1;
                    self.scheduler.handle_finished(run.dispatch, self.now);
                }
                Command::WriteDisk(_) | Command::Forget(_, Place::Memory) => {}
                Command::Prefetch(_)
                | Command::StopFetch(_)
                | Command::Promote(_)
                | Command::Demote(_)
                | Command::Forget(_, Place::Disk)
                | Command::LoadModel(_)
                | Command::UnloadModel(_)
                | Command::Interrupt(_)
                | Command::Fail(..) => panic!("unexpected: {command:?}"),
            }
        }
        assert_eq!(ran, 1);
    }
}

fn id(number: u64) -> AdapterId {
    AdapterId::of(&number.to_le_bytes())
}
