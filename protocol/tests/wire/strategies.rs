//! Arbitrary messages of every kind.

mod farm;
mod operations;
mod uploads;

use std::{fmt::Debug, str::FromStr};

pub(crate) use farm::{explain, explain_reply, status_reply};
pub(crate) use operations::{alive, drain, drain_reply, drain_worker, prefetch, warm, warm_reply};

use luna_protocol::{
    AdapterId, AdapterReceipt, AdapterSource, BlobDigest, CacheUse, Chunk, Component, Dtype,
    ErrorCode, ErrorReply, ExecutionMode, FailedPatch, Failure, Family, Fidelity, Layer,
    MergedWeights, ModelDigest, Receipt, RequestDigest, TensorRef, Times, VectorAt, reply, request,
    worker,
};
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::select,
};

pub(crate) use uploads::{upload_lora, upload_lora_reply};

pub(crate) fn clip_encode() -> impl Strategy<Value = request::ClipEncode> {
    let question = (name(), name(), option::of(model_digest()), vec(prompt(), 0..3));
    let answer = (vec(entry(), 0..4), options(), option::of(any::<u32>()), vec(text(), 0..2));
    (question, answer, any::<bool>()).prop_map(
        |((id, model, model_digest, prompts), (stack, options, budget_ms, requires), no_cache)| {
            request::ClipEncode {
                id,
                model,
                model_digest,
                prompts,
                stack,
                options,
                budget_ms,
                no_cache,
                requires,
            }
        },
    )
}

pub(crate) fn has_lora() -> impl Strategy<Value = request::HasLora> {
    (name(), adapters()).prop_map(|(id, adapters)| request::HasLora { id, adapters })
}

pub(crate) fn list_loras() -> impl Strategy<Value = request::ListLoras> {
    name().prop_map(|id| request::ListLoras { id })
}

pub(crate) fn evict_lora() -> impl Strategy<Value = request::EvictLora> {
    (name(), adapters(), any::<bool>()).prop_map(|(id, adapters, delete)| request::EvictLora {
        id,
        adapters,
        delete,
    })
}

pub(crate) fn list_models() -> impl Strategy<Value = request::ListModels> {
    name().prop_map(|id| request::ListModels { id })
}

pub(crate) fn register_model() -> impl Strategy<Value = request::RegisterModel> {
    (name(), name(), family(), vec(model_file(), 0..3), option::of(any::<u32>())).prop_map(
        |(id, name, family, files, budget_ms)| request::RegisterModel {
            id,
            name,
            family,
            files,
            budget_ms,
        },
    )
}

pub(crate) fn status() -> impl Strategy<Value = request::Status> {
    name().prop_map(|id| request::Status { id })
}

pub(crate) fn cancel() -> impl Strategy<Value = request::Cancel> {
    (name(), name()).prop_map(|(id, request)| request::Cancel { id, request })
}

pub(crate) fn clip_encode_reply() -> impl Strategy<Value = reply::ClipEncodeReply> {
    let tokens = option::of(btree_map(component(), vec(chunk(), 0..3), 0..3));
    let result = (tensor(), tensor(), tokens)
        .prop_map(|(cond, pooled, tokens)| reply::ConditioningRef { cond, pooled, tokens });
    (name(), vec(result, 0..3), receipt())
        .prop_map(|(id, results, receipt)| reply::ClipEncodeReply { id, results, receipt })
}

pub(crate) fn has_lora_reply() -> impl Strategy<Value = reply::HasLoraReply> {
    (name(), adapters(), adapters()).prop_map(|(id, present, missing)| reply::HasLoraReply {
        id,
        present,
        missing,
    })
}

pub(crate) fn list_loras_reply() -> impl Strategy<Value = reply::ListLorasReply> {
    let info = (adapter(), any::<u64>(), option::of(text()), any::<bool>(), vec(name(), 0..3))
        .prop_map(|(adapter, bytes, label, stored, workers)| reply::LoraInfo {
            adapter,
            bytes,
            label,
            stored,
            workers,
        });
    (name(), vec(info, 0..3)).prop_map(|(id, loras)| reply::ListLorasReply { id, loras })
}

