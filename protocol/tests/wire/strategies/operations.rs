//! Arbitrary messages about prefetching and draining.

use luna_protocol::{reply, request, worker};
use proptest::{collection::vec, option, prelude::*};

use super::{adapter, adapters, inventory, name, text};

pub(crate) fn warm() -> impl Strategy<Value = request::Warm> {
    (name(), adapters(), option::of(name()), any::<u32>(), option::of(any::<u32>())).prop_map(
        |(id, adapters, model, workers, budget_ms)| request::Warm {
            id,
            adapters,
            model,
            workers,
            budget_ms,
        },
    )
}

pub(crate) fn warm_reply() -> impl Strategy<Value = reply::WarmReply> {
    let names = || vec(name(), 0..3);
    let entry = (adapter(), names(), names())
        .prop_map(|(adapter, held, fetching)| reply::WarmAdapter { adapter, held, fetching });
    (name(), vec(entry, 0..3)).prop_map(|(id, adapters)| reply::WarmReply { id, adapters })
}

pub(crate) fn drain() -> impl Strategy<Value = request::Drain> {
    (name(), option::of(name()), option::of(text()), any::<bool>())
        .prop_map(|(id, worker, reason, undo)| request::Drain { id, worker, reason, undo })
}

pub(crate) fn drain_reply() -> impl Strategy<Value = reply::DrainReply> {
    (name(), option::of(name()), any::<bool>(), any::<u32>()).prop_map(
        |(id, worker, draining, in_flight)| reply::DrainReply { id, worker, draining, in_flight },
    )
}

pub(crate) fn prefetch() -> impl Strategy<Value = worker::Prefetch> {
    adapters().prop_map(|adapters| worker::Prefetch { adapters })
}

pub(crate) fn drain_worker() -> impl Strategy<Value = worker::DrainWorker> {
    (option::of(text()), any::<bool>())
        .prop_map(|(reason, undo)| worker::DrainWorker { reason, undo })
}

pub(crate) fn alive() -> impl Strategy<Value = worker::Alive> {
    let held = (option::of(inventory()), option::of(any::<u64>()), adapters());
    let numbers = (any::<u64>(), any::<u64>(), vec(any::<u64>(), 0..3));
    (numbers, held, any::<bool>(), option::of(text())).prop_map(
        |(numbers, held, draining, drain_reason)| {
            let (epoch, revision, in_flight) = numbers;
            let (inventory, resident_digest, prefetching) = held;
            worker::Alive {
                epoch,
                revision,
                inventory,
                resident_digest,
                in_flight,
                prefetching,
                draining,
                drain_reason,
            }
        },
    )
}
