//! Ten thousand adapters through a worker that has room for fifty: every answer right, every load
//! where it has to be, and memory that stays where it was.

use std::collections::{BTreeMap, VecDeque};

use adapter::{Array, Diff, Patch, PatchSet, Target};
use luna_client::{AdapterId, AdapterSource, Client, Component, Dtype, EncodeRequest};
use luna_e2e::{Cluster, models};

const ADAPTERS: usize = 10_000;

/// What the worker has room for.
const ROOM: usize = 50;

/// Every so often an adapter of this many requests ago is asked for again.
const REVISIT_EVERY: usize = 5;
const REVISIT_BACK: usize = 12;

/// Adapters after which memory has settled.
const SETTLED: usize = 2_000;

#[tokio::test]
async fn ten_thousand_adapters_pass_through_a_worker_with_room_for_fifty() {
    let mut cluster = Cluster::new()
        .model(&models::tiny_sd15())
        .broker_flags(&["--fan-out", "0"])
        .worker_flags(&["--adapter-budget-mb", "1", "--merged-budget-mb", "1"])
        .start()
        .await;
    let client = cluster.client().await;
    let base = cond(&client, None).await.0;
    let mut reference = Lru::default();
    let (mut ids, mut settled) = (Vec::new(), 0);
    for number in 0..ADAPTERS {
        ids.push(upload(&client, number).await);
        check(&client, (number, ids[number]), &base, &mut reference).await;
        if number % REVISIT_EVERY == 0 && number >= REVISIT_BACK {
            // Now and then one that was asked for long ago and has left.
            let distance = if number % 100 == 0 { 10 * REVISIT_BACK } else { REVISIT_BACK };
            let back = number.saturating_sub(distance);
            check(&client, (back, ids[back]), &base, &mut reference).await;
        }
        if number == SETTLED {
            settled = cluster.worker(0).resident_bytes();
        }
    }
    let after = cluster.worker(0).resident_bytes();
    assert!(after <= settled + settled / 20, "{settled} bytes became {after}");
    let status = client.status().await.expect("the broker answers");
    assert_eq!(status.workers[0].resident, u32::try_from(ROOM).expect("it is small"));
    assert!(reference.hits > 1_000 && reference.misses > ADAPTERS, "both were tried");
    assert!(cond(&client, None).await.0 == base, "the base answer is what it was");
}

/// Encodes with adapter `number` and compares answer and receipt with what they must be.
async fn check(
    client: &Client,
    (number, adapter): (usize, AdapterId),
    base: &[f32],
    reference: &mut Lru,
) {
    let (found, source) = cond(client, Some(adapter)).await;
    let expected =
        if reference.touch(adapter) { AdapterSource::Resident } else { AdapterSource::Broker };
    assert_eq!(source, Some(expected), "adapter {number}");
    let shift = shift(number);
    let worst = found.iter().zip(base).map(|(found, base)| (found - base - shift).abs());
    let worst = worst.fold(0.0, f32::max);
    assert!(worst < 1e-5, "adapter {number} is off by {worst:.1e}");
}

async fn cond(client: &Client, adapter: Option<AdapterId>) -> (Vec<f32>, Option<AdapterSource>) {
    let mut request = EncodeRequest::new("tiny").prompt("a cat").no_cache();
    if let Some(adapter) = adapter {
        request = request.lora(adapter, 1.0);
    }
    let mut encoding = client.encode(request).await.expect("the farm answers");
    let source = encoding.receipt.stack.first().map(|entry| entry.source);
    (encoding.conditionings.remove(0).cond.data, source)
}

/// An adapter whose effect is known: it adds [`shift`] to the bias of the last layer norm, and so to
/// every element of the result. The rest of it makes fifty of its kind fill one MiB.
async fn upload(client: &Client, number: usize) -> AdapterId {
    let filler = [
        ("text_model.embeddings.position_embedding.weight", &[77, 32][..], Dtype::Float32),
        ("text_model.encoder.layers.0.mlp.fc1.weight", &[128, 32], Dtype::Float16),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", &[32, 32], Dtype::Float16),
    ];
    let mut patches = BTreeMap::new();
    for (parameter, shape, dtype) in filler {
        let zeros = vec![0; shape.iter().product::<usize>() * dtype.bytes()];
        patches.insert(target(parameter), diff(dtype, shape, zeros));
    }
    let bias = shift(number).to_le_bytes().repeat(32);
    let norm = target("text_model.final_layer_norm.bias");
    patches.insert(norm, diff(Dtype::Float32, &[32], bias));
    let set = PatchSet::new(patches, []).expect("the patches are sound");
    let bytes = set.to_bytes().len();
    let room = (1 << 20) / bytes;
    assert_eq!(room, ROOM, "adapters of {bytes} bytes");
    let uploaded = client.upload_adapter(&set, &format!("shift-{number}"), |_| {}).await;
    uploaded.expect("the adapter is accepted").adapter
}

fn target(parameter: &str) -> Target {
    Target::new(Component::ClipL, parameter).expect("a parameter's name")
}

fn diff(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Patch {
    Patch::Diff(Diff::new(Array::new(dtype, shape, bytes).expect("the bytes fit the shape")))
}

/// Another number for every adapter, exact in f32.
#[expect(clippy::cast_precision_loss, reason = "the numbers are small")]
fn shift(number: usize) -> f32 {
    (number + 1) as f32 / 8192.0
}

/// What the worker's registry has to do, in the plainest way.
#[derive(Default)]
struct Lru {
    /// The one used last comes last.
    resident: VecDeque<AdapterId>,
    hits: usize,
    misses: usize,
}

impl Lru {
    /// Uses `adapter`; says whether it was there.
    fn touch(&mut self, adapter: AdapterId) -> bool {
        let held = self.resident.iter().position(|held| *held == adapter);
        if let Some(index) = held {
            self.resident.remove(index);
            self.hits += 1;
        } else {
            self.misses += 1;
        }
        self.resident.push_back(adapter);
        if self.resident.len() > ROOM {
            self.resident.pop_front();
        }
        held.is_some()
    }
}