pub(crate) fn evict_lora_reply() -> impl Strategy<Value = reply::EvictLoraReply> {
    (name(), adapters(), adapters()).prop_map(|(id, evicted, unknown)| reply::EvictLoraReply {
        id,
        evicted,
        unknown,
    })
}

pub(crate) fn list_models_reply() -> impl Strategy<Value = reply::ListModelsReply> {
    let status = (model_info(), vec(name(), 0..3), vec(name(), 0..3))
        .prop_map(|(model, workers, loaded)| reply::ModelStatus { model, workers, loaded });
    (name(), vec(status, 0..3)).prop_map(|(id, models)| reply::ListModelsReply { id, models })
}

pub(crate) fn register_model_reply() -> impl Strategy<Value = reply::RegisterModelReply> {
    let failed =
        (name(), failure()).prop_map(|(worker, failure)| reply::WorkerFailure { worker, failure });
    (name(), model_info(), vec(name(), 0..3), vec(failed, 0..2)).prop_map(
        |(id, model, workers, failed)| reply::RegisterModelReply { id, model, workers, failed },
    )
}

pub(crate) fn cancel_reply() -> impl Strategy<Value = reply::CancelReply> {
    (name(), any::<bool>()).prop_map(|(id, cancelled)| reply::CancelReply { id, cancelled })
}

pub(crate) fn error() -> impl Strategy<Value = ErrorReply> {
    let parts = (option::of(name()), code(), any::<bool>(), text(), option::of(any::<u32>()));
    parts.prop_map(|(id, code, retryable, message, retry_after_ms)| ErrorReply {
        id,
        code,
        retryable,
        message,
        retry_after_ms,
    })
}

pub(crate) fn ready() -> impl Strategy<Value = worker::Ready> {
    let who = (name(), any::<u64>(), any::<u32>(), text(), text(), any::<u32>());
    let has = (vec(model_info(), 0..3), any::<u64>(), inventory(), vec(any::<u64>(), 0..3));
    let busy =
        (request_digest(), any::<bool>()).prop_map(|(key, alone)| worker::Busy { key, alone });
    let death = (any::<u64>(), any::<u32>(), vec(busy, 0..3))
        .prop_map(|(epoch, ago_s, busy_with)| worker::Death { epoch, ago_s, busy_with });
    (who, has, any::<bool>(), vec(death, 0..3)).prop_map(|(who, has, draining, died_with)| {
        let (worker, epoch, pid, version, device, slots) = who;
        let (models, revision, inventory, in_flight) = has;
        worker::Ready {
            worker,
            epoch,
            pid,
            version,
            device,
            slots,
            models,
            revision,
            inventory,
            in_flight,
            draining,
            died_with,
        }
    })
}

pub(crate) fn done() -> impl Strategy<Value = worker::Done> {
    let times = (option::of(float()), option::of(float()));
    (any::<u64>(), any::<u64>(), option::of(code()), times).prop_map(
        |(epoch, dispatch, failed, (compute_ms, load_ms))| worker::Done {
            epoch,
            dispatch,
            failed,
            compute_ms,
            load_ms,
        },
    )
}

pub(crate) fn fetch() -> impl Strategy<Value = worker::Fetch> {
    (blob_digest(), any::<u64>(), any::<u32>()).prop_map(|(blob, offset, length)| worker::Fetch {
        blob,
        offset,
        length,
    })
}

pub(crate) fn registered() -> impl Strategy<Value = worker::Registered> {
    (any::<u64>(), any::<u64>(), option::of(model_info()), option::of(failure())).prop_map(
        |(epoch, ticket, model, failure)| worker::Registered { epoch, ticket, model, failure },
    )
}

pub(crate) fn disconnect() -> impl Strategy<Value = worker::Disconnect> {
    any::<u64>().prop_map(|epoch| worker::Disconnect { epoch })
}

pub(crate) fn work() -> impl Strategy<Value = worker::Work> {
    (any::<u64>(), any::<[u32; 3]>(), option::of(request_digest()), any::<bool>()).prop_map(
        |(dispatch, [attempt, queued_ms, budget_ms], key, alone)| worker::Work {
            dispatch,
            attempt,
            queued_ms,
            budget_ms,
            key,
            alone,
        },
    )
}

