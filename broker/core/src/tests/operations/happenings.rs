//! What may happen to a broker, as strategies.

use proptest::{collection::vec, prelude::*};
use protocol::frames;

use super::{ADAPTERS, CLIENTS, MODELS, WORKERS};

/// One thing that may happen.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    Encode { client: u8, id: u8, what: What, budget_ms: u32, known_model: bool },
    Cancel { client: u8, id: u8 },
    Upload { client: u8, step: u8, offset: u64, model_file: bool },
    Evict { client: u8, adapter: u8, delete: bool },
    Register { client: u8, id: u8, model: u8, budget_ms: u32, uploaded: bool },
    ClientLeaves { client: u8 },
    ClientGarbage { client: u8, frames: Vec<Vec<u8>> },
    Worker { worker: u8, does: WorkerOperation },
    StoreAnswers { well: bool },
    StoreFinds { adapter: u8 },
    TimePasses { ms: u64 },
}

/// What is to be encoded.
#[derive(Debug, Clone)]
pub(super) struct What {
    pub(super) prompt: u8,
    pub(super) adapter: Option<u8>,
    pub(super) no_cache: bool,
}

/// One thing that a worker may do.
#[derive(Debug, Clone)]
pub(super) enum WorkerOperation {
    Starts { inventory: [u8; 3] },
    Lives { honest: bool, draining: bool },
    Answers { right_epoch: bool, well: bool },
    Registers { answer: u8 },
    Fetches { adapter: u8 },
    Leaves { politely: bool },
    Reconnects,
    Garbage { frames: Vec<Vec<u8>> },
}

pub(super) fn operation() -> impl Strategy<Value = Operation> {
    use Operation as Op;
    let client = 0..CLIENTS;
    let what = (0..3_u8, proptest::option::of(adapter()), mostly(0.1))
        .prop_map(|(prompt, adapter, no_cache)| What { prompt, adapter, no_cache });
    let encode = (0..CLIENTS, 0..6_u8, what, 0..3000_u32, mostly(0.9)).prop_map(
        |(client, id, what, budget_ms, known_model)| Op::Encode {
            client,
            id,
            what,
            budget_ms,
            known_model,
        },
    );
    prop_oneof![
        8 => encode,
        1 => (client.clone(), 0..6_u8).prop_map(|(client, id)| Op::Cancel { client, id }),
        3 => (client.clone(), 0..4_u8, 0..4_u64, mostly(0.3)).prop_map(
            |(client, step, offset, model_file)| Op::Upload { client, step, offset, model_file }
        ),
        3 => (client.clone(), 0..6_u8, model(), 0..3000_u32, mostly(0.3)).prop_map(
            |(client, id, model, budget_ms, uploaded)| Op::Register {
                client,
                id,
                model,
                budget_ms,
                uploaded,
            }
        ),
        1 => (client.clone(), adapter(), any::<bool>())
            .prop_map(|(client, adapter, delete)| Op::Evict { client, adapter, delete }),
        1 => client.clone().prop_map(|client| Op::ClientLeaves { client }),
        1 => (client, garbage()).prop_map(|(client, frames)| Op::ClientGarbage { client, frames }),
        16 => (0..WORKERS, worker_operation())
            .prop_map(|(worker, does)| Op::Worker { worker, does }),
        4 => mostly(0.8).prop_map(|well| Op::StoreAnswers { well }),
        1 => adapter().prop_map(|adapter| Op::StoreFinds { adapter }),
        5 => (0..1500_u64).prop_map(|ms| Op::TimePasses { ms }),
    ]
}

fn worker_operation() -> impl Strategy<Value = WorkerOperation> {
    use WorkerOperation as Op;
    prop_oneof![
        2 => any::<[u8; 3]>().prop_map(|inventory| Op::Starts { inventory }),
        4 => (mostly(0.8), mostly(0.1))
            .prop_map(|(honest, draining)| Op::Lives { honest, draining }),
        6 => (mostly(0.9), mostly(0.8))
            .prop_map(|(right_epoch, well)| Op::Answers { right_epoch, well }),
        4 => (0..4_u8).prop_map(|answer| Op::Registers { answer }),
        1 => adapter().prop_map(|adapter| Op::Fetches { adapter }),
        1 => any::<bool>().prop_map(|politely| Op::Leaves { politely }),
        1 => Just(Op::Reconnects),
        1 => garbage().prop_map(|frames| Op::Garbage { frames }),
    ]
}

fn adapter() -> impl Strategy<Value = u8> {
    0..u8::try_from(ADAPTERS.len()).unwrap()
}

fn model() -> impl Strategy<Value = u8> {
    0..u8::try_from(MODELS.len()).unwrap()
}

fn mostly(probability: f64) -> impl Strategy<Value = bool> {
    prop::bool::weighted(probability)
}

fn garbage() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let frame = prop_oneof![
        Just(frames::MAGIC.to_vec()),
        Just(Vec::new()),
        Just(b"\x82\xa4kind\xa4done\xa2id\xa17".to_vec()),
        vec(any::<u8>(), 0..20),
    ];
    vec(frame, 0..4)
}
