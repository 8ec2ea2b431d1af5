//! From arrival to a place in the queue: who is let in, who is put back, who has everything.

use std::{collections::BTreeSet, time::Instant};

use protocol::{AdapterId, ErrorCode, Failure, ModelName};

use super::{Dispatch, Phase, Scheduler};
use crate::command::{Command, DispatchId};

impl Scheduler {
    /// Lets in dispatches in the order of their arrival, as long as there is room.
    pub(super) fn admit(&mut self, now: Instant) {
        while let Some((_, &dispatch)) = self.waiting.first_key_value() {
            if self.refuse_if_too_large(dispatch, now) {
                continue;
            }
            let entry = &self.dispatches[&dispatch];
            let sizes = entry.adapters.iter().map(|(adapter, usage)| (*adapter, usage.bytes));
            if !self.models.has_room(&entry.model) || !self.registry.has_room(sizes) {
                return;
            }
            self.waiting.pop_first();
            self.let_in(dispatch, now);
        }
    }

    /// Fails `dispatch` if its adapters are larger than the device's budget, as far as known now;
    /// says whether it did.
    pub(super) fn refuse_if_too_large(&mut self, dispatch: DispatchId, now: Instant) -> bool {
        let Some(entry) = self.dispatches.get_mut(&dispatch) else { return false };
        for (adapter, usage) in &mut entry.adapters {
            usage.bytes = usage.bytes.or_else(|| self.registry.bytes(adapter));
        }
        let (bytes, budget) = (entry.known_bytes(), self.registry.device_budget_bytes());
        if bytes <= budget {
            return false;
        }
        let message = format!(
            "the adapters of the request take {bytes} bytes together: this worker has room for {budget} at a time, use fewer or raise `adapter_budget_mb`"
        );
        let failure = Failure::new(ErrorCode::TooLarge, message);
        self.commands.push_back(Command::Fail(dispatch, failure));
        self.remove(dispatch, now);
        true
    }

    /// Notes the size of an adapter that is coming: refuses those who could never use it, and puts
    /// back the youngest until the others have room.
    pub(super) fn learn_size(&mut self, adapter: AdapterId, bytes: u64, now: Instant) {
        if !self.registry.is_coming(&adapter) {
            return;
        }
        let mut users = Vec::new();
        for (&dispatch, entry) in &mut self.dispatches {
            if let Some(usage) = entry.adapters.get_mut(&adapter) {
                usage.bytes = Some(bytes);
                users.push(dispatch);
            }
        }
        for dispatch in users {
            self.refuse_if_too_large(dispatch, now);
        }
        while self.registry.is_coming(&adapter)
            && !self.registry.has_room_to_grow(&adapter, bytes)
            && let Some(youngest) = self.youngest_loading()
        {
            self.put_back(youngest, now);
        }
        self.registry.resize(&adapter, bytes, &mut self.commands);
    }

    /// An adapter is on the device: those who waited for nothing else are ready.
    pub(super) fn note_arrival(&mut self, adapter: AdapterId, now: Instant) {
        self.note(now, |entry| {
            if let Phase::Loading { missing, .. } = &mut entry.phase {
                missing.remove(&adapter);
            }
        });
    }

    /// A model is in memory: those who waited for nothing else are ready.
    pub(super) fn note_model(&mut self, model: &ModelName, now: Instant) {
        self.note(now, |entry| {
            if let Phase::Loading { needs_model, .. } = &mut entry.phase
                && entry.model == *model
            {
                *needs_model = false;
            }
        });
    }

    /// Changes what dispatches wait for, and queues those that have everything, oldest first.
    fn note(&mut self, now: Instant, change: impl Fn(&mut Dispatch)) {
        let mut ready = Vec::new();
        for (&dispatch, entry) in &mut self.dispatches {
            change(entry);
            if entry.has_everything() {
                ready.push((entry.arrival, dispatch));
            }
        }
        ready.sort_unstable();
        for (_, dispatch) in ready {
            self.queue(dispatch, now);
        }
    }

    /// Pins what `dispatch` needs and has it brought here.
    fn let_in(&mut self, dispatch: DispatchId, now: Instant) {
        let Some(entry) = self.dispatches.get_mut(&dispatch) else { return };
        for (adapter, usage) in &mut entry.adapters {
            let source = self.registry.source(adapter);
            if usage.source.is_none() {
                self.registry.count(source);
            }
            usage.source = Some(source);
        }
        let ids = entry.ids();
        for adapter in &ids {
            self.prefetches.forget(adapter); // It is no longer nobody's.
        }
        let needs_model = !self.models.pin(&entry.model, &mut self.commands);
        self.registry.pin(&ids, &mut self.commands);
        let missing: BTreeSet<AdapterId> =
            ids.into_iter().filter(|adapter| self.registry.is_coming(adapter)).collect();
        // ## Waiting => Loading
        entry.phase = Phase::Loading { missing, needs_model };
        if entry.has_everything() {
            self.queue(dispatch, now);
        }
    }

    fn queue(&mut self, dispatch: DispatchId, now: Instant) {
        let Some(entry) = self.dispatches.get_mut(&dispatch) else { return };
        // ## Loading => Ready
        entry.phase = Phase::Ready;
        entry.loaded = now;
        self.lanes.push(dispatch, entry.ticket());
    }

    /// The youngest dispatch that loads and whose adapters take room, as far as known.
    fn youngest_loading(&self) -> Option<DispatchId> {
        let loading = self.dispatches.iter().filter(|(_, entry)| {
            matches!(entry.phase, Phase::Loading { .. }) && entry.known_bytes() > 0
        });
        loading.max_by_key(|(_, entry)| entry.arrival).map(|(dispatch, _)| *dispatch)
    }

    fn put_back(&mut self, dispatch: DispatchId, now: Instant) {
        let Some(entry) = self.dispatches.get_mut(&dispatch) else { return };
        // ## Loading => Waiting
        entry.phase = Phase::Waiting;
        self.waiting.insert(entry.arrival, dispatch);
        let (model, ids) = (entry.model.clone(), entry.ids());
        self.unpin(&model, &ids, now);
    }
}

impl Dispatch {
    fn has_everything(&self) -> bool {
        matches!(&self.phase, Phase::Loading { missing, needs_model: false } if missing.is_empty())
    }
}
