//! Bounds in messages and bytes, charged while a message waits and released when it has left.
//!
//! A [`Budget`] is not a queue: it only counts. The holder of a [`Reservation`] owns a share of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// How much may wait in one queue. A single message larger than `bytes_max` is admitted into an
/// empty queue, so that a queue never blocks for ever; the size of one message has its own limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Messages, at least 1 and at most [`QueueLimits::MESSAGES_CEILING`].
    pub messages_max: usize,
    /// Bytes of all frames of all messages, at least 1.
    pub bytes_max: usize,
}

impl QueueLimits {
    /// More would reach `zeromq`'s own fixed queue of 100 000 messages, where it deadlocks.
    pub const MESSAGES_CEILING: usize = 50_000;

    /// Tells whether both limits are in range.
    pub(crate) fn is_valid(self) -> bool {
        (1..=Self::MESSAGES_CEILING).contains(&self.messages_max) && self.bytes_max >= 1
    }
}

/// A count of what waits somewhere, with a limit. At most one task may wait on it at a time.
#[derive(Debug)]
pub(crate) struct Budget {
    limits: QueueLimits,
    usage: Mutex<Usage>,
    /// Signalled at each release.
    released: Notify,
}

#[derive(Debug)]
struct Usage {
    messages: usize,
    bytes: usize,
    /// When something last left, or entered while nothing waited.
    progress: Instant,
}

/// A share of a [`Budget`], given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// Makes a budget of which nothing is used.
    pub(crate) fn new(limits: QueueLimits) -> Self {
        let usage = Usage { messages: 0, bytes: 0, progress: Instant::now() };
        Self { limits, usage: Mutex::new(usage), released: Notify::new() }
    }

    /// Charges one message of `bytes`, or nothing if it does not fit now.
    pub(crate) fn try_reserve(self: &Arc<Self>, bytes: usize) -> Option<Reservation> {
        let mut usage = self.usage();
        let is_empty = usage.messages == 0;
        let fits = usage.messages < self.limits.messages_max
            && usage.bytes.saturating_add(bytes) <= self.limits.bytes_max;
        if !is_empty && !fits {
            return None;
        }
        if is_empty {
            usage.progress = Instant::now();
        }
        usage.messages += 1;
        usage.bytes += bytes;
        Some(Reservation { budget: Arc::clone(self), bytes })
    }

    /// Charges one message of `bytes` as soon as it fits. Dropping the future charges nothing.
    pub(crate) async fn reserve(self: &Arc<Self>, bytes: usize) -> Reservation {
        loop {
            if let Some(reservation) = self.try_reserve(bytes) {
                return reservation;
            }
            self.released.notified().await;
        }
    }

    /// Waits until nothing is charged.
    pub(crate) async fn idle(&self) {
        while self.usage().messages > 0 {
            self.released.notified().await;
        }
    }

    /// Tells whether something has been waiting and nothing has left since `stall` before `now`.
    pub(crate) fn is_stalled(&self, stall: Duration, now: Instant) -> bool {
        let usage = self.usage();
        usage.messages > 0 && now.saturating_duration_since(usage.progress) >= stall
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// Tells whether it is a share of `budget`.
    pub(crate) fn is_of(&self, budget: &Arc<Budget>) -> bool {
        Arc::ptr_eq(&self.budget, budget)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut usage = self.budget.usage();
        usage.messages -= 1;
        usage.bytes -= self.bytes;
        usage.progress = Instant::now();
        drop(usage);
        self.budget.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_a_dropped_reservation_makes_room() {
        let budget = budget(2, 10);
        let first = budget.try_reserve(6).unwrap();
        assert!(budget.try_reserve(5).is_none(), "bytes");
        let second = budget.try_reserve(4).unwrap();
        assert!(budget.try_reserve(0).is_none(), "messages");
        drop(first);
        let third = budget.try_reserve(6).unwrap();
        drop((second, third));
        assert!(budget.try_reserve(10).is_some());
    }

    #[test]
    fn an_oversized_message_is_admitted_into_an_empty_queue_only() {
        let budget = budget(8, 10);
        let large = budget.try_reserve(1_000).unwrap();
        assert!(budget.try_reserve(1).is_none());
        drop(large);
        let _small = budget.try_reserve(1).unwrap();
        assert!(budget.try_reserve(1_000).is_none());
    }

    #[test]
    fn only_what_waits_can_stall() {
        let budget = budget(2, 10);
        let stall = Duration::from_secs(1);
        let start = Instant::now();
        assert!(!budget.is_stalled(stall, start + 2 * stall), "nothing waits");
        let _waiting = budget.try_reserve(1).unwrap();
        assert!(!budget.is_stalled(stall, start));
        assert!(budget.is_stalled(stall, start + 2 * stall));
    }

    fn budget(messages_max: usize, bytes_max: usize) -> Arc<Budget> {
        Arc::new(Budget::new(QueueLimits { messages_max, bytes_max }))
    }
}
