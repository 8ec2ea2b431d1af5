//! The bounded queue from a socket's thread to its caller.
//!
//! One producer, which must never block: what finds no room waits in `pending` at the producer,
//! who reads nothing more from the socket until it is delivered. So at most one message waits
//! there, and the bound reaches the peers as TCP back-pressure.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::budget::{Budget, QueueLimits, Reservation};

/// The socket thread's end.
#[derive(Debug)]
pub(crate) struct InboxSender<T> {
    /// Unbounded in itself; each entry holds its share of `budget`.
    queue: mpsc::UnboundedSender<(T, Reservation)>,
    budget: Arc<Budget>,
    pending: VecDeque<(T, usize)>,
}

/// The caller's end.
#[derive(Debug)]
pub(crate) struct InboxReceiver<T> {
    queue: mpsc::UnboundedReceiver<(T, Reservation)>,
}

/// Makes an inbox that holds at most `limits`.
pub(crate) fn inbox<T>(limits: QueueLimits) -> (InboxSender<T>, InboxReceiver<T>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let budget = Arc::new(Budget::new(limits));
    (
        InboxSender { queue: sender, budget, pending: VecDeque::new() },
        InboxReceiver { queue: receiver },
    )
}

impl<T> InboxSender<T> {
    /// Queues `event`, which holds `bytes`, behind everything pushed before it.
    pub(crate) fn push(&mut self, event: T, bytes: usize) {
        let reservation = if self.is_clear() { self.budget.try_reserve(bytes) } else { None };
        match reservation {
            Some(reservation) => self.enqueue(event, reservation),
            None => self.pending.push_back((event, bytes)),
        }
    }

    /// Tells whether everything pushed has found room, so that the socket may be read.
    pub(crate) fn is_clear(&self) -> bool {
        self.pending.is_empty()
    }

    /// Waits until the oldest event without room has found it. Dropping the future loses nothing.
    pub(crate) async fn deliver(&mut self) {
        let Some((_, bytes)) = self.pending.front() else { return };
        let reservation = self.budget.reserve(*bytes).await;
        if let Some((event, _)) = self.pending.pop_front() {
            self.enqueue(event, reservation);
        }
    }

    fn enqueue(&self, event: T, reservation: Reservation) {
        // A receiver that is gone has stopped this thread too: nobody misses the event.
        let _ = self.queue.send((event, reservation));
    }
}

impl<T> InboxReceiver<T> {
    /// Returns the next event, or nothing once the socket's thread has ended. Cancel safe.
    pub(crate) async fn recv(&mut self) -> Option<T> {
        self.queue.recv().await.map(|(event, _)| event)
    }

    /// Like `recv`, for threads outside any runtime.
    pub(crate) fn recv_blocking(&mut self) -> Option<T> {
        self.queue.blocking_recv().map(|(event, _)| event)
    }

    /// Returns the next event if one waits.
    pub(crate) fn try_recv(&mut self) -> Option<T> {
        self.queue.try_recv().ok().map(|(event, _)| event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn what_finds_no_room_is_delivered_later_in_order() {
        let (mut sender, mut receiver) = inbox(QueueLimits { messages_max: 2, bytes_max: 10 });
        sender.push("a", 4);
        sender.push("b", 4);
        sender.push("c", 4);
        sender.push("d", 0);
        assert!(!sender.is_clear());
        assert!(futures::FutureExt::now_or_never(sender.deliver()).is_none());

        for expected in ["a", "b", "c", "d"] {
            assert_eq!(receiver.recv().await, Some(expected));
            sender.deliver().await;
        }
        assert!(sender.is_clear());
        drop(sender);
        assert_eq!(receiver.recv().await, None);
    }
}
