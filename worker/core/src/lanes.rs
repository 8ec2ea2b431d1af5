//! Which dispatches that have everything run now: a queue in front of a few lanes.
//!
//! Up to `count` dispatches run at once. One that is *exclusive* runs while no other dispatch of
//! its model does. Dispatches of one model start in the order in which they were queued, so none
//! starves; those of another model may pass.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::{AdapterId, ModelName};

use crate::command::DispatchId;

/// The queue and the lanes.
#[derive(Debug)]
pub(crate) struct Lanes {
    count: usize,
    queue: VecDeque<(DispatchId, Ticket)>,
    /// What the lanes have, even if nobody wants it any more.
    running: BTreeMap<DispatchId, Ticket>,
}

/// What a queued or running dispatch uses.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    pub(crate) model: ModelName,
    /// Whether it shares its model with nobody.
    pub(crate) exclusive: bool,
    pub(crate) adapters: Vec<AdapterId>,
}

impl Lanes {
    /// `count` empty lanes.
    pub(crate) fn new(count: usize) -> Self {
        Self { count, queue: VecDeque::new(), running: BTreeMap::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    pub(crate) fn is_running(&self, dispatch: DispatchId) -> bool {
        self.running.contains_key(&dispatch)
    }

    pub(crate) fn push(&mut self, dispatch: DispatchId, ticket: Ticket) {
        self.queue.push_back((dispatch, ticket));
    }

    /// Takes `dispatch` out of the queue.
    pub(crate) fn unqueue(&mut self, dispatch: DispatchId) -> Option<Ticket> {
        let index = self.queue.iter().position(|(queued, _)| *queued == dispatch)?;
        self.queue.remove(index).map(|(_, ticket)| ticket)
    }

    /// A lane has reported `dispatch`.
    pub(crate) fn finish(&mut self, dispatch: DispatchId) -> Option<Ticket> {
        self.running.remove(&dispatch)
    }

    /// Starts the next dispatch that may run, if a lane rests.
    pub(crate) fn start_next(&mut self) -> Option<DispatchId> {
        if self.running.len() >= self.count {
            return None;
        }
        let mut passed = BTreeSet::new();
        let index = self.queue.iter().position(|(_, ticket)| {
            let may_start = !passed.contains(&ticket.model) && self.may_run(ticket);
            passed.insert(&ticket.model);
            may_start
        })?;
        let (dispatch, ticket) = self.queue.remove(index)?;
        self.running.insert(dispatch, ticket);
        Some(dispatch)
    }

    fn may_run(&self, ticket: &Ticket) -> bool {
        let mut same_model = self.running.values().filter(|other| other.model == ticket.model);
        if ticket.exclusive {
            same_model.next().is_none()
        } else {
            same_model.all(|other| !other.exclusive)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_run_as_there_are_lanes() {
        let mut lanes = queued(2, &[(1, "a", false), (2, "a", false), (3, "a", false)]);
        assert_eq!(started(&mut lanes), [1, 2]);
        lanes.finish(DispatchId(2));
        assert_eq!(started(&mut lanes), [3]);
    }

    #[test]
    fn an_exclusive_dispatch_waits_for_its_model_and_keeps_it_for_itself() {
        let work = [(1, "a", false), (2, "a", true), (3, "a", false)];
        let mut lanes = queued(3, &work);
        assert_eq!(started(&mut lanes), [1]);
        lanes.finish(DispatchId(1));
        assert_eq!(started(&mut lanes), [2]);
        lanes.finish(DispatchId(2));
        assert_eq!(started(&mut lanes), [3]);
    }

    #[test]
    fn another_model_passes_and_the_same_model_does_not() {
        let work = [(1, "a", true), (2, "a", true), (3, "b", true), (4, "a", false)];
        let mut lanes = queued(4, &work);
        assert_eq!(started(&mut lanes), [1, 3]);
    }

    #[test]
    fn what_left_the_queue_does_not_start() {
        let mut lanes = queued(1, &[(1, "a", false), (2, "a", false)]);
        assert!(lanes.unqueue(DispatchId(1)).is_some());
        assert!(lanes.unqueue(DispatchId(1)).is_none());
        assert_eq!(started(&mut lanes), [2]);
    }

    fn queued(count: usize, work: &[(u64, &str, bool)]) -> Lanes {
        let mut lanes = Lanes::new(count);
        for &(dispatch, model, exclusive) in work {
            let model = model.parse().unwrap();
            lanes.push(DispatchId(dispatch), Ticket { model, exclusive, adapters: Vec::new() });
        }
        lanes
    }

    fn started(lanes: &mut Lanes) -> Vec<u64> {
        std::iter::from_fn(|| lanes.start_next()).map(|dispatch| dispatch.0).collect()
    }
}
