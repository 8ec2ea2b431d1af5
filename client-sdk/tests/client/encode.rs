//! Encodes: what is sent, what is handed out, and what is refused.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use luna_client::{
    AdapterId, Chunk, Component, ComponentTokens, Dtype, EncodeRequest, Error, ErrorCode,
    ErrorKind, ExecutionMode, Fidelity, ModelDigest, StackEntry, Unclaimed, VectorAt, VectorTable,
};
use protocol::{
    Envelope, Failure, frames,
    reply::{
        CancelReply, ClipEncodeReply, EvictLoraReply, HasLoraReply, ListLorasReply,
        ListModelsReply, StatusReply,
    },
    request::{Cancel, ClipEncode, EvictLora, HasLora, Matching},
    tensor,
};

use crate::farm::{Farm, answer, id, one, right_reply, run};

#[test]
fn an_encode_returns_tensors_and_receipt() {
    let farm = Farm::start(answer);
    let lora = AdapterId::of(b"anime");
    let request = EncodeRequest::new("sd15").prompt("a fox").prompt("").lora(lora, 0.8);
    let encoding = run(farm.client().encode(request)).unwrap();

    assert_eq!(encoding.conditionings.len(), 2);
    let first = &encoding.conditionings[0];
    assert_eq!((first.cond.shape.as_slice(), first.cond.data.len()), (&[1, 77, 4][..], 308));
    assert_eq!(first.pooled.data, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!((encoding.receipt.stack[0].adapter, encoding.receipt.stack[0].applied), (lora, 72));
}

#[test]
fn every_setting_reaches_the_wire() {
    let farm = Farm::start(answer);
    let chunk = Chunk {
        ids: vec![49406; 76],
        weights: Vec::new(),
        vectors: vec![VectorAt { position: 3, row: 1 }],
    };
    let vectors = VectorTable { width: 2, elements: vec![1.0, 2.0, 3.0, 4.0] };
    let tokens = ComponentTokens { chunks: vec![chunk.clone()], vectors };
    let entry =
        StackEntry { adapter: AdapterId::of(b"a"), strength_patch: 0.0, strength_model: -0.5 };
    let request = EncodeRequest::new("sd15")
        .tokens(BTreeMap::from([(Component::ClipL, tokens)]))
        .stack_entry(entry)
        .clip_skip(-2)
        .unprojected()
        .unweighted()
        .timeout(Duration::from_secs(5));
    run(farm.client().encode(request)).unwrap();

    let sent = farm.seen_of::<ClipEncode>().remove(0);
    let tokens = &sent.prompts[0].tokens.as_ref().unwrap()[&Component::ClipL];
    assert_eq!(tokens.chunks, [chunk]);
    let vectors = tokens.vectors.as_ref().unwrap();
    assert_eq!((vectors.shape.as_slice(), vectors.attachment), (&[2, 2][..], 0));
    let attachment = &farm.seen()[0].attachments[0];
    assert_eq!(tensor::f32_from_bytes(attachment), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(sent.stack, [entry]);
    assert_eq!(sent.options.clip_skip, Some(-2));
    assert!(!sent.options.projected && !sent.options.weighted);
    assert!((1..=5000).contains(&sent.budget_ms.unwrap()));
}

#[test]
fn an_answer_to_another_question_is_an_error_and_never_a_result() {
    type Spoil = fn(&mut ClipEncodeReply, &mut Vec<Bytes>);
    let cases: [(Spoil, &str); 15] = [
        (|reply, _| reply.receipt.stack.clear(), "0 adapters were applied instead of 2"),
        (|reply, _| reply.receipt.stack.truncate(1), "1 adapters were applied instead of 2"),
        (|reply, _| reply.receipt.stack.swap(0, 1), "entry 0 of the stack"),
        (|reply, _| reply.receipt.stack[1].strength_patch = 0.499, "at 0.499"),
        (|reply, _| reply.receipt.stack[0].strength_model = 0.0, "(model 0)"),
        (|reply, _| reply.receipt.model = "sdxl".parse().unwrap(), "of model `sdxl`"),
        (|reply, _| reply.receipt.model_digest = ModelDigest::of(b"x"), "of model digest"),
        (|reply, _| reply.results.clear(), "0 results for 1 prompts"),
        (|reply, _| reply.results[0].cond.shape = vec![1, 0, 4], "expected [1, positions, width]"),
        (|reply, _| reply.receipt.mode = ExecutionMode::Locking, "mode `locking` instead of"),
        (|reply, _| reply.receipt.fidelity = Fidelity::Exact, "fidelity is `exact` instead of"),
        (|reply, _| reply.receipt.stack[1].not_matched.push("k".to_owned()), "error: `k`"),
        (|reply, _| reply.results[0].pooled.shape = vec![4], "expected [1, width]"),
        (|reply, _| reply.results[0].cond.dtype = Dtype::Float16, "dtype `float16`"),
        (|_, attachments| attachments.truncate(1), "attachment 1 does not exist"),
    ];
    for (spoil, reason) in cases {
        let farm = Farm::start(move |envelope| {
            let (mut reply, mut attachments) = right_reply(envelope);
            spoil(&mut reply, &mut attachments);
            vec![frames::frames(&reply, attachments)]
        });
        let request = EncodeRequest::new("sd15")
            .prompt("a fox")
            .model_digest(ModelDigest::of(b"model"))
            .mode(ExecutionMode::Functional)
            .fidelity(Fidelity::Comfyui)
            .lora(AdapterId::of(b"one"), 1.0)
            .lora(AdapterId::of(b"two"), 0.5);
        let error = run(farm.client().encode(request)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn the_length_of_a_result_is_that_of_the_tokens_also_for_a_long_clip() {
    let encode = |chunk_tokens: &[usize], found: u32| {
        let farm = Farm::start(move |envelope| {
            let (mut reply, mut attachments) = right_reply(envelope);
            reply.results[0].cond.shape = vec![1, found, 4];
            attachments[0] = tensor::f32_to_bytes(&vec![0.5; found as usize * 4]);
            vec![frames::frames(&reply, attachments)]
        });
        let tokens = [Component::ClipL, Component::ClipG].into_iter().zip(chunk_tokens);
        let tokens = tokens.map(|(component, &length)| {
            let chunks = vec![Chunk { ids: vec![49406; length], ..Chunk::default() }; 2];
            (component, ComponentTokens { chunks, ..ComponentTokens::default() })
        });
        let request = EncodeRequest::new("long").tokens(tokens.collect());
        run(farm.client().encode(request)).map_err(|error| error.to_string())
    };
    assert!(encode(&[248], 496).is_ok());
    assert!(encode(&[248, 77], 154).is_ok());
    let error = encode(&[248], 154).unwrap_err();
    assert!(error.contains("expected [1, 496, width]"), "{error}");
    let error = encode(&[248, 77], 496).unwrap_err();
    assert!(error.contains("expected [1, 154, width]"), "{error}");
}

#[test]
fn what_was_left_to_the_farm_may_become_anything() {
    let farm = Farm::start(|envelope| {
        let (mut reply, attachments) = right_reply(envelope);
        reply.receipt.mode = ExecutionMode::Locking;
        reply.receipt.fidelity = Fidelity::Exact;
        reply.receipt.stack[0].not_matched.push("k".to_owned());
        vec![frames::frames(&reply, attachments)]
    });
    let request = fox().lora(AdapterId::of(b"one"), 1.0).lenient().mode(ExecutionMode::Auto);
    let encoding = run(farm.client().encode(request)).unwrap();
    assert_eq!(encoding.receipt.stack[0].not_matched, ["k"]);
    let sent = farm.seen_of::<ClipEncode>().remove(0).options;
    assert_eq!((sent.matching, sent.mode), (Matching::Lenient, Some(ExecutionMode::Auto)));
}

#[test]
fn two_texts_reach_the_wire_and_tokens_say_how_many_positions_come_back() {
    let farm = Farm::start(answer);
    let texts = [(Component::ClipL, "fox".to_owned()), (Component::ClipG, "forest".to_owned())];
    run(farm.client().encode(EncodeRequest::new("sdxl").texts(texts.clone()))).unwrap();
    let sent = farm.seen_of::<ClipEncode>().remove(0);
    assert_eq!(sent.prompts[0].texts, Some(texts.into()));

    let chunk = Chunk { ids: vec![49406; 248], ..Chunk::default() };
    let tokens = ComponentTokens { chunks: vec![chunk], ..ComponentTokens::default() };
    let long = EncodeRequest::new("sd15").tokens(BTreeMap::from([(Component::ClipL, tokens)]));
    let error = run(farm.client().encode(long)).unwrap_err();
    assert!(error.to_string().contains("expected [1, 248, width]"), "{error}");
}

#[test]
fn a_reply_of_another_kind_is_an_error() {
    let farm = Farm::start(|envelope| one(&CancelReply { id: id(envelope), cancelled: true }));
    let error = run(farm.client().encode(fox())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("`cancel_reply` instead of `clip_encode_reply`"), "{error}");
}

#[test]
fn tokens_that_were_asked_for_must_come() {
    let farm = Farm::start(answer);
    let error = run(farm.client().encode(fox().return_tokens())).unwrap_err();
    assert!(error.to_string().contains("result 0 has no tokens"), "{error}");
}

#[test]
fn the_farms_error_arrives_with_its_code_and_advice() {
    let farm = Farm::start(|envelope| {
        let mut failure = Failure::new(ErrorCode::Overloaded, "the queue is full");
        failure.retry_after_ms = Some(250);
        one(&failure.into_reply(Some(id(envelope))))
    });
    let error = run(farm.client().encode(fox())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Farm(ErrorCode::Overloaded));
    assert_eq!(error.code(), Some(ErrorCode::Overloaded));
    assert!(error.is_retryable());
    assert_eq!(error.retry_after(), Some(Duration::from_millis(250)));
    assert_eq!(error.to_string(), "overloaded: the queue is full");
}

#[test]
fn repeated_and_foreign_replies_are_counted_and_dropped() {
    let farm = Farm::start(|envelope| {
        if envelope.is::<ClipEncode>() {
            let failure = Failure::new(ErrorCode::WorkerLost, "too late");
            let stranger = CancelReply { id: "stranger".parse().unwrap(), cancelled: false };
            let late = one(&failure.into_reply(Some(id(envelope))));
            [answer(envelope), answer(envelope), late, one(&stranger)].concat()
        } else {
            has_none(envelope)
        }
    });
    let client = farm.client();
    run(client.encode(fox())).unwrap();
    // Replies come in order, so the four are through once this one is answered.
    run(client.has_lora(&[])).unwrap();
    let expected = Unclaimed { repeated: 2, other: 1 };
    assert_eq!(run(client.unclaimed_replies()).unwrap(), expected);
}

#[test]
fn a_request_that_cannot_be_sent_is_refused_here() {
    let farm = Farm::start(answer);
    let client = farm.client();
    let too_long = fox().timeout(Duration::from_secs(601));
    let odd = VectorTable { width: 2, elements: vec![0.0; 3] };
    let odd = ComponentTokens { chunks: Vec::new(), vectors: odd };
    let odd = EncodeRequest::new("sd15").tokens(BTreeMap::from([(Component::ClipG, odd)]));
    let entry =
        StackEntry { adapter: AdapterId::of(b"anime"), strength_patch: 1.0, strength_model: 1.0 };
    let early = EncodeRequest::new("sd15").hook(entry).prompt("cat");
    for (request, reason) in [
        (EncodeRequest::new("no such name").prompt(""), "model `no such name` is not a name"),
        (too_long, "the time budget is 601s"),
        (odd, "the vectors of `clip_g` have 3 elements"),
        (early, "call it after the prompt it is for"),
    ] {
        let error = run(client.encode(request)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(farm.seen().is_empty());
}

#[test]
fn a_silent_farm_ends_in_a_timeout_and_the_client_goes_on() {
    let farm =
        Farm::start(
            |envelope| {
                if envelope.is::<ClipEncode>() { Vec::new() } else { has_none(envelope) }
            },
        );
    let client = farm.client();
    let error = run(client.encode(fox().timeout(Duration::from_millis(50)))).unwrap_err();
    assert_eq!(
        (error.kind(), error.code()),
        (ErrorKind::Timeout, Some(ErrorCode::DeadlineExceeded))
    );
    assert!(error.is_retryable());
    assert!(error.to_string().contains(farm.endpoint()), "{error}");
    run(client.has_lora(&[])).unwrap();
}

#[test]
fn dropping_an_encode_cancels_it_at_the_farm() {
    let farm = Farm::start(|_| Vec::new());
    let client = farm.client();
    let pending = client.start_encode(fox()).unwrap();
    let asked = pending.id().clone();
    farm.wait();
    drop(pending);
    farm.wait();
    assert_eq!(farm.seen_of::<Cancel>()[0].request, asked);
}

#[test]
fn several_requests_are_under_way_at_once_and_answered_in_any_order() {
    let mut held = Vec::new();
    let farm = Farm::start(move |envelope| {
        held.extend(answer(envelope));
        if held.len() < 3 {
            return Vec::new();
        }
        held.drain(..).rev().collect()
    });
    let client = farm.client();
    let pending: Vec<_> = (0..3).map(|_| client.start_encode(fox()).unwrap()).collect();
    for pending in pending {
        run(pending.outcome()).unwrap();
    }
}

#[test]
fn the_small_questions_are_asked_and_answered() {
    let farm = Farm::start(|envelope| {
        let id = id(envelope);
        match envelope.peek.kind.as_str() {
            "status" => one(&status_reply(envelope)),
            "list_loras" => one(&ListLorasReply { id, loras: Vec::new() }),
            "list_models" => one(&ListModelsReply { id, models: Vec::new() }),
            "evict_lora" => {
                let EvictLora { adapters, delete, .. } = envelope.read().unwrap();
                assert!(delete);
                one(&EvictLoraReply { id, evicted: adapters, unknown: Vec::new() })
            }
            _ => has_none(envelope),
        }
    });
    let client = farm.client();
    let lora = AdapterId::of(b"anime");
    assert_eq!(run(client.has_lora(&[lora])).unwrap().missing, [lora]);
    assert!(run(client.status()).unwrap().ready);
    assert!(run(client.list_loras()).unwrap().is_empty());
    assert!(run(client.list_models()).unwrap().is_empty());
    assert_eq!(run(client.evict_lora(&[lora], true)).unwrap().evicted, [lora]);
}

fn fox() -> EncodeRequest {
    EncodeRequest::new("sd15").prompt("a fox")
}

fn has_none(envelope: &Envelope) -> Vec<Vec<Bytes>> {
    let missing = envelope.read::<HasLora>().expect("a question").adapters;
    one(&HasLoraReply { id: id(envelope), present: Vec::new(), missing })
}

fn status_reply(envelope: &Envelope) -> StatusReply {
    StatusReply {
        id: id(envelope),
        version: "0.1.0".to_owned(),
        uptime_ms: 1,
        ready: true,
        reasons: Vec::new(),
        workers: Vec::new(),
        queued: 0,
        in_flight: 0,
        loras: 0,
        lora_bytes: 0,
        counters: luna_client::Counters::default(),
    }
}

/// Errors cross threads and fit in boxes.
#[test]
fn errors_are_send_and_sync() {
    fn check<T: Send + Sync + std::error::Error + 'static>() {}
    check::<Error>();
    let error = run(Farm::start(answer).client().upload_lora("/no/such/file", |_| {})).unwrap_err();
    assert!(std::error::Error::source(&error).is_none(), "the sentence says everything: {error}");
}
