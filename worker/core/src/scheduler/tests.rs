//! Scenarios of the scheduler.

use std::time::Duration;

use super::*;

mod prefetching;

use crate::{Counters, spelling::spell};

#[test]
fn work_without_adapters_runs_at_once_and_one_at_a_time() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    assert_eq!(world.commands(), ["run 1"]);

    world.finish(1);
    assert_eq!(world.commands(), ["run 2"]);
}

#[test]
fn several_lanes_run_several_dispatches() {
    let mut world = World::with(Config { lanes: 2, ..CONFIG });
    for dispatch in 1..=3 {
        world.work(dispatch, &[]);
    }
    assert_eq!(world.commands(), ["run 1", "run 2"]);
    world.finish(2);
    assert_eq!(world.commands(), ["run 3"]);
}

#[test]
fn an_exclusive_dispatch_has_its_model_to_itself() {
    let mut world = World::with(Config { lanes: 3, ..CONFIG });
    world.work(1, &[]);
    world.start(2, Needs { exclusive: true, ..needs("sd15", &[]) });
    world.work(3, &[]);
    world.start(4, needs("sdxl", &[]));
    assert_eq!(world.commands(), ["run 1", "run 4"]);
    world.finish(1);
    assert_eq!(world.commands(), ["run 2"]);
    world.finish(2);
    assert_eq!(world.commands(), ["run 3"]);
}

#[test]
fn two_requests_for_a_missing_adapter_cause_one_fetch() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.work(2, &["anime"]);
    assert_eq!(world.commands(), ["fetch anime"]);

    world.load("anime", 10);
    assert_eq!(world.commands(), ["write anime", "run 1"]);
}

#[test]
fn work_that_waits_for_an_adapter_does_not_hold_up_other_work() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.work(2, &[]);
    assert_eq!(world.commands(), ["fetch anime", "run 2"]);
}

#[test]
fn a_failed_fetch_fails_everyone_who_waits_and_nobody_else() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.work(2, &["photo"]);
    world.commands();

    world.fail("anime");
    assert_eq!(world.commands(), ["fail 1 unknown_lora", "stop anime"]);
    assert!(world.scheduler.is_wanted(DispatchId(2)));
    world.work(3, &["anime"]);
    assert_eq!(world.commands(), ["fetch anime"], "the next request tries again");
}

#[test]
fn an_adapter_that_arrives_after_it_was_given_up_is_let_go() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.fail("anime");
    world.commands();

    world.load("anime", 10);
    assert_eq!(world.commands(), ["forget anime"]);
    assert_eq!(world.scheduler.registry().device_bytes(), 0);
}

#[test]
fn a_fetch_that_nobody_waits_for_any_more_is_stopped() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.work(2, &["anime"]);
    world.commands();
    world.cancel(1);
    assert_eq!(world.commands(), [""; 0]);
    world.scheduler.handle_timeout(world.now + Duration::from_secs(10));
    assert_eq!(world.commands(), ["fail 2 deadline_exceeded", "stop anime"]);
}

#[test]
fn the_receipt_says_where_an_adapter_was() {
    let mut world = World::with(Config {
        tiers: Tiers { device_budget_bytes: 10, host_budget_bytes: 10, ..CONFIG.tiers },
        ..CONFIG
    });
    world.work(1, &["anime"]);
    world.load("anime", 10);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Broker);
    world.finish(1);
    world.work(2, &["anime"]);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Resident);
    world.finish(2);
    world.work(3, &["photo"]);
    world.load("photo", 10);
    world.finish(3);
    world.commands();
    world.work(4, &["anime"]);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Host);

    let expected = Counters { hits: 1, host_hits: 1, misses: 2, ..Counters::default() };
    assert_eq!(world.scheduler.registry().counters(), expected);
}

#[test]
fn a_rotten_copy_on_disk_costs_a_fetch_and_the_receipt_says_so() {
    let mut world = World::new();
    assert!(world.scheduler.handle_disk_found(id("anime"), 10));
    world.work(1, &["anime"]);
    assert_eq!(world.commands(), ["read anime"]);
    world.scheduler.handle_disk_lost(id("anime"));
    assert_eq!(world.commands(), ["fetch anime"]);
    world.load("anime", 10);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Broker);
}

