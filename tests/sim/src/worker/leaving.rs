//! A worker that was told to stop: it takes nothing new, hands over, and leaves.

use protocol::{frames, worker::Disconnect};

use super::Running;
use crate::{
    env::Env,
    event::Inside,
    time::{Span, Time},
};

/// Longest time that it waits for others to have what it holds.
const HAND_OVER_MAX: Span = Span::from_millis(800);

/// Longest time that it takes to leave.
const GRACE: Span = Span::from_secs(5);

/// When a worker that was told to stop stops waiting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaving {
    for_others: Time,
    at_all: Time,
    /// Whether it is about to look whether it may leave.
    is_looking: bool,
}

impl Running {
    /// The process is told to stop.
    pub(super) fn stop(&mut self, env: &mut Env) {
        if self.leaving.is_some() {
            return;
        }
        let (for_others, at_all) = (env.now + HAND_OVER_MAX, env.now + GRACE);
        self.leaving = Some(Leaving { for_others, at_all, is_looking: false });
        self.scheduler.forget_prefetches();
        self.alive(env);
        env.later(HAND_OVER_MAX, self.owner, Inside::Leave);
        env.later(GRACE, self.owner, Inside::Leave);
    }

    /// Looks, once everything at hand is done, whether it may leave.
    pub(super) fn look_out(&mut self, env: &mut Env) {
        if self.may_leave(env.now)
            && let Some(leaving) = self.leaving.as_mut().filter(|leaving| !leaving.is_looking)
        {
            leaving.is_looking = true;
            env.later(Span::ZERO, self.owner, Inside::Leave);
        }
    }

    /// Leaves, if nothing keeps it; says whether it does.
    pub(super) fn leave(&mut self, env: &mut Env) -> bool {
        let leaves = self.may_leave(env.now);
        if let Some(leaving) = &mut self.leaving {
            leaving.is_looking = false;
        }
        if leaves {
            let message = Disconnect { epoch: self.epoch };
            self.dealer.send(frames::frames(&message, Vec::new()), env);
        }
        leaves
    }

    fn may_leave(&self, now: Time) -> bool {
        self.leaving.is_some_and(|leaving| {
            let waits = self.dealer.connection().is_some() && !self.is_released;
            let is_done = self.scheduler.is_idle() && (!waits || leaving.for_others <= now);
            is_done || leaving.at_all <= now
        })
    }
}
