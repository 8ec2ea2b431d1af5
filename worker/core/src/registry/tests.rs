//! Scenarios of the registry alone: tiers, room, disk and time.

use super::*;
use crate::spelling::spell;

#[test]
fn the_least_recently_used_adapter_leaves_first() {
    let mut world = World::new(Tiers { device_budget_bytes: 100, ..Tiers::default() });
    world.load("a", 40);
    world.load("b", 40);
    world.touch("a");
    world.commands();

    world.load("c", 40);
    assert_eq!(world.commands(), ["fetch c", "forget b"]);
    assert_eq!(world.sources(["a", "b"]), ["resident", "broker"]);
    assert_eq!(world.registry.device_bytes(), 80);
    assert_eq!(world.registry.counters().evictions, 1);
}

#[test]
fn a_pinned_adapter_stays_and_leaves_no_room() {
    let mut world = World::new(Tiers { device_budget_bytes: 100, ..Tiers::default() });
    world.load("a", 60);
    world.pin("a");
    assert!(!world.registry.has_room([(id("b"), Some(41))]));
    assert!(world.registry.has_room([(id("b"), Some(40)), (id("a"), Some(60))]));
    world.registry.evict(id("a"), &mut world.commands);
    assert_eq!(world.sources(["a"]), ["resident"]);
}

