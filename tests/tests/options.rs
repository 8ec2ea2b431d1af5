//! What a request may choose: mode, fidelity, matching, two texts, entries of single keys.

use std::collections::BTreeMap;

use adapter::PatchSet;
use luna_client::{
    AdapterId, Client, Component, Dtype, EncodeRequest, Encoding, ErrorCode, ExecutionMode,
    Fidelity, MergedWeights, StackEntry,
};
use luna_e2e::{Cluster, golden::tiny_lora, models};

#[tokio::test]
async fn every_mode_and_fidelity_is_honoured_and_the_receipt_says_which_ran() {
    let cluster =
        Cluster::new().model(&models::tiny_sd15()).weights_dtype(Dtype::Float16).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, "sd15", "kohya").await;
    let mut answers = BTreeMap::new();
    for mode in [ExecutionMode::Functional, ExecutionMode::Locking] {
        for fidelity in [Fidelity::Comfyui, Fidelity::Exact] {
            let request = base().lora(adapter, 0.8).mode(mode).fidelity(fidelity);
            let encoding = client.encode(request).await.expect("the farm answers");
            assert_eq!((encoding.receipt.mode, encoding.receipt.fidelity), (mode, fidelity));
            answers.insert((fidelity, mode), encoding);
        }
    }
    let answer = |fidelity, mode| &answers[&(fidelity, mode)];
    for fidelity in [Fidelity::Comfyui, Fidelity::Exact] {
        let modes = [ExecutionMode::Functional, ExecutionMode::Locking];
        let [functional, locking] = modes.map(|mode| bits(answer(fidelity, mode)));
        assert!(functional == locking, "both modes give the same bytes with {fidelity}");
    }
    let mode = ExecutionMode::Functional;
    let rounding = worst(answer(Fidelity::Comfyui, mode), answer(Fidelity::Exact, mode));
    assert!(rounding > 0.0 && rounding < 1e-2, "rounding the merged weights shows: {rounding:.1e}");
}

#[tokio::test]
async fn what_a_worker_is_set_to_is_what_a_request_gets_that_does_not_choose() {
    let cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .worker_flags(&["--execution-mode", "locking", "--fidelity", "exact"])
        .start()
        .await;
    let client = cluster.client().await;
    let adapter = upload(&client, "sd15", "kohya").await;
    let receipt = encode(&client, base().lora(adapter, 1.0)).await.receipt;
    assert_eq!((receipt.mode, receipt.fidelity), (ExecutionMode::Locking, Fidelity::Exact));
    let chosen = base().lora(adapter, 1.0).mode(ExecutionMode::Functional);
    assert_eq!(encode(&client, chosen).await.receipt.mode, ExecutionMode::Functional);
}

