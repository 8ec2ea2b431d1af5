//! A thousand random interleavings of eight clients on one worker, in every execution mode: each
//! answer is the one that the client gets alone, whatever the others ask for, cancel or let expire.

use std::time::Duration;

use fixtures::Size;
use luna_client::{
    Client, EncodeRequest, Encoding, Error, ErrorCode, ErrorKind, ExecutionMode, StackEntry,
};
use luna_e2e::{Cluster, golden::tiny_lora, models};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};

const ROUNDS: usize = 1_000;

#[tokio::test]
async fn in_functional_mode_every_answer_is_the_solo_answer() {
    interleave(&[ExecutionMode::Functional], 2).await;
}

#[tokio::test]
async fn in_locking_mode_every_answer_is_the_solo_answer() {
    interleave(&[ExecutionMode::Locking], 2).await;
}

#[tokio::test]
async fn with_both_modes_mixed_every_answer_is_the_solo_answer() {
    interleave(&[ExecutionMode::Functional, ExecutionMode::Locking], 3).await;
}

/// Rounds in which all clients ask at once in a random order, each in one of `modes`; some give up
/// while they wait, and some give too little time.
async fn interleave(modes: &[ExecutionMode], lanes: usize) {
    let cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .worker_flags(&["--lanes", &lanes.to_string()])
        .start()
        .await;
    let asker = cluster.client().await;
    let mut clients = Vec::new();
    for ask in asks(&asker).await {
        let client = cluster.client().await;
        // In every mode the same bytes, so that who ran beside whom cannot show.
        let solo = bytes(&client.encode(ask.request(modes[0])).await.expect("the solo answer"));
        clients.push((client, ask, solo));
    }
    let mut seeded = StdRng::seed_from_u64(8);
    let mut given_up = 0;
    for round in 0..ROUNDS {
        clients.shuffle(&mut seeded);
        let mut pending = Vec::new();
        for (index, (client, ask, _)) in clients.iter().enumerate() {
            let mode = modes[seeded.random_range(0..modes.len())];
            let mut request = ask.request(mode);
            if seeded.random_ratio(1, 20) {
                request = request.timeout(Duration::from_millis(seeded.random_range(1..6)));
            }
            let open = client.start_encode(request).expect("the client is open");
            if seeded.random_ratio(1, 20) {
                open.cancel();
                given_up += 1;
            } else {
                pending.push((index, open));
            }
        }
        pending.shuffle(&mut seeded);
        for (index, open) in pending {
            let (_, ask, solo) = &clients[index];
            match open.outcome().await {
                Ok(encoding) => {
                    assert!(bytes(&encoding) == *solo, "round {round}, {}", ask.name);
                }
                Err(error) if is_late(&error) => given_up += 1,
                Err(error) => panic!("round {round}, {}: {error}", ask.name),
            }
        }
    }
    assert!(given_up > ROUNDS / 10, "only {given_up} requests were given up");
    for (client, ask, solo) in &clients {
        for &mode in modes {
            let after = client.encode(ask.request(mode)).await.expect("the farm answers");
            assert!(bytes(&after) == *solo, "{} after everything", ask.name);
        }
    }
}

/// What one client asks for again and again.
struct Ask {
    name: &'static str,
    stack: Vec<StackEntry>,
    hook: Vec<StackEntry>,
}

impl Ask {
    fn request(&self, mode: ExecutionMode) -> EncodeRequest {
        let mut request =
            EncodeRequest::new("tiny").prompt("a (red:1.3) cat on the ((mat))").no_cache();
        for entry in &self.hook {
            request = request.hook(*entry);
        }
        self.stack.iter().fold(request, |request, entry| request.stack_entry(*entry)).mode(mode)
    }
}

/// Two clients without a LoRA, and stacks of every nature: several, of kinds that read the weight,
/// that replace it, and hooks on top.
async fn asks(client: &Client) -> Vec<Ask> {
    let mut entries = Vec::new();
    for lora in ["kohya", "loha", "glora", "oft", "set", "dora"] {
        let uploaded = client.upload_lora(tiny_lora("sd15", lora), |_| {}).await;
        let adapter = uploaded.expect("the LoRA is accepted").adapter;
        entries.push(StackEntry { adapter, strength_patch: 0.7, strength_model: 1.0 });
    }
    let seeded = client.upload_lora(models::seeded_lora(Size::Tiny, 1, 4), |_| {}).await;
    let adapter = seeded.expect("the LoRA is accepted").adapter;
    entries.push(StackEntry { adapter, strength_patch: -0.4, strength_model: 1.0 });
    let [kohya, loha, glora, oft, set, dora, seeded] = entries[..] else {
        unreachable!("seven were uploaded");
    };
    let ask = |name, stack: &[StackEntry], hook: &[StackEntry]| Ask {
        name,
        stack: stack.to_vec(),
        hook: hook.to_vec(),
    };
    vec![
        ask("base", &[], &[]),
        ask("base again", &[], &[]),
        ask("one LoRA", &[kohya], &[]),
        ask("the same more weakly", &[StackEntry { strength_patch: 0.1, ..kohya }], &[]),
        ask("three kinds", &[loha, glora, oft], &[]),
        ask("a replaced weight", &[set, seeded], &[]),
        ask("DoRA and a hook", &[dora], &[kohya]),
        ask("a hook alone", &[], &[seeded]),
    ]
}

fn bytes(encoding: &Encoding) -> Vec<u32> {
    let result = &encoding.conditionings[0];
    result.cond.data.iter().chain(&result.pooled.data).map(|element| element.to_bits()).collect()
}

/// Whether the request had too little time, as the farm or the client says.
fn is_late(error: &Error) -> bool {
    let late = [ErrorKind::Timeout, ErrorKind::Farm(ErrorCode::DeadlineExceeded)];
    late.contains(&error.kind()) || error.code() == Some(ErrorCode::Overloaded)
}
