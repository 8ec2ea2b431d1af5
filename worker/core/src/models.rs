//! Which models are in memory, and which of them go when room is needed.
//!
//! Names and sizes only; the weights live in the shell. A model is
//!
//! ```text
//! Registered => Loading => Loaded => Registered     (unloaded to make room)
//!                  |
//!                  `=> Registered                   (could not be loaded)
//! ```
//!
//! **Invariants:** a pinned model is never unloaded; the bytes of what is loaded or being loaded
//! never exceed the budget; of one model at most one load is under way.

use std::collections::{BTreeMap, VecDeque};

use protocol::ModelName;

use crate::command::Command;

/// Models by name, with a budget in bytes.
#[derive(Debug)]
pub struct Models {
    entries: BTreeMap<ModelName, Entry>,
    budget_bytes: Option<u64>,
    /// Counts uses; the smallest mark was used longest ago.
    uses: u64,
    revision: u64,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    state: State,
    pins: u32,
    last_use: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Registered,
    Loading,
    Loaded,
}

/// A model larger than the whole budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "model `{model}` takes {bytes} bytes: all models of this worker may take {budget_bytes}, raise `model_budget_mb`"
)]
pub struct ModelOverBudget {
    /// The model.
    pub model: ModelName,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Bytes that all models may take.
    pub budget_bytes: u64,
}

impl Models {
    /// No models. Without a budget nothing is ever unloaded.
    pub(crate) fn new(budget_bytes: Option<u64>) -> Self {
        Self { entries: BTreeMap::new(), budget_bytes, uses: 0, revision: 0 }
    }

    /// The models in memory, by name.
    pub fn loaded(&self) -> impl Iterator<Item = &ModelName> {
        let is_loaded = |entry: &Entry| entry.state == State::Loaded;
        self.entries.iter().filter(move |(_, entry)| is_loaded(entry)).map(|(name, _)| name)
    }

    /// Whether `model` is in memory.
    pub fn is_loaded(&self, model: &ModelName) -> bool {
        self.entries.get(model).is_some_and(|entry| entry.state == State::Loaded)
    }

    /// Bytes of what is loaded or being loaded.
    pub fn memory_bytes(&self) -> u64 {
        self.sum(|entry| entry.state != State::Registered)
    }

