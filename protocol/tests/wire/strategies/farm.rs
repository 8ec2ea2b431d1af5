//! Arbitrary messages about the farm itself: how it is, and where a request would go.

use luna_protocol::{reply, request};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{adapters, float, model_digest, name, text};

pub(crate) fn status_reply() -> impl Strategy<Value = reply::StatusReply> {
    let farm = (name(), text(), any::<u64>(), any::<bool>(), vec(text(), 0..3));
    let numbers = (any::<[u32; 3]>(), any::<u64>(), counters());
    (farm, vec(worker_status(), 0..3), numbers).prop_map(|(farm, workers, numbers)| {
        let (id, version, uptime_ms, ready, reasons) = farm;
        let ([queued, in_flight, loras], lora_bytes, counters) = numbers;
        reply::StatusReply {
            id,
            version,
            uptime_ms,
            ready,
            reasons,
            workers,
            queued,
            in_flight,
            loras,
            lora_bytes,
            counters,
        }
    })
}

fn counters() -> impl Strategy<Value = reply::Counters> {
    any::<[u64; 10]>().prop_map(|numbers| {
        let [accepted, answered, failed, requeued, workers_lost, numbers @ ..] = numbers;
        let [coalesced, cache_hits, ejected, quarantined, refused_overload] = numbers;
        reply::Counters {
            accepted,
            answered,
            failed,
            requeued,
            workers_lost,
            coalesced,
            cache_hits,
            ejected,
            quarantined,
            refused_overload,
        }
    })
}

fn worker_status() -> impl Strategy<Value = reply::WorkerStatus> {
    let who = (name(), any::<u32>(), text(), vec(name(), 0..2), vec(name(), 0..2));
    let drain = (any::<bool>(), option::of(text()));
    (who, any::<[u32; 5]>(), drain, any::<u64>()).prop_map(
        |((worker, pid, device, models, loaded), numbers, drain, silent_ms)| {
            let [resident, host, disk, in_flight, prefetching] = numbers;
            let (draining, drain_reason) = drain;
            reply::WorkerStatus {
                worker,
                pid,
                device,
                models,
                loaded,
                resident,
                host,
                disk,
                in_flight,
                draining,
                drain_reason,
                prefetching,
                silent_ms,
            }
        },
    )
}

pub(crate) fn explain() -> impl Strategy<Value = request::Explain> {
    (name(), name(), option::of(model_digest()), adapters(), any::<u32>()).prop_map(
        |(id, model, model_digest, adapters, chunks)| request::Explain {
            id,
            model,
            model_digest,
            adapters,
            chunks,
        },
    )
}

pub(crate) fn explain_reply() -> impl Strategy<Value = reply::ExplainReply> {
    use reply::Refusal::{DiedHere, Draining, Ejected, Isolated, LacksAdapter, NoSlots, NotServed};
    let refused =
        select(&[NotServed, Draining, NoSlots, Ejected, Isolated, DiedHere, LacksAdapter][..]);
    let score = (float(), float(), float(), float(), float()).prop_map(
        |(queue_ms, load_ms, model_ms, compute_ms, total_ms)| reply::Score {
            queue_ms,
            load_ms,
            model_ms,
            compute_ms,
            total_ms,
        },
    );
    let verdict = (name(), option::of(refused), option::of(score), any::<bool>()).prop_map(
        |(worker, refused, score, free)| reply::WorkerVerdict { worker, refused, score, free },
    );
    (name(), vec(verdict, 0..3), option::of(name()))
        .prop_map(|(id, workers, chosen)| reply::ExplainReply { id, workers, chosen })
}