#[test]
fn what_leaves_the_device_goes_to_the_host_and_comes_back() {
    let tiers = Tiers { device_budget_bytes: 50, host_budget_bytes: 50, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.load("b", 40);
    assert_eq!(world.commands(), ["fetch a", "fetch b", "demote a"]);
    assert_eq!(world.sources(["a", "b"]), ["host", "resident"]);

    world.touch("a");
    assert_eq!(world.commands(), ["demote b", "promote a"]);
    world.load("c", 40);
    assert_eq!(world.commands(), ["fetch c", "forget b", "demote a"]);
    assert_eq!(world.registry.counters().evictions, 1);
    assert_eq!((world.registry.device_bytes(), world.registry.host_bytes()), (40, 40));
}

#[test]
fn an_adapter_too_large_for_the_host_leaves_memory() {
    let tiers = Tiers { device_budget_bytes: 50, host_budget_bytes: 10, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.load("b", 40);
    assert_eq!(world.commands(), ["fetch a", "fetch b", "forget a"]);
}

#[test]
fn a_fetched_adapter_is_written_to_disk_and_read_from_there() {
    let tiers = Tiers { device_budget_bytes: 50, disk_budget_bytes: 1000, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.load("b", 40);
    assert_eq!(world.commands(), ["fetch a", "write a", "fetch b", "forget a", "write b"]);
    assert_eq!(world.sources(["a"]), ["disk"]);

    world.pin("a");
    assert_eq!(world.commands(), ["forget b", "read a"]);
    world.registry.arrive(&id("a"), Origin::Disk, &mut world.commands);
    assert_eq!(world.commands(), [""; 0], "it is on disk already");
    assert_eq!(world.sources(["a", "b"]), ["resident", "disk"]);
    assert_eq!(world.registry.disk_bytes(), 80);
}

#[test]
fn a_full_disk_lets_go_of_the_least_recently_used() {
    let tiers = Tiers { device_budget_bytes: 500, disk_budget_bytes: 100, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.load("b", 40);
    world.touch("a");
    world.commands();
    world.load("c", 40);
    assert_eq!(world.commands(), ["fetch c", "forget b on disk", "write c"]);
    assert_eq!(world.sources(["b"]), ["resident"]);
    world.load("d", 101);
    assert_eq!(world.commands(), ["fetch d"], "too large for the disk");
}

#[test]
fn a_rotten_copy_on_disk_is_fetched_again() {
    let tiers = Tiers { device_budget_bytes: 50, disk_budget_bytes: 100, ..Tiers::default() };
    let mut world = World::new(tiers);
    assert!(world.registry.found_on_disk(id("a"), 40));
    assert!(!world.registry.found_on_disk(id("b"), 61), "no room");
    world.pin("a");
    world.registry.lost_on_disk(id("a"), &mut world.commands);
    assert_eq!(world.commands(), ["read a", "fetch a"]);
    assert_eq!((world.registry.disk_bytes(), world.registry.device_bytes()), (0, 40));
    world.registry.arrive(&id("a"), Origin::Broker, &mut world.commands);
    assert_eq!(world.commands(), ["write a"]);
}

#[test]
fn nobody_waits_any_more() {
    let tiers = Tiers { device_budget_bytes: 50, disk_budget_bytes: 100, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.registry.found_on_disk(id("a"), 40);
    world.pin("a");
    world.unpin("a");
    world.pin("b");
    world.registry.resize(&id("b"), 50, &mut world.commands);
    world.unpin("b");
    assert_eq!(world.commands(), ["read a", "fetch b", "stop b"]);
    assert_eq!(world.sources(["a", "b"]), ["disk", "broker"]);
    assert_eq!(world.registry.device_bytes(), 0);
}

#[test]
fn an_adapter_without_use_for_the_whole_ttl_leaves_memory() {
    let ttl = Some(Duration::from_mins(1));
    let tiers = Tiers { device_budget_bytes: 50, host_budget_bytes: 50, ttl, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.now += Duration::from_secs(30);
    world.load("b", 40);
    world.commands();
    assert_eq!(world.registry.expires_at(), Some(world.now + Duration::from_secs(30)));

    world.registry.expire(world.now + Duration::from_secs(30), &mut world.commands);
    assert_eq!(world.commands(), ["forget a"]);
    world.pin("b");
    assert_eq!(world.registry.expires_at(), None, "what is in use does not expire");
    world.unpin("b");
    world.registry.expire(world.now + Duration::from_mins(1), &mut world.commands);
    assert_eq!(world.commands(), ["forget b"]);
}

#[test]
fn an_eviction_on_request_drops_every_copy_and_is_not_counted() {
    let tiers = Tiers { device_budget_bytes: 50, disk_budget_bytes: 100, ..Tiers::default() };
    let mut world = World::new(tiers);
    world.load("a", 40);
    world.commands();
    world.registry.evict(id("a"), &mut world.commands);
    assert_eq!(world.commands(), ["forget a", "forget a on disk"]);
    assert_eq!(world.registry.disk_bytes() + world.registry.device_bytes(), 0);
    assert_eq!(world.registry.counters().evictions, 0);
}

#[test]
fn the_revision_grows_with_every_change_of_what_is_where() {
    let mut world = World::new(Tiers { device_budget_bytes: 50, ..Tiers::default() });
    world.load("a", 10);
    assert_eq!(world.registry.revision(), 1);
    world.touch("a");
    assert_eq!(world.registry.revision(), 1);
    world.registry.evict(id("a"), &mut world.commands);
    assert_eq!(world.registry.revision(), 2);
}

struct World {
    registry: Registry,
    commands: VecDeque<Command>,
    now: Instant,
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn new(tiers: Tiers) -> Self {
        Self { registry: Registry::new(tiers), commands: VecDeque::new(), now: Instant::now() }
    }

    /// Fetches and uses an adapter.
    fn load(&mut self, name: &str, bytes: u64) {
        self.pin(name);
        self.registry.resize(&id(name), bytes, &mut self.commands);
        self.registry.arrive(&id(name), Origin::Broker, &mut self.commands);
        self.unpin(name);
    }

    fn touch(&mut self, name: &str) {
        self.pin(name);
        self.unpin(name);
    }

    fn pin(&mut self, name: &str) {
        self.registry.pin(&[id(name)], &mut self.commands);
    }

    fn unpin(&mut self, name: &str) {
        self.registry.unpin(&[id(name)], self.now, &mut self.commands);
    }

    fn sources<const N: usize>(&self, names: [&str; N]) -> [&'static str; N] {
        names.map(|name| match self.registry.source(&id(name)) {
            AdapterSource::Resident => "resident",
            AdapterSource::Host => "host",
            AdapterSource::Disk => "disk",
            AdapterSource::Broker => "broker",
        })
    }

    fn commands(&mut self) -> Vec<String> {
        self.commands.drain(..).map(|command| spell(&command, &["a", "b", "c", "d"])).collect()
    }
}

fn id(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}