#[test]
fn a_stack_over_the_whole_budget_is_refused_as_soon_as_that_is_known() {
    let mut world = World::new();
    world.work(1, &["anime", "photo"]);
    world.commands();
    world.scheduler.handle_size(id("anime"), 60, world.now);
    assert_eq!(world.commands(), [""; 0]);
    world.scheduler.handle_size(id("photo"), 41, world.now);
    let commands: Vec<_> = std::iter::from_fn(|| world.scheduler.poll_command()).collect();
    let Command::Fail(_, failure) = &commands[0] else { panic!("{commands:?}") };
    assert_eq!(failure.code, ErrorCode::TooLarge);
    let sum = "take 101 bytes together: this worker has room for 100 at a time";
    assert!(failure.message.contains(sum), "{failure}");
    let stopped =
        commands[1..].iter().map(|command| spell(command, &NAMES)).collect::<BTreeSet<_>>();
    assert_eq!(stopped, BTreeSet::from(["stop anime".to_owned(), "stop photo".to_owned()]));
    assert_eq!(world.scheduler.registry().device_bytes(), 0);
}

#[test]
fn resident_adapters_that_do_not_fit_together_are_refused_at_once() {
    let mut world = World::new();
    for (dispatch, adapter) in [(1, "anime"), (2, "photo")] {
        world.scheduler.handle_disk_found(id(adapter), 60);
        world.work(dispatch, &[adapter]);
        world.scheduler.handle_loaded(id(adapter), 60, Origin::Disk, world.now);
        world.finish(dispatch);
    }
    world.commands();
    world.work(3, &["anime", "photo"]);
    assert_eq!(world.commands(), ["fail 3 too_large"]);
}

#[test]
fn what_does_not_fit_beside_others_waits_for_them_in_order() {
    let mut world = World::with(Config { lanes: 2, ..CONFIG });
    world.work(1, &["anime"]);
    world.load("anime", 60);
    world.scheduler.handle_disk_found(id("photo"), 60);
    world.work(2, &["photo"]);
    world.work(3, &["anime"]);
    assert_eq!(world.commands(), ["fetch anime", "write anime", "run 1"]);
    assert!(world.scheduler.is_wanted(DispatchId(2)), "it is not refused");

    world.finish(1);
    assert_eq!(world.commands(), ["forget anime", "read photo"]);
    world.scheduler.handle_loaded(id("photo"), 60, Origin::Disk, world.now);
    assert_eq!(world.commands(), ["run 2"]);
    world.finish(2);
    assert_eq!(world.commands(), ["forget photo", "read anime"]);
}

#[test]
fn when_two_turn_out_not_to_fit_together_the_younger_is_put_back() {
    let mut world = World::with(Config { lanes: 2, ..CONFIG });
    world.work(1, &["anime"]);
    world.work(2, &["photo"]);
    assert_eq!(world.commands(), ["fetch anime", "fetch photo"]);
    world.scheduler.handle_size(id("photo"), 60, world.now);
    assert_eq!(world.commands(), [""; 0]);
    world.scheduler.handle_size(id("anime"), 60, world.now);
    assert_eq!(world.commands(), ["stop photo"]);
    world.load("anime", 60);
    assert_eq!(world.commands(), ["write anime", "run 1"]);
    world.finish(1);
    assert_eq!(world.commands(), ["fetch photo"]);
    world.load("photo", 60);
    assert_eq!(world.commands(), ["forget anime", "write photo", "run 2"]);
    assert_eq!(world.scheduler.registry().counters().misses, 2, "each counts once");
}

#[test]
fn expired_work_is_failed_and_never_run() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    world.commands();

    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + Duration::from_secs(10)));
    world.scheduler.handle_timeout(world.now + Duration::from_secs(10));
    let expected = ["fail 1 deadline_exceeded", "interrupt 1", "fail 2 deadline_exceeded"];
    assert_eq!(world.commands(), expected);
    world.finish(1);
    assert_eq!(world.commands(), [""; 0]);
    assert!(world.scheduler.is_idle());
}

#[test]
fn work_that_expired_while_the_process_was_stopped_is_not_run() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    world.commands();

    world.now += Duration::from_secs(10);
    world.finish(1);
    assert_eq!(world.commands(), ["fail 2 deadline_exceeded"]);
    let late = needs("sd15", &[]);
    world.scheduler.handle_work(DispatchId(3), late, world.now, world.now);
    assert_eq!(world.commands(), ["fail 3 deadline_exceeded"]);
    assert!(world.scheduler.is_idle());
}

#[test]
fn cancelled_work_is_interrupted_and_keeps_its_lane_until_it_reports() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.load("anime", 10);
    world.work(2, &[]);
    world.commands();

    world.cancel(1);
    assert_eq!(world.commands(), ["interrupt 1"]);
    assert!(!world.scheduler.is_wanted(DispatchId(1)));
    world.scheduler.handle_evict(&[id("anime")]);
    assert_eq!(world.commands(), [""; 0], "the lane still uses it");
    world.finish(1);
    assert_eq!(world.commands(), ["run 2"]);
}

