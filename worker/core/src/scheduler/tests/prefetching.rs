//! Scenarios of adapters that come before a dispatch needs them.

use super::*;

const MINUTE: Duration = Duration::from_mins(1);

#[test]
fn adapters_are_prefetched_one_after_the_other_and_then_found() {
    let mut world = World::new();
    world.prefetch(&["anime", "photo", "anime"]);
    assert_eq!(world.commands(), ["prefetch anime"]);
    assert_eq!(world.prefetching(), [id("anime"), id("photo")]);
    world.load("anime", 10);
    assert_eq!(world.commands(), ["write anime", "prefetch photo"]);
    world.load("photo", 20);
    assert_eq!(world.commands(), ["write photo"]);
    assert_eq!(world.prefetching(), []);
    assert_eq!(world.scheduler.registry().device_bytes(), 30);

    world.work(1, &["anime"]);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Resident);
    world.prefetch(&["anime"]);
    assert_eq!(world.prefetching(), [], "it is there");
}

#[test]
fn a_dispatch_makes_a_prefetch_urgent_and_takes_it_over() {
    let mut world = World::new();
    world.prefetch(&["anime", "photo"]);
    world.work(1, &["anime"]);
    assert_eq!(world.commands(), ["prefetch anime", "fetch anime", "prefetch photo"]);
    world.cancel(1);
    assert_eq!(world.commands(), ["stop anime"], "nobody waits for it, and nobody wished for it");
    assert_eq!(world.prefetching(), [id("photo")]);
}

#[test]
fn nothing_that_is_in_use_or_was_used_lately_leaves_for_a_prefetch() {
    let mut world = World::with(without_disk(0));
    world.work(1, &["anime"]);
    world.load("anime", 60);
    world.commands();
    world.prefetch(&["photo"]);
    assert_eq!(world.commands(), ["prefetch photo"]);
    world.scheduler.handle_size(id("photo"), 50, world.now);
    assert_eq!(world.commands(), ["stop photo"], "given up before its bytes come");

    world.finish(1);
    world.prefetch(&["photo"]);
    world.load("photo", 50);
    assert_eq!(world.commands(), ["prefetch photo", "forget photo"]);

    world.now += MINUTE;
    world.prefetch(&["photo"]);
    world.load("photo", 50);
    assert_eq!(world.commands(), ["prefetch photo", "forget anime"]);
    assert!(world.scheduler.registry().is_in_memory(&id("photo")));
}

#[test]
fn a_prefetch_goes_to_the_host_when_the_device_is_full() {
    let mut world = World::with(without_disk(50));
    world.work(1, &["anime"]);
    world.load("anime", 80);
    world.commands();
    world.prefetch(&["photo", "style"]);
    world.load("photo", 50);
    assert_eq!(world.commands(), ["prefetch photo", "demote photo", "prefetch style"]);
    world.load("style", 20);
    assert_eq!(world.commands(), [""; 0], "there is room on the device");
    let host: Vec<_> = world.scheduler.registry().on_host().collect();
    assert_eq!(host, [id("photo")]);
}

#[test]
fn a_prefetch_without_room_in_memory_goes_to_the_disk() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.load("anime", 90);
    world.commands();
    world.prefetch(&["photo"]);
    world.load("photo", 50);
    assert_eq!(world.commands(), ["prefetch photo", "write photo", "forget photo"]);
    let disk: Vec<_> = world.scheduler.registry().on_disk().collect();
    assert_eq!(disk, [id("photo")]);
}

#[test]
fn what_is_on_disk_is_read_unless_dispatches_load_and_fetched_when_it_is_rotten() {
    let mut world = World::new();
    assert!(world.scheduler.handle_disk_found(id("anime"), 10));
    assert!(world.scheduler.handle_disk_found(id("photo"), 10));
    world.work(1, &["style"]);
    world.prefetch(&["anime", "photo"]);
    assert_eq!(world.commands(), ["fetch style"], "the disk is left to those who wait");
    world.load("style", 10);
    assert_eq!(world.commands(), ["write style", "run 1", "read anime"]);
    world.scheduler.handle_loaded(id("anime"), 10, Origin::Disk, world.now);
    assert_eq!(world.commands(), ["read photo"]);
    world.scheduler.handle_disk_lost(id("photo"));
    assert_eq!(world.commands(), ["prefetch photo"]);
    world.load("photo", 10);
    assert_eq!(world.commands(), ["write photo"]);
    assert_eq!(world.scheduler.registry().on_device().count(), 3);
}

#[test]
fn a_prefetch_is_forgotten_when_it_fails_or_is_evicted() {
    let mut world = World::new();
    world.prefetch(&["anime", "photo", "style"]);
    world.fail("anime");
    assert_eq!(world.commands(), ["prefetch anime", "prefetch photo"]);
    world.scheduler.handle_evict(&[id("photo")]);
    assert_eq!(world.commands(), ["stop photo", "prefetch style"]);
    world.scheduler.forget_prefetches();
    assert_eq!(world.commands(), ["stop style"]);
    assert_eq!(world.prefetching(), []);
}

fn without_disk(host_budget_bytes: u64) -> Config {
    let tiers = Tiers { host_budget_bytes, disk_budget_bytes: 0, ..CONFIG.tiers };
    Config { tiers, ..CONFIG }
}

impl World {
    fn prefetch(&mut self, adapters: &[&str]) {
        let adapters: Vec<_> = adapters.iter().map(|name| id(name)).collect();
        self.scheduler.handle_prefetch(&adapters);
    }

    fn prefetching(&self) -> Vec<AdapterId> {
        self.scheduler.prefetching().collect()
    }
}
