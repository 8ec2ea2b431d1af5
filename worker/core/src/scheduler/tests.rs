//! Scenarios and properties of the scheduler.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BUDGET: u64 = 100;

#[test]
fn work_without_adapters_runs_at_once_and_one_at_a_time() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    assert_eq!(world.commands(), ["run 1"]);

    world.scheduler.handle_finished(DispatchId(1), world.now);
    assert_eq!(world.commands(), ["run 2"]);
}

#[test]
fn two_requests_for_a_missing_adapter_cause_one_fetch() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.work(2, &["anime"]);
    assert_eq!(world.commands(), ["fetch anime"]);

    world.load("anime", 10);
    assert_eq!(world.commands(), ["run 1"]);
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

    let failure = Failure::new(ErrorCode::UnknownLora, "gone");
    world.scheduler.handle_load_failed(id("anime"), &failure);

    assert_eq!(world.commands(), ["fail 1 unknown_lora"]);
    assert!(world.scheduler.is_wanted(DispatchId(2)));
    world.work(3, &["anime"]);
    assert_eq!(world.commands(), ["fetch anime"], "the next request tries again");
}

#[test]
fn an_adapter_that_arrives_after_it_was_given_up_is_let_go() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.commands();
    let failure = Failure::new(ErrorCode::UnknownLora, "gone");
    world.scheduler.handle_load_failed(id("anime"), &failure);
    world.commands();

    world.load("anime", 10);
    assert_eq!(world.commands(), ["forget anime"]);
    assert_eq!(world.scheduler.registry().resident_bytes(), 0);
}

#[test]
fn an_adapter_that_is_there_is_resident_and_one_that_came_is_loaded() {
    let mut world = World::new();
    world.work(1, &["anime"]);
    world.load("anime", 10);
    let sources = world.sources();
    assert_eq!(sources[&id("anime")], AdapterSource::Broker);

    world.scheduler.handle_finished(DispatchId(1), world.now);
    world.work(2, &["anime"]);
    assert_eq!(world.sources()[&id("anime")], AdapterSource::Resident);
}

#[test]
fn expired_work_is_failed_and_never_run() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    world.commands();

    assert_eq!(world.scheduler.poll_timeout(), Some(world.now + Duration::from_secs(10)));
    world.scheduler.handle_timeout(world.now + Duration::from_secs(10));
    assert_eq!(world.commands(), ["fail 1 deadline_exceeded", "fail 2 deadline_exceeded"]);
    world.scheduler.handle_finished(DispatchId(1), world.now);
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
    world.scheduler.handle_finished(DispatchId(1), world.now);
    assert_eq!(world.commands(), ["fail 2 deadline_exceeded"]);
    let now = world.now;
    world.scheduler.handle_work(DispatchId(3), &BTreeSet::new(), now, now);
    assert_eq!(world.commands(), ["fail 3 deadline_exceeded"]);
    assert!(world.scheduler.is_idle());
}

#[test]
fn cancelled_work_leaves_the_executor_busy_until_it_reports() {
    let mut world = World::new();
    world.work(1, &[]);
    world.work(2, &[]);
    world.commands();

    world.scheduler.handle_cancel(DispatchId(1), world.now);
    assert_eq!(world.commands(), [""; 0]);
    assert!(!world.scheduler.is_wanted(DispatchId(1)));
    world.scheduler.handle_finished(DispatchId(1), world.now);
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
    world.scheduler.handle_finished(DispatchId(1), world.now);
    world.scheduler.handle_evict(&[id("anime")]);
    assert_eq!(world.commands(), ["forget anime"]);
}

#[derive(Debug, Clone)]
enum Operation {
    Work(u64, Vec<u8>),
    Loaded(u8, u64),
    LoadFailed(u8),
    Finished,
    Cancel(u64),
    Evict(u8),
    Pass(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        (0..30u64, prop::collection::vec(0..6u8, 0..4)).prop_map(|(d, a)| Operation::Work(d, a)),
        (0..6u8, 1..130u64).prop_map(|(a, bytes)| Operation::Loaded(a, bytes)),
        (0..6u8).prop_map(Operation::LoadFailed),
        Just(Operation::Finished),
        (0..30u64).prop_map(Operation::Cancel),
        (0..6u8).prop_map(Operation::Evict),
        (0..8u64).prop_map(Operation::Pass),
    ]
}

proptest! {
    /// Whatever happens, a dispatch is answered at most once, the executor has at most one, only
    /// adapters that are there are used, and the budget holds once nothing is pinned.
    #[test]
    fn the_invariants_hold_under_any_order_of_events(
        operations in prop::collection::vec(operation(), 1..200)
    ) {
        let mut world = World::new();
        let mut model = Model::default();
        for operation in operations {
            model.apply(&mut world, operation);
            model.check_commands(&mut world);
        }
        for adapter in 0..6u8 {
            world.scheduler.handle_load_failed(id_of(adapter), &Failure::new(ErrorCode::UnknownLora, "end"));
        }
        model.check_commands(&mut world);
        while let Some(running) = model.running {
            model.finish(&mut world, running);
            model.check_commands(&mut world);
        }
        prop_assert!(world.scheduler.is_idle());
        prop_assert!(model.open.is_empty(), "never answered: {:?}", model.open);
        prop_assert!(world.scheduler.registry().resident_bytes() <= BUDGET);
        let resident: BTreeSet<_> = world.scheduler.registry().resident().collect();
        prop_assert_eq!(resident, model.held, "tensors that the shell holds");
    }
}

