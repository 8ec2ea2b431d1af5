//! What holds under any order of events.
//!
//! A shell that remembers what it was told stands on the other side: it knows what it fetches,
//! reads, holds and runs, and checks every command against that.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const LANES: usize = 2;
const DEVICE: u64 = 100;
const HOST: u64 = 60;
const DISK: u64 = 150;
const MODELS: [(&str, u64); 3] = [("a", 40), ("b", 50), ("c", 60)];
const MODEL_BUDGET: u64 = 100;

/// Bytes of the adapters, by number; the last is larger than the device.
const SIZES: [u64; 7] = [10, 25, 30, 40, 60, 75, 101];
const ADAPTERS: usize = SIZES.len();

#[derive(Debug, Clone)]
enum Operation {
    Work { dispatch: u64, model: usize, exclusive: bool, adapters: Vec<usize> },
    Size(usize),
    Loaded(usize),
    LoadedLate(usize),
    LoadFailed(usize),
    DiskLost(usize),
    ModelLoaded(usize),
    ModelFailed(usize),
    Finished(usize),
    Cancel(u64),
    Evict(usize),
    Prefetch(Vec<usize>),
    ForgetPrefetches,
    Pass(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    let adapter = || 0..ADAPTERS;
    let model = || 0..MODELS.len();
    let work =
        (0..60u64, model(), prop::bool::weighted(0.3), prop::collection::vec(adapter(), 0..4))
            .prop_map(|(dispatch, model, exclusive, adapters)| O::Work {
                dispatch,
                model,
                exclusive,
                adapters,
            });
    prop_oneof![
        4 => work,
        2 => adapter().prop_map(O::Size),
        4 => adapter().prop_map(O::Loaded),
        1 => adapter().prop_map(O::LoadedLate),
        1 => adapter().prop_map(O::LoadFailed),
        1 => adapter().prop_map(O::DiskLost),
        3 => model().prop_map(O::ModelLoaded),
        1 => model().prop_map(O::ModelFailed),
        4 => (0..LANES).prop_map(O::Finished),
        1 => (0..60u64).prop_map(O::Cancel),
        1 => adapter().prop_map(O::Evict),
        2 => prop::collection::vec(adapter(), 1..4).prop_map(O::Prefetch),
        1 => Just(O::ForgetPrefetches),
        1 => (0..90u64).prop_map(O::Pass),
    ]
}

proptest! {
    /// Every dispatch is answered at most once, and exactly once if nobody cancels it; a lane has
    /// what it needs; an exclusive dispatch is alone; budgets hold; of one thing one load is under
    /// way; and once the shell does what it is told, everything ends.
    #[test]
    fn the_invariants_hold_under_any_order_of_events(
        operations in prop::collection::vec(operation(), 1..250)
    ) {
        let mut shell = Shell::new();
        for operation in operations {
            shell.apply(operation);
            shell.obey();
            shell.check();
        }
        shell.do_everything();
        prop_assert!(shell.open.is_empty(), "never answered: {:?}", shell.open);
        prop_assert!(shell.scheduler.is_idle());
        prop_assert_eq!(shell.scheduler.prefetching().count(), 0);
    }
}

struct Shell {
    scheduler: Scheduler,
    now: Instant,
    open: BTreeSet<DispatchId>,
    works: BTreeMap<DispatchId, Needs>,
    running: BTreeMap<DispatchId, Needs>,
    interrupted: BTreeSet<DispatchId>,
    fetching: BTreeSet<AdapterId>,
    /// What nobody waits for; at most one at a time.
    prefetching: BTreeSet<AdapterId>,
    reading: BTreeSet<AdapterId>,
    /// Tensors, and whether they are on the device.
    held: BTreeMap<AdapterId, bool>,
    on_disk: BTreeSet<AdapterId>,
    loaded: BTreeSet<ModelName>,
    loading: BTreeSet<ModelName>,
}

impl Shell {
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn new() -> Self {
        let tiers = Tiers {
            device_budget_bytes: DEVICE,
            host_budget_bytes: HOST,
            disk_budget_bytes: DISK,
            ttl: Some(Duration::from_secs(20)),
        };
        let config = Config { lanes: LANES, tiers, model_budget_bytes: Some(MODEL_BUDGET) };
        let mut scheduler = Scheduler::new(config);
        let mut loaded = BTreeSet::new();
        for (name, bytes) in MODELS {
            if scheduler.register_model(name.parse().unwrap(), bytes).unwrap() {
                loaded.insert(name.parse().unwrap());
            }
        }
        Self {
            scheduler,
            now: Instant::now(),
            open: BTreeSet::new(),
            works: BTreeMap::new(),
            running: BTreeMap::new(),
            interrupted: BTreeSet::new(),
            fetching: BTreeSet::new(),
            prefetching: BTreeSet::new(),
            reading: BTreeSet::new(),
            held: BTreeMap::new(),
            on_disk: BTreeSet::new(),
            loaded,
            loading: BTreeSet::new(),
        }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Work { dispatch, model, exclusive, adapters } => {
                let dispatch = DispatchId(dispatch);
                let adapters = adapters.into_iter().map(id).collect();
                self.work(dispatch, Needs { model: model_name(model), exclusive, adapters });
            }
            Operation::Size(adapter) if self.is_fetched(&id(adapter)) => {
                self.scheduler.handle_size(id(adapter), SIZES[adapter], self.now);
            }
            Operation::Loaded(adapter) => self.load(id(adapter)),
            Operation::LoadedLate(adapter) => self.arrive(id(adapter), Origin::Broker),
            Operation::LoadFailed(adapter) => {
                if self.end_fetch(&id(adapter)) || self.reading.remove(&id(adapter)) {
                    let failure = Failure::new(ErrorCode::UnknownLora, "gone");
                    self.scheduler.handle_load_failed(id(adapter), &failure, self.now);
                }
            }
            Operation::DiskLost(adapter) if self.on_disk.remove(&id(adapter)) => {
                self.reading.remove(&id(adapter));
                self.scheduler.handle_disk_lost(id(adapter));
            }
            Operation::ModelLoaded(model) if self.loading.remove(&model_name(model)) => {
                self.loaded.insert(model_name(model));
                self.scheduler.handle_model_loaded(&model_name(model), self.now);
            }
            Operation::ModelFailed(model) if self.loading.remove(&model_name(model)) => {
                let failure = Failure::new(ErrorCode::UnknownModel, "changed");
                self.scheduler.handle_model_failed(&model_name(model), &failure, self.now);
            }
            Operation::Size(_)
            | Operation::DiskLost(_)
            | Operation::ModelLoaded(_)
            | Operation::ModelFailed(_) => {}
            Operation::Finished(index) => {
                if let Some(&dispatch) = self.running.keys().nth(index) {
                    self.finish(dispatch);
                }
            }
            Operation::Cancel(dispatch) => {
                self.open.remove(&DispatchId(dispatch));
                self.scheduler.handle_cancel(DispatchId(dispatch), self.now);
            }
            Operation::Evict(adapter) => self.scheduler.handle_evict(&[id(adapter)]),
            Operation::Prefetch(adapters) => {
                let adapters: Vec<_> = adapters.into_iter().map(id).collect();
                self.scheduler.handle_prefetch(&adapters);
            }
            Operation::ForgetPrefetches => self.scheduler.forget_prefetches(),
            Operation::Pass(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.scheduler.handle_timeout(self.now);
            }
        }
    }