#[tokio::test]
async fn what_no_worker_can_do_yet_is_unsupported() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    for (request, word) in [
        (base().mode(ExecutionMode::Batched), "batched"),
        (base().fidelity(Fidelity::Fast), "fast"),
    ] {
        let error = client.encode(request).await.expect_err(word);
        assert_eq!(error.code(), Some(ErrorCode::Unsupported), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn merged_weights_of_a_stack_that_comes_again_are_kept() {
    let cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .worker_flags(&["--merged-budget-mb", "64"])
        .start()
        .await;
    let client = cluster.client().await;
    let adapter = upload(&client, "sd15", "loha").await;
    let first = encode(&client, base().lora(adapter, 0.5)).await;
    assert_eq!(first.receipt.merged_weights, Some(MergedWeights::Built));
    for _ in 0..2 {
        encode(&client, base().lora(adapter, 0.5)).await;
    }
    let again = encode(&client, base().lora(adapter, 0.5)).await;
    assert_eq!(again.receipt.merged_weights, Some(MergedWeights::Cached));
    assert!(bits(&again) == bits(&first), "kept weights give the same bytes");
    let other = encode(&client, base().lora(adapter, 0.500_000_1)).await;
    assert_eq!(other.receipt.merged_weights, Some(MergedWeights::Built), "another strength");
    let base = encode(&client, base()).await;
    assert_eq!(base.receipt.merged_weights, None, "nothing is merged without a stack");
}

#[tokio::test]
async fn two_texts_are_those_of_their_encoders() {
    let cluster = Cluster::new().model(&models::tiny_sdxl()).start().await;
    let client = cluster.client().await;
    let texts = |l: &str, g: &str| {
        let texts = [(Component::ClipL, l.to_owned()), (Component::ClipG, g.to_owned())];
        EncodeRequest::new("tinyxl").texts(texts)
    };
    let same = encode(&client, texts("a cat", "a cat")).await;
    let plain = encode(&client, EncodeRequest::new("tinyxl").prompt("a cat")).await;
    assert!(bits(&same) == bits(&plain), "the same text twice is the plain prompt");
    let long = "a red fox ".repeat(40);
    let padded = encode(&client, texts("a cat", &long)).await;
    let shape = padded.conditionings[0].cond.shape.clone();
    assert_eq!(shape, [1, 154, 80], "the short text is filled up with chunks of the empty prompt");

    let missing = [(Component::ClipL, "a cat".to_owned())];
    let error = client.encode(EncodeRequest::new("tinyxl").texts(missing)).await;
    let error = error.expect_err("a text for bigG is missing");
    assert_eq!(error.code(), Some(ErrorCode::InvalidRequest), "{error}");
    assert!(error.to_string().contains("clip_g"), "{error}");
}

#[tokio::test]
async fn entries_of_single_keys_are_the_adapter_as_a_whole() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let file = std::fs::read(tiny_lora("sd15", "kohya")).expect("the LoRA is in the repository");
    let (whole, _) = adapter::read_lora(&*file).expect("the LoRA is sound");
    let mut single = base();
    for (target, patch) in whole.patches() {
        let one = PatchSet::new(BTreeMap::from([(target.clone(), patch.clone())]), []);
        let one = one.expect("one patch is an adapter");
        let uploaded = client.upload_adapter(&one, &target.to_string(), |_| {}).await;
        let adapter = uploaded.expect("the adapter is accepted").adapter;
        let entry = StackEntry { adapter, strength_patch: 0.7, strength_model: 1.0 };
        single = single.stack_entry(entry);
    }
    let uploaded = client.upload_adapter(&whole, "whole", |_| {}).await;
    let whole = uploaded.expect("the adapter is accepted").adapter;
    let expected = encode(&client, base().lora(whole, 0.7)).await;
    for mode in [ExecutionMode::Functional, ExecutionMode::Locking] {
        let found = encode(&client, single.clone().mode(mode)).await;
        assert!(bits(&found) == bits(&expected), "in {mode}");
        assert!(found.receipt.stack.iter().all(|entry| entry.applied == 1));
    }
}

#[tokio::test]
async fn keys_that_the_model_does_not_have_are_an_error_unless_the_request_is_lenient() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let both = upload(&client, "sdxl", "kohya").await;
    let strict = client.encode(base().lora(both, 1.0)).await.expect_err("the part for bigG");
    assert_eq!(strict.code(), Some(ErrorCode::LoraMismatch), "{strict}");
    for word in ["clip_g.transformer.", "lenient", &both.to_string()] {
        assert!(strict.to_string().contains(word), "`{word}` is not in: {strict}");
    }
    let lenient = encode(&client, base().lora(both, 1.0).lenient()).await;
    let entry = &lenient.receipt.stack[0];
    assert!(entry.applied > 0 && !entry.not_matched.is_empty(), "{entry:?}");
    let plain = encode(&client, base()).await;
    assert!(bits(&lenient) != bits(&plain), "the part that fits must show");
}

#[tokio::test]
async fn a_stack_for_a_component_that_takes_no_part_is_not_counted_as_applied() {
    let cluster = Cluster::new().model(&models::tiny_sdxl()).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, "sdxl", "kohya").await;
    let probe = EncodeRequest::new("tinyxl").prompt("a cat").return_tokens();
    let mut tokens = encode(&client, probe.lora(adapter, 1.0)).await;
    let all = tokens.receipt.stack[0].applied;
    let mut chunks = tokens.conditionings.remove(0).tokens.expect("tokens were asked for");
    chunks.remove(&Component::ClipG);
    let only_l = chunks.into_iter().map(|(component, chunks)| {
        (component, luna_client::ComponentTokens { chunks, ..Default::default() })
    });
    let request = EncodeRequest::new("tinyxl").tokens(only_l.collect()).lora(adapter, 1.0);
    let alone = encode(&client, request).await.receipt.stack.remove(0);
    assert!(alone.applied > 0 && alone.applied < all, "{} of {all}", alone.applied);
    assert_eq!(alone.not_matched, Vec::<String>::new());
}

fn base() -> EncodeRequest {
    EncodeRequest::new("tiny").prompt("a (red:1.3) cat on the ((mat))").no_cache()
}

async fn upload(client: &Client, family: &str, name: &str) -> AdapterId {
    let uploaded = client.upload_lora(tiny_lora(family, name), |_| {}).await;
    uploaded.expect("the LoRA is accepted").adapter
}

async fn encode(client: &Client, request: EncodeRequest) -> Encoding {
    client.encode(request).await.expect("the farm answers")
}

fn bits(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}

fn worst(one: &Encoding, other: &Encoding) -> f32 {
    let [one, other] = [one, other].map(|encoding| &encoding.conditionings[0].cond.data);
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}
