//! No request sees another's LoRA, and the base model never changes.

use fixtures::Size;
use luna_client::{AdapterSource, Client, EncodeRequest, Encoding};
use luna_e2e::{Cluster, models};

const PROMPT: &str = "a (red:1.3) cat on the ((mat))";

#[tokio::test]
async fn a_base_request_after_lora_requests_gives_the_identical_base_answer() {
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let base = bytes(&encode(&client, &[]).await);
    let mut previous = base.clone();
    for seed in 1..=5 {
        let adapter = upload(&client, seed).await;
        let with_lora = bytes(&encode(&client, &[(adapter, 1.0)]).await);
        assert_ne!(with_lora, base, "the LoRA of seed {seed} must show");
        assert_ne!(with_lora, previous, "and not be the one before");
        assert_eq!(bytes(&encode(&client, &[]).await), base, "after the LoRA of seed {seed}");
        previous = with_lora;
    }
}

#[tokio::test]
async fn two_workers_give_the_identical_answer() {
    let cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, 1).await;
    for stack in [&[][..], &[(adapter, 0.7)]] {
        let mut answers = std::collections::BTreeMap::new();
        // Many at once, so that both workers get some.
        for _ in 0..20 {
            let requests = [encode(&client, stack), encode(&client, stack), encode(&client, stack)];
            for encoding in join(requests).await {
                let worker = encoding.receipt.worker.to_string();
                let answer = bytes(&encoding);
                assert_eq!(answers.entry(worker).or_insert_with(|| answer.clone()), &answer);
            }
            if answers.len() == 2 {
                break;
            }
        }
        assert_eq!(answers.len(), 2, "both workers answered");
        let distinct: std::collections::BTreeSet<_> = answers.values().collect();
        assert_eq!(distinct.len(), 1, "with the same bytes");
    }
}

#[tokio::test]
async fn many_clients_with_their_own_stacks_get_their_own_answers() {
    let cluster = Cluster::new().workers(2).model(&models::tiny_sd15()).start().await;
    let client = cluster.client().await;
    let mut solo = Vec::new();
    for seed in 1..=8 {
        let stack = vec![(upload(&client, seed).await, 0.5)];
        let answer = bytes(&encode(&client, &stack).await);
        solo.push((stack, answer));
    }
    let mut tasks = Vec::new();
    for (stack, answer) in solo {
        let client = cluster.client().await;
        tasks.push(tokio::spawn(async move {
            for _ in 0..25 {
                assert_eq!(bytes(&encode(&client, &stack).await), answer);
            }
        }));
    }
    for task in tasks {
        task.await.expect("no client saw a foreign answer");
    }
}

#[tokio::test]
async fn the_receipt_says_what_was_done() {
    let cluster =
        Cluster::new().model(&models::tiny_sd15()).broker_flags(&["--fan-out", "0"]).start().await;
    let client = cluster.client().await;
    let adapter = upload(&client, 1).await;
    let first = encode(&client, &[(adapter, 0.8)]).await.receipt;
    assert_eq!(first.stack[0].adapter, adapter);
    assert_eq!(first.stack[0].strength_patch.to_bits(), 0.8_f64.to_bits());
    assert_eq!(first.stack[0].applied, 24, "six linear layers in each of four layers");
    assert_eq!(first.stack[0].source, AdapterSource::Broker);
    assert!(first.warnings.is_empty() && first.attempts == 1);

    let second = encode(&client, &[(adapter, 0.8)]).await.receipt;
    assert_eq!(second.stack[0].source, AdapterSource::Resident);
    assert_eq!(second.model_digest, first.model_digest);
}

type Stack<'a> = &'a [(luna_client::AdapterId, f64)];

async fn encode(client: &Client, stack: Stack<'_>) -> Encoding {
    let request = EncodeRequest::new("tiny").prompt(PROMPT).no_cache();
    let request =
        stack.iter().fold(request, |request, (id, strength)| request.lora(*id, *strength));
    client.encode(request).await.expect("the farm answers")
}

async fn upload(client: &Client, seed: u64) -> luna_client::AdapterId {
    let path = models::seeded_lora(Size::Tiny, seed, 4);
    client.upload_lora(path, |_| {}).await.expect("the LoRA is accepted").adapter
}

fn bytes(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}

async fn join<const N: usize>(futures: [impl Future<Output = Encoding>; N]) -> Vec<Encoding> {
    let mut pinned: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<Encoding>> = (0..N).map(|_| None).collect();
    std::future::poll_fn(move |context| {
        for (future, done) in pinned.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(encoding) = future.as_mut().poll(context)
            {
                *done = Some(encoding);
            }
        }
        if done.iter().all(Option::is_some) {
            return std::task::Poll::Ready(done.iter_mut().filter_map(Option::take).collect());
        }
        std::task::Poll::Pending
    })
    .await
}