#[test]
fn an_adapter_in_use_is_not_evicted_on_request() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.load("anime", 10);
    world.commands();

    world.scheduler.handle_evict(&[id("anime")]);
    assert_eq!(world.commands(), [""; 0]);
    world.finish(1);
    world.scheduler.handle_evict(&[id("anime")]);
    assert_eq!(world.commands(), ["forget anime", "forget anime on disk"]);
}

#[test]
fn concurrent_requests_for_an_unloaded_model_cause_one_load() {
    let mut world = World::with(Config { model_budget_bytes: Some(10), lanes: 2, ..CONFIG });
    world.start(1, needs("sdxl", &[]));
    world.start(2, needs("sdxl", &[]));
    world.work(3, &[]);
    assert_eq!(world.commands(), ["unload sd15", "load sdxl"]);
    world.scheduler.handle_model_loaded(&model("sdxl"), world.now);
    assert_eq!(world.commands(), ["run 1", "run 2"]);
    world.finish(1);
    assert_eq!(world.commands(), [""; 0], "3 waits until `sdxl` can go");
    world.finish(2);
    assert_eq!(world.commands(), ["unload sdxl", "load sd15"]);
    world.scheduler.handle_model_loaded(&model("sd15"), world.now);
    assert_eq!(world.commands(), ["run 3"]);
}

#[test]
fn a_model_that_cannot_be_loaded_fails_those_who_wait_for_it() {
    let mut world = World::with(Config { model_budget_bytes: Some(10), ..CONFIG });
    world.start(1, needs("sdxl", &["anime"]));
    world.start(2, needs("flux", &[]));
    assert_eq!(
        world.commands(),
        ["unload sd15", "load sdxl", "fetch anime", "fail 2 unknown_model"]
    );
    let failure = Failure::new(ErrorCode::UnknownModel, "the files changed");
    world.scheduler.handle_model_failed(&model("sdxl"), &failure, world.now);
    assert_eq!(world.commands(), ["fail 1 unknown_model", "stop anime"]);
    world.start(3, needs("sdxl", &[]));
    assert_eq!(world.commands(), ["load sdxl"], "the next request tries again");
}

/// The adapters of the scenarios.
const NAMES: [&str; 3] = ["anime", "photo", "style"];

/// One lane, 100 bytes of adapters, two models that both fit.
const CONFIG: Config = Config {
    lanes: 1,
    tiers: Tiers {
        device_budget_bytes: 100,
        host_budget_bytes: 0,
        disk_budget_bytes: 1000,
        ttl: None,
    },
    model_budget_bytes: None,
};

struct World {
    scheduler: Scheduler,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self::with(CONFIG)
    }

    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn with(config: Config) -> Self {
        let mut scheduler = Scheduler::new(config);
        for name in ["sd15", "sdxl"] {
            scheduler.register_model(model(name), 10).unwrap();
        }
        Self { scheduler, now: Instant::now() }
    }

    fn work(&mut self, dispatch: u64, adapters: &[&str]) {
        self.start(dispatch, needs("sd15", adapters));
    }

    fn start(&mut self, dispatch: u64, needs: Needs) {
        let deadline = self.now + Duration::from_secs(10);
        self.scheduler.handle_work(DispatchId(dispatch), needs, deadline, self.now);
    }

    fn load(&mut self, adapter: &str, bytes: u64) {
        self.scheduler.handle_loaded(id(adapter), bytes, Origin::Broker, self.now);
    }

    fn fail(&mut self, adapter: &str) {
        let failure = Failure::new(ErrorCode::UnknownLora, "gone");
        self.scheduler.handle_load_failed(id(adapter), &failure, self.now);
    }

    fn finish(&mut self, dispatch: u64) {
        self.scheduler.handle_finished(DispatchId(dispatch), self.now);
    }

    fn cancel(&mut self, dispatch: u64) {
        self.scheduler.handle_cancel(DispatchId(dispatch), self.now);
    }

    fn commands(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.scheduler.poll_command())
            .map(|command| spell(&command, &NAMES))
            .collect()
    }

    fn sources(&mut self) -> BTreeMap<AdapterId, AdapterSource> {
        let commands: Vec<_> = std::iter::from_fn(|| self.scheduler.poll_command()).collect();
        let run = commands.into_iter().find_map(|command| {
            if let Command::Run(run) = command { Some(run.sources) } else { None }
        });
        run.expect("something runs")
    }
}

fn needs(name: &str, adapters: &[&str]) -> Needs {
    let adapters = adapters.iter().map(|name| id(name)).collect();
    Needs { model: model(name), exclusive: false, adapters }
}

fn model(name: &str) -> ModelName {
    name.parse().unwrap()
}

fn id(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}