    fn work(&mut self, dispatch: DispatchId, needs: Needs) {
        // A repetition of what is open or runs changes nothing.
        if !self.open.contains(&dispatch) && !self.running.contains_key(&dispatch) {
            self.open.insert(dispatch);
            self.works.insert(dispatch, needs.clone());
        }
        let deadline = self.now + Duration::from_secs(30);
        self.scheduler.handle_work(dispatch, needs, deadline, self.now);
    }

    /// Ends the fetch or the read of `adapter`, if there is one.
    fn load(&mut self, adapter: AdapterId) {
        if self.end_fetch(&adapter) {
            self.arrive(adapter, Origin::Broker);
        } else if self.reading.remove(&adapter) {
            self.arrive(adapter, Origin::Disk);
        }
    }

    fn arrive(&mut self, adapter: AdapterId, origin: Origin) {
        self.end_fetch(&adapter);
        self.held.entry(adapter).or_insert(true);
        self.scheduler.handle_loaded(adapter, size(&adapter), origin, self.now);
    }

    fn is_fetched(&self, adapter: &AdapterId) -> bool {
        self.fetching.contains(adapter) || self.prefetching.contains(adapter)
    }

    fn end_fetch(&mut self, adapter: &AdapterId) -> bool {
        self.fetching.remove(adapter) || self.prefetching.remove(adapter)
    }

    fn finish(&mut self, dispatch: DispatchId) {
        self.running.remove(&dispatch);
        self.interrupted.remove(&dispatch);
        self.open.remove(&dispatch);
        self.scheduler.handle_finished(dispatch, self.now);
    }