    /// Grows with every change of what is loaded.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub(crate) fn is_known(&self, model: &ModelName) -> bool {
        self.entries.contains_key(model)
    }

    /// Adds a model that takes `bytes` and that the shell has in memory. Returns whether it may
    /// stay there.
    pub(crate) fn register(
        &mut self,
        model: ModelName,
        bytes: u64,
    ) -> Result<bool, ModelOverBudget> {
        if let Some(budget_bytes) = self.budget_bytes.filter(|&budget| bytes > budget) {
            return Err(ModelOverBudget { model, bytes, budget_bytes });
        }
        let stays = self.budget_bytes.is_none_or(|budget| self.memory_bytes() + bytes <= budget);
        let state = if stays { State::Loaded } else { State::Registered };
        self.uses += 1;
        self.revision += 1;
        self.entries.insert(model, Entry { bytes, state, pins: 0, last_use: self.uses });
        Ok(stays)
    }

    /// Whether `model` can be in memory beside what cannot leave now.
    pub(crate) fn has_room(&self, model: &ModelName) -> bool {
        let Some(entry) = self.entries.get(model) else { return false };
        let stays = |entry: &Entry| entry.pins > 0 || entry.state == State::Loading;
        stays(entry)
            || self.budget_bytes.is_none_or(|budget| self.sum(stays) + entry.bytes <= budget)
    }

    /// Holds `model` for one more dispatch, and says whether it is in memory. There must be room.
    pub(crate) fn pin(&mut self, model: &ModelName, commands: &mut VecDeque<Command>) -> bool {
        debug_assert!(self.has_room(model), "no room for model {model}");
        self.uses += 1;
        let last_use = self.uses;
        let Some(entry) = self.entries.get_mut(model) else { return false };
        entry.pins += 1;
        entry.last_use = last_use;
        if entry.state == State::Registered {
            // ## Registered => Loading
            entry.state = State::Loading;
            self.unload_over_budget(commands);
            commands.push_back(Command::LoadModel(model.clone()));
        }
        self.is_loaded(model)
    }

    /// Lets go of `model` for one dispatch.
    pub(crate) fn unpin(&mut self, model: &ModelName) {
        if let Some(entry) = self.entries.get_mut(model) {
            debug_assert!(entry.pins > 0, "unpinned {model} more often than pinned");
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// `model` is in memory now.
    pub(crate) fn loaded_now(&mut self, model: &ModelName) {
        self.end_load(model, State::Loaded); // ## Loading => Loaded
    }

    /// `model` could not be loaded.
    pub(crate) fn failed(&mut self, model: &ModelName) {
        self.end_load(model, State::Registered); // ## Loading => Registered
    }

    fn end_load(&mut self, model: &ModelName, state: State) {
        let entry = self.entries.get_mut(model).filter(|entry| entry.state == State::Loading);
        if let Some(entry) = entry {
            entry.state = state;
            self.revision += 1;
        }
    }

    /// Unloads idle models, least recently used first, until the budget holds.
    fn unload_over_budget(&mut self, commands: &mut VecDeque<Command>) {
        while self.budget_bytes.is_some_and(|budget| self.memory_bytes() > budget) {
            let idle = |entry: &Entry| entry.pins == 0 && entry.state == State::Loaded;
            let idle = self.entries.iter_mut().filter(|(_, entry)| idle(entry));
            let Some((model, entry)) = idle.min_by_key(|(_, entry)| entry.last_use) else { break };
            // ## Loaded => Registered
            entry.state = State::Registered;
            self.revision += 1;
            commands.push_back(Command::UnloadModel(model.clone()));
        }
    }

    fn sum(&self, counts: impl Fn(&Entry) -> bool) -> u64 {
        self.entries.values().filter(|entry| counts(entry)).map(|entry| entry.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spelling::spell;

    #[test]
    fn the_least_recently_used_model_makes_room() {
        let mut world = World::new(Some(100), &[("a", 40), ("b", 40), ("c", 40)]);
        assert_eq!(world.loaded(), ["a", "b"]);
        world.encode("a");
        world.encode("c");
        assert_eq!(world.commands(), ["unload b", "load c"]);
        assert_eq!(world.loaded(), ["a", "c"]);
    }

    #[test]
    fn a_pinned_model_stays_and_what_does_not_fit_beside_it_has_no_room() {
        let mut world = World::new(Some(100), &[("a", 60), ("b", 60)]);
        assert!(world.models.pin(&name("a"), &mut world.commands));
        assert!(!world.models.has_room(&name("b")));
        world.models.unpin(&name("a"));
        assert!(world.models.has_room(&name("b")));
    }

    #[test]
    fn a_model_being_loaded_is_not_loaded_again_and_holds_its_room() {
        let mut world = World::new(Some(100), &[("a", 60), ("b", 60)]);
        world.models.pin(&name("b"), &mut world.commands);
        world.models.pin(&name("b"), &mut world.commands);
        world.models.unpin(&name("b"));
        world.models.unpin(&name("b"));
        assert_eq!(world.commands(), ["unload a", "load b"]);
        assert!(!world.models.has_room(&name("a")), "the load cannot be stopped");
        world.models.failed(&name("b"));
        assert!(world.models.has_room(&name("a")));
        assert_eq!(world.models.memory_bytes(), 0);
    }

    #[test]
    fn a_model_over_the_whole_budget_is_refused_by_name() {
        let error = Models::new(Some(10)).register(name("a"), 11).unwrap_err();
        let expected = "model `a` takes 11 bytes: all models of this worker may take 10, raise `model_budget_mb`";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn without_a_budget_everything_stays() {
        let world = World::new(None, &[("a", u64::MAX / 4), ("b", u64::MAX / 4)]);
        assert_eq!(world.loaded(), ["a", "b"]);
    }

    struct World {
        models: Models,
        commands: VecDeque<Command>,
    }

    impl World {
        fn new(budget_bytes: Option<u64>, models: &[(&str, u64)]) -> Self {
            let mut world = Self { models: Models::new(budget_bytes), commands: VecDeque::new() };
            for &(model, bytes) in models {
                world.models.register(name(model), bytes).unwrap();
            }
            world
        }

        fn encode(&mut self, model: &str) {
            self.models.pin(&name(model), &mut self.commands);
            self.models.loaded_now(&name(model));
            self.models.unpin(&name(model));
        }

        fn loaded(&self) -> Vec<String> {
            self.models.loaded().map(ToString::to_string).collect()
        }

        fn commands(&mut self) -> Vec<String> {
            self.commands.drain(..).map(|command| spell(&command, &[])).collect()
        }
    }

    fn name(text: &str) -> ModelName {
        text.parse().unwrap()
    }
}