/// What an observer knows from the outside.
#[derive(Default)]
struct Model {
    open: BTreeSet<u64>,
    running: Option<u64>,
    fetching: BTreeSet<AdapterId>,
    held: BTreeSet<AdapterId>,
}

impl Model {
    fn apply(&mut self, world: &mut World, operation: Operation) {
        match operation {
            Operation::Work(dispatch, adapters) => {
                // The broker never reuses a number while the executor still has it.
                if self.running != Some(dispatch) || self.open.contains(&dispatch) {
                    self.open.insert(dispatch);
                    let adapters = adapters.into_iter().map(id_of).collect();
                    let deadline = world.now + Duration::from_secs(10);
                    world.scheduler.handle_work(
                        DispatchId(dispatch),
                        &adapters,
                        deadline,
                        world.now,
                    );
                }
            }
            Operation::Loaded(adapter, bytes) if self.fetching.remove(&id_of(adapter)) => {
                self.held.insert(id_of(adapter));
                world.scheduler.handle_loaded(id_of(adapter), bytes, world.now);
            }
            Operation::LoadFailed(adapter) if self.fetching.remove(&id_of(adapter)) => {
                let failure = Failure::new(ErrorCode::UnknownLora, "gone");
                world.scheduler.handle_load_failed(id_of(adapter), &failure);
            }
            Operation::Loaded(..) | Operation::LoadFailed(_) => {}
            Operation::Finished => {
                if let Some(running) = self.running {
                    self.finish(world, running);
                }
            }
            Operation::Cancel(dispatch) => {
                self.open.remove(&dispatch);
                world.scheduler.handle_cancel(DispatchId(dispatch), world.now);
            }
            Operation::Evict(adapter) => world.scheduler.handle_evict(&[id_of(adapter)]),
            Operation::Pass(seconds) => {
                world.now += Duration::from_secs(seconds);
                world.scheduler.handle_timeout(world.now);
            }
        }
    }

    fn finish(&mut self, world: &mut World, running: u64) {
        self.running = None;
        self.open.remove(&running);
        world.scheduler.handle_finished(DispatchId(running), world.now);
    }

    fn check_commands(&mut self, world: &mut World) {
        while let Some(command) = world.scheduler.poll_command() {
            match command {
                Command::Fetch(adapter) => assert!(self.fetching.insert(adapter), "fetched twice"),
                Command::Forget(adapter) => assert!(self.held.remove(&adapter), "held nothing"),
                Command::Run(run) => {
                    assert!(self.open.contains(&run.dispatch.0), "ran what nobody wants");
                    assert_eq!(self.running.replace(run.dispatch.0), None, "two at once");
                    assert!(run.sources.keys().all(|adapter| self.held.contains(adapter)));
                }
                Command::Fail(dispatch, _) => {
                    assert!(self.open.remove(&dispatch.0), "answered {dispatch:?} twice");
                }
            }
        }
    }
}

struct World {
    scheduler: Scheduler,
    now: Instant,
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn new() -> Self {
        Self { scheduler: Scheduler::new(BUDGET), now: Instant::now() }
    }

    fn work(&mut self, dispatch: u64, adapters: &[&str]) {
        let adapters = adapters.iter().map(|name| id(name)).collect();
        let deadline = self.now + Duration::from_secs(10);
        self.scheduler.handle_work(DispatchId(dispatch), &adapters, deadline, self.now);
    }

    fn load(&mut self, adapter: &str, bytes: u64) {
        self.scheduler.handle_loaded(id(adapter), bytes, self.now);
    }

    fn commands(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.scheduler.poll_command())
            .map(|command| spell(&command))
            .collect()
    }

    fn sources(&mut self) -> BTreeMap<AdapterId, AdapterSource> {
        std::iter::from_fn(|| self.scheduler.poll_command())
            .find_map(|command| match command {
                Command::Run(run) => Some(run.sources),
                Command::Fetch(_) | Command::Forget(_) | Command::Fail(..) => None,
            })
            .unwrap()
    }
}

fn spell(command: &Command) -> String {
    let name = |adapter: &AdapterId| {
        ["anime", "photo"].into_iter().find(|name| id(name) == *adapter).unwrap().to_owned()
    };
    match command {
        Command::Fetch(adapter) => format!("fetch {}", name(adapter)),
        Command::Forget(adapter) => format!("forget {}", name(adapter)),
        Command::Run(run) => format!("run {}", run.dispatch.0),
        Command::Fail(dispatch, failure) => format!("fail {} {}", dispatch.0, failure.code),
    }
}

fn id(name: &str) -> AdapterId {
    AdapterId::of(name.as_bytes())
}

fn id_of(number: u8) -> AdapterId {
    AdapterId::of(&[number])
}
