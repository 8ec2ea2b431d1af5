//! A worker's death journal: what it was busy with when its process ended.

use std::collections::{BTreeMap, VecDeque};

use protocol::{
    limits::DEATHS_MAX,
    worker::{Busy, Death},
};
use worker_core::DispatchId;

use crate::time::Time;

/// What outlives the process.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    epoch: Option<u64>,
    busy: BTreeMap<DispatchId, Busy>,
    ended: VecDeque<(Time, u64, Vec<Busy>)>,
}

impl Journal {
    /// A process begins.
    pub(crate) fn begin(&mut self, epoch: u64, now: Time) {
        self.end(now);
        self.epoch = Some(epoch);
    }

    /// The process is gone.
    pub(crate) fn end(&mut self, now: Time) {
        let Some(epoch) = self.epoch.take() else { return };
        let busy = std::mem::take(&mut self.busy).into_values().collect();
        self.ended.push_back((now, epoch, busy));
        if self.ended.len() > DEATHS_MAX {
            self.ended.pop_front();
        }
    }

    /// The process begins with a dispatch.
    pub(crate) fn note(&mut self, dispatch: DispatchId, busy: Option<Busy>) {
        if let Some(busy) = busy {
            self.busy.insert(dispatch, busy);
        }
    }

    /// The process is done with a dispatch.
    pub(crate) fn strike_out(&mut self, dispatch: DispatchId) {
        self.busy.remove(&dispatch);
    }

    /// What the broker is told.
    pub(crate) fn deaths(&self, now: Time) -> Vec<Death> {
        let death = |(at, epoch, busy): &(Time, u64, Vec<Busy>)| Death {
            epoch: *epoch,
            ago_s: u32::try_from(now.since(*at).micros() / 1_000_000).unwrap_or(u32::MAX),
            busy_with: busy.clone(),
        };
        self.ended.iter().map(death).collect()
    }
}