pub(crate) fn cancel_work() -> impl Strategy<Value = worker::CancelWork> {
    any::<u64>().prop_map(|dispatch| worker::CancelWork { dispatch })
}

pub(crate) fn blob() -> impl Strategy<Value = worker::Blob> {
    (blob_digest(), any::<u64>(), any::<u64>()).prop_map(|(blob, offset, size)| worker::Blob {
        blob,
        offset,
        size,
    })
}

pub(crate) fn no_blob() -> impl Strategy<Value = worker::NoBlob> {
    (blob_digest(), text()).prop_map(|(blob, reason)| worker::NoBlob { blob, reason })
}

pub(crate) fn evict() -> impl Strategy<Value = worker::Evict> {
    adapters().prop_map(|adapters| worker::Evict { adapters })
}

pub(crate) fn register() -> impl Strategy<Value = worker::Register> {
    (any::<u64>(), name(), family(), vec(model_file(), 0..3))
        .prop_map(|(ticket, name, family, files)| worker::Register { ticket, name, family, files })
}

fn inventory() -> impl Strategy<Value = worker::Inventory> {
    (adapters(), adapters(), adapters(), vec(name(), 0..3))
        .prop_map(|(device, host, disk, models)| worker::Inventory { device, host, disk, models })
}

fn model_file() -> impl Strategy<Value = request::ModelFile> {
    prop_oneof![
        text().prop_map(request::ModelFile::Path),
        blob_digest().prop_map(request::ModelFile::Blob),
    ]
}

fn failure() -> impl Strategy<Value = Failure> {
    (code(), text(), option::of(any::<u32>())).prop_map(|(code, message, retry_after_ms)| Failure {
        code,
        message,
        retry_after_ms,
    })
}

fn prompt() -> impl Strategy<Value = request::Prompt> {
    let tokens = (vec(chunk(), 0..3), option::of(tensor()))
        .prop_map(|(chunks, vectors)| request::TokensRef { chunks, vectors });
    let tokens = btree_map(component(), tokens, 0..3);
    let texts = option::of(btree_map(component(), text(), 0..3));
    (option::of(text()), texts, option::of(tokens), vec(entry(), 0..3)).prop_map(
        |(text, texts, tokens, hook_stack)| request::Prompt { text, texts, tokens, hook_stack },
    )
}

fn entry() -> impl Strategy<Value = request::StackEntry> {
    (adapter(), float(), prop_oneof![Just(1.0), float()]).prop_map(
        |(adapter, strength_patch, strength_model)| request::StackEntry {
            adapter,
            strength_patch,
            strength_model,
        },
    )
}

fn options() -> impl Strategy<Value = request::EncodeOptions> {
    let layer = prop_oneof![Just(Layer::Last), any::<i32>().prop_map(Layer::Hidden)];
    let choice = (layer, any::<bool>())
        .prop_map(|(layer, final_norm)| request::LayerChoice { layer, final_norm });
    let layers = btree_map(component(), choice, 0..3);
    let matching = select(&[request::Matching::Strict, request::Matching::Lenient][..]);
    let how = (option::of(mode()), option::of(fidelity()), matching);
    let parts = (option::of(any::<i32>()), layers, any::<[bool; 3]>(), how, dtype());
    parts.prop_map(|(clip_skip, layers, [projected, weighted, return_tokens], how, dtype)| {
        let (mode, fidelity, matching) = how;
        request::EncodeOptions {
            clip_skip,
            layers,
            projected,
            weighted,
            mode,
            fidelity,
            matching,
            output_dtype: dtype,
            return_tokens,
        }
    })
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let vector = any::<(u32, u32)>().prop_map(|(position, row)| VectorAt { position, row });
    (vec(any::<u32>(), 0..5), vec(float(), 0..5), vec(vector, 0..3))
        .prop_map(|(ids, weights, vectors)| Chunk { ids, weights, vectors })
}