    fn obey(&mut self) {
        while let Some(command) = self.scheduler.poll_command() {
            match command {
                Command::Fetch(adapter) => {
                    self.prefetching.remove(&adapter);
                    assert!(self.fetching.insert(adapter), "fetched twice");
                    assert!(!self.on_disk.contains(&adapter), "it is on disk");
                }
                Command::Prefetch(adapter) => {
                    assert!(!self.fetching.contains(&adapter), "somebody waits for it");
                    assert!(!self.on_disk.contains(&adapter), "it is on disk");
                    self.prefetching.insert(adapter);
                    assert_eq!(self.prefetching.len(), 1, "one at a time");
                }
                Command::StopFetch(adapter) => drop(self.end_fetch(&adapter)),
                Command::ReadDisk(adapter) => {
                    assert!(self.on_disk.contains(&adapter), "it is not on disk");
                    self.reading.insert(adapter);
                }
                Command::WriteDisk(adapter) => {
                    assert!(self.held.contains_key(&adapter), "nothing to write");
                    assert!(self.on_disk.insert(adapter), "written twice");
                }
                Command::Promote(adapter) => {
                    assert_eq!(self.held.insert(adapter, true), Some(false), "not on the host");
                }
                Command::Demote(adapter) => {
                    self.assert_unused(&adapter);
                    assert_eq!(self.held.insert(adapter, false), Some(true), "not on the device");
                }
                Command::Forget(adapter, Place::Memory) => {
                    self.assert_unused(&adapter);
                    assert!(self.held.remove(&adapter).is_some(), "held nothing");
                }
                Command::Forget(adapter, Place::Disk) => {
                    assert!(self.on_disk.remove(&adapter), "stored nothing");
                }
                Command::LoadModel(model) => {
                    assert!(!self.loaded.contains(&model) && self.loading.insert(model));
                }
                Command::UnloadModel(model) => {
                    assert!(self.running.values().all(|needs| needs.model != model), "in use");
                    assert!(self.loaded.remove(&model), "not loaded");
                }
                Command::Run(run) => self.run(&run),
                Command::Interrupt(dispatch) => {
                    assert!(self.running.contains_key(&dispatch), "nothing to interrupt");
                    assert!(self.interrupted.insert(dispatch), "interrupted twice");
                }
                Command::Fail(dispatch, _) => {
                    assert!(self.open.remove(&dispatch), "answered {dispatch:?} twice");
                }
            }
        }
    }

    fn run(&mut self, run: &RunDispatch) {
        let dispatch = run.dispatch;
        assert!(self.open.contains(&dispatch), "ran what nobody wants");
        let needs = self.works[&dispatch].clone();
        assert!(run.sources.keys().eq(&needs.adapters), "runs with what was asked for");
        assert!(self.loaded.contains(&needs.model), "runs without its model");
        let mut same_model = self.running.values().filter(|other| other.model == needs.model);
        assert!(same_model.all(|other| !other.exclusive && !needs.exclusive), "not alone");
        self.running.insert(dispatch, needs);
        assert!(self.running.len() <= LANES, "more than there are lanes");
    }

    fn assert_unused(&self, adapter: &AdapterId) {
        let uses = |needs: &Needs| needs.adapters.contains(adapter);
        assert!(!self.running.values().any(uses), "a lane uses it");
    }

    fn check(&self) {
        let bytes = |on_device| {
            let held = self.held.iter().filter(|(_, place)| **place == on_device);
            held.map(|(adapter, _)| size(adapter)).sum::<u64>()
        };
        let registry = self.scheduler.registry();
        assert!(bytes(true) <= registry.device_bytes() && registry.device_bytes() <= DEVICE);
        assert_eq!(bytes(false), registry.host_bytes());
        assert!(registry.host_bytes() <= HOST);
        assert_eq!(self.on_disk.iter().map(size).sum::<u64>(), registry.disk_bytes());
        assert!(registry.disk_bytes() <= DISK);
        let on = |place: bool| self.held.iter().filter(move |(_, held)| **held == place);
        assert!(registry.on_device().collect::<BTreeSet<_>>().iter().eq(on(true).map(|it| it.0)));
        assert!(registry.on_host().collect::<BTreeSet<_>>().iter().eq(on(false).map(|it| it.0)));
        for needs in self.running.values() {
            assert!(needs.adapters.iter().all(|adapter| self.held.get(adapter) == Some(&true)));
        }
        assert!(self.scheduler.models().memory_bytes() <= MODEL_BUDGET);
        assert!(self.scheduler.models().loaded().eq(&self.loaded));
    }

    /// Does all that was asked for, until nothing is left to do.
    fn do_everything(&mut self) {
        for _ in 0..1_000 {
            let fetching: BTreeSet<_> = self.fetching.union(&self.prefetching).copied().collect();
            for adapter in fetching.union(&self.reading).copied().collect::<Vec<_>>() {
                self.load(adapter);
                self.obey();
            }
            for model in std::mem::take(&mut self.loading) {
                self.loaded.insert(model.clone());
                self.scheduler.handle_model_loaded(&model, self.now);
                self.obey();
            }
            for dispatch in self.running.keys().copied().collect::<Vec<_>>() {
                self.finish(dispatch);
                self.obey();
            }
            self.check();
            if self.scheduler.is_idle() && self.scheduler.prefetching().next().is_none() {
                return;
            }
        }
    }
}

fn model_name(number: usize) -> ModelName {
    MODELS[number].0.parse().unwrap()
}

fn id(number: usize) -> AdapterId {
    AdapterId::of(&number.to_le_bytes())
}

fn size(adapter: &AdapterId) -> u64 {
    SIZES[(0..ADAPTERS).find(|number| id(*number) == *adapter).unwrap()]
}