fn receipt() -> impl Strategy<Value = Receipt> {
    use AdapterSource::{Broker, Disk, Host, Resident};
    let source = select(&[Resident, Host, Disk, Broker][..]);
    let failed = (text(), text()).prop_map(|(key, reason)| FailedPatch { key, reason });
    let applied = (entry(), any::<u32>(), vec(text(), 0..2), vec(failed, 0..2), source).prop_map(
        |(entry, applied, not_matched, failed, source)| AdapterReceipt {
            adapter: entry.adapter,
            strength_patch: entry.strength_patch,
            strength_model: entry.strength_model,
            applied,
            not_matched,
            failed,
            source,
        },
    );
    let times = (float(), float(), float()).prop_map(|(queue_ms, load_ms, compute_ms)| Times {
        queue_ms,
        load_ms,
        compute_ms,
    });
    let stacks = vec(vec(applied, 0..3), 1..4);
    let merged = option::of(select(&[MergedWeights::Cached, MergedWeights::Built][..]));
    let cache = option::of(Just(CacheUse::Hit));
    let parts = (name(), model_digest(), dtype(), stacks, (mode(), fidelity(), merged, cache));
    (parts, name(), any::<u32>(), times, vec(text(), 0..2)).prop_map(
        |(parts, worker, attempts, times, warnings)| {
            let (model, model_digest, weights_dtype, mut hook_stacks, how) = parts;
            let (mode, fidelity, merged_weights, cache) = how;
            let stack = hook_stacks.remove(0);
            Receipt {
                model,
                model_digest,
                weights_dtype,
                stack,
                hook_stacks,
                mode,
                fidelity,
                merged_weights,
                worker,
                attempts,
                times,
                cache,
                warnings,
            }
        },
    )
}

fn model_info() -> impl Strategy<Value = reply::ModelInfo> {
    let chunk_tokens = btree_map(component(), any::<u32>(), 0..3);
    (name(), model_digest(), family(), dtype(), any::<u64>(), chunk_tokens).prop_map(
        |(name, digest, family, weights_dtype, bytes, chunk_tokens)| reply::ModelInfo {
            name,
            digest,
            family,
            weights_dtype,
            bytes,
            chunk_tokens,
        },
    )
}

fn family() -> impl Strategy<Value = Family> {
    select(&[Family::Sd15, Family::Sdxl][..])
}

fn fidelity() -> impl Strategy<Value = Fidelity> {
    select(&[Fidelity::Comfyui, Fidelity::Exact, Fidelity::Fast][..])
}

fn tensor() -> impl Strategy<Value = TensorRef> {
    (dtype(), vec(any::<u32>(), 0..5), any::<u16>())
        .prop_map(|(dtype, shape, attachment)| TensorRef { dtype, shape, attachment })
}

fn adapters() -> impl Strategy<Value = Vec<AdapterId>> {
    vec(adapter(), 0..4)
}

fn adapter() -> impl Strategy<Value = AdapterId> {
    any::<[u8; 32]>().prop_map(AdapterId::from_bytes)
}

fn model_digest() -> impl Strategy<Value = ModelDigest> {
    any::<[u8; 32]>().prop_map(ModelDigest::from_bytes)
}

fn request_digest() -> impl Strategy<Value = RequestDigest> {
    any::<[u8; 32]>().prop_map(RequestDigest::from_bytes)
}

fn blob_digest() -> impl Strategy<Value = BlobDigest> {
    any::<[u8; 32]>().prop_map(BlobDigest::from_bytes)
}

fn component() -> impl Strategy<Value = Component> {
    select(&[Component::ClipL, Component::ClipG][..])
}

fn dtype() -> impl Strategy<Value = Dtype> {
    select(&[Dtype::Float32, Dtype::Float16, Dtype::Bfloat16][..])
}

fn mode() -> impl Strategy<Value = ExecutionMode> {
    use ExecutionMode::{Auto, Batched, Functional, Locking};
    select(&[Auto, Locking, Functional, Batched][..])
}

fn code() -> impl Strategy<Value = ErrorCode> {
    select(ErrorCode::ALL)
}

fn name<T: FromStr<Err: Debug> + Debug>() -> impl Strategy<Value = T> {
    "[a-zA-Z0-9._:@/-]{1,128}".prop_map(|text| text.parse().expect("a name by construction"))
}

fn text() -> impl Strategy<Value = String> {
    ".{0,40}"
}

/// Every number but NaN, which is not equal to itself.
fn float() -> impl Strategy<Value = f64> {
    use proptest::num::f64::{INFINITE, NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    POSITIVE | NEGATIVE | ZERO | SUBNORMAL | NORMAL | INFINITE
}
