//! Whether a reply is the answer to what was asked. A reply that is not is never used.

use std::collections::BTreeMap;

use bytes::Bytes;
use protocol::{
    AdapterId, AdapterReceipt, Chunk, Component, Dtype, ExecutionMode, Fidelity, ModelDigest,
    ModelName, Receipt, TensorRef,
    reply::{ClipEncodeReply, ConditioningRef},
    request::{ClipEncode, Matching, Prompt, StackEntry},
    tensor::{self, InvalidTensor},
};

use crate::encode::{Conditioning, Encoding, Tensor};

/// What a reply must agree with.
#[derive(Debug)]
pub(crate) struct Expected {
    model: ModelName,
    model_digest: Option<ModelDigest>,
    stack: Vec<StackEntry>,
    /// One for every prompt, or none at all when no prompt has one.
    hook_stacks: Vec<Vec<StackEntry>>,
    /// For every prompt the positions of its chunks, where the client made the tokens.
    positions: Vec<Option<usize>>,
    tokens: bool,
    /// The mode that must have run; none for the worker's choice.
    mode: Option<ExecutionMode>,
    fidelity: Option<Fidelity>,
    matching: Matching,
}

/// How a reply differs from what was asked for.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error("it has {found} results for {expected} prompts")]
    Results { found: usize, expected: usize },
    #[error("it is of model `{found}` instead of `{expected}`")]
    Model { found: ModelName, expected: ModelName },
    #[error("it is of model digest `{found}` instead of `{expected}`")]
    Digest { found: ModelDigest, expected: ModelDigest },
    #[error("{found} adapters were applied instead of {expected}")]
    StackLength { found: usize, expected: usize },
    #[error("{found} prompts have hook stacks instead of {expected}")]
    HookStacks { found: usize, expected: usize },
    #[error("entry {index} of the stack was {found} instead of {expected}")]
    StackEntry { index: usize, found: String, expected: String },
    #[error("it ran in mode `{found}` instead of `{expected}`")]
    Mode { found: ExecutionMode, expected: ExecutionMode },
    #[error("its fidelity is `{found}` instead of `{expected}`")]
    Fidelity { found: Fidelity, expected: Fidelity },
    #[error(
        "adapter `{adapter}` has keys that the model does not have, and that was to be an error: `{key}`"
    )]
    NotMatched { adapter: AdapterId, key: String },
    #[error("`{name}` of result {index} has dtype `{dtype}`: expected `float32`")]
    Dtype { name: &'static str, index: usize, dtype: Dtype },
    #[error("`{name}` of result {index} has shape {shape:?}: expected {expected}")]
    Shape { name: &'static str, index: usize, shape: Vec<u32>, expected: String },
    #[error("`{name}` of result {index}: {source}")]
    Tensor { name: &'static str, index: usize, source: InvalidTensor },
    #[error("result {index} has no tokens, which were asked for")]
    NoTokens { index: usize },
}

impl Expected {
    pub(crate) fn of(request: &ClipEncode) -> Self {
        let hooked = request.prompts.iter().any(|prompt| !prompt.hook_stack.is_empty());
        let hook_stacks = request.prompts.iter().map(|prompt| prompt.hook_stack.clone());
        Self {
            hook_stacks: if hooked { hook_stacks.collect() } else { Vec::new() },
            model: request.model.clone(),
            model_digest: request.model_digest,
            stack: request.stack.clone(),
            positions: request.prompts.iter().map(prompt_positions).collect(),
            tokens: request.options.return_tokens,
            mode: request.options.mode.filter(|mode| *mode != ExecutionMode::Auto),
            fidelity: request.options.fidelity,
            matching: request.options.matching,
        }
    }
}

/// The reply's tensors and receipt, once they are known to answer the request.
pub(crate) fn encoding(
    reply: ClipEncodeReply,
    attachments: &[Bytes],
    expected: &Expected,
) -> Result<Encoding, Mismatch> {
    let ClipEncodeReply { results, receipt, .. } = reply;
    check_receipt(&receipt, expected)?;
    let (found, asked) = (results.len(), expected.positions.len());
    if found != asked {
        return Err(Mismatch::Results { found, expected: asked });
    }
    let results = results.into_iter().zip(&expected.positions).enumerate();
    let conditionings: Vec<_> = results
        .map(|(index, (result, &positions))| {
            if expected.tokens && result.tokens.is_none() {
                return Err(Mismatch::NoTokens { index });
            }
            conditioning(index, result, positions, attachments)
        })
        .collect::<Result<_, _>>()?;
    Ok(Encoding { conditionings, receipt })
}

/// Whether the receipt is of what was asked for.
fn check_receipt(receipt: &Receipt, expected: &Expected) -> Result<(), Mismatch> {
    if receipt.model != expected.model {
        let (found, expected) = (receipt.model.clone(), expected.model.clone());
        return Err(Mismatch::Model { found, expected });
    }
    match expected.model_digest {
        Some(expected) if expected != receipt.model_digest => {
            return Err(Mismatch::Digest { found: receipt.model_digest, expected });
        }
        _ => {}
    }
    match expected.mode {
        Some(expected) if expected != receipt.mode => {
            return Err(Mismatch::Mode { found: receipt.mode, expected });
        }
        _ => {}
    }
    match expected.fidelity {
        Some(expected) if expected != receipt.fidelity => {
            return Err(Mismatch::Fidelity { found: receipt.fidelity, expected });
        }
        _ => {}
    }
    check_stack(&receipt.stack, &expected.stack)?;
    let (found, asked) = (receipt.hook_stacks.len(), expected.hook_stacks.len());
    if found != asked {
        return Err(Mismatch::HookStacks { found, expected: asked });
    }
    for (found, expected) in receipt.hook_stacks.iter().zip(&expected.hook_stacks) {
        check_stack(found, expected)?;
    }
    check_matching(receipt, expected.matching)
}

/// Whether keys that the model does not have were to be an error.
fn check_matching(receipt: &Receipt, matching: Matching) -> Result<(), Mismatch> {
    if matching == Matching::Lenient {
        return Ok(());
    }
    for entry in receipt.stack.iter().chain(receipt.hook_stacks.iter().flatten()) {
        if let Some(key) = entry.not_matched.first() {
            return Err(Mismatch::NotMatched { adapter: entry.adapter, key: key.clone() });
        }
    }
    Ok(())
}

/// Exactly the adapters and strengths that were asked for, in the order asked.
fn check_stack(found: &[AdapterReceipt], expected: &[StackEntry]) -> Result<(), Mismatch> {
    let show = |adapter, patch, model| format!("`{adapter}` at {patch} (model {model})");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_same = found.adapter == expected.adapter
            && found.strength_patch.to_bits() == expected.strength_patch.to_bits()
            && found.strength_model.to_bits() == expected.strength_model.to_bits();
        if !is_same {
            return Err(Mismatch::StackEntry {
                index,
                found: show(found.adapter, found.strength_patch, found.strength_model),
                expected: show(expected.adapter, expected.strength_patch, expected.strength_model),
            });
        }
    }
    if found.len() != expected.len() {
        return Err(Mismatch::StackLength { found: found.len(), expected: expected.len() });
    }
    Ok(())
}

fn conditioning(
    index: usize,
    result: ConditioningRef,
    positions: Option<usize>,
    attachments: &[Bytes],
) -> Result<Conditioning, Mismatch> {
    let ConditioningRef { cond, pooled, tokens } = result;
    let positions = positions.or_else(|| tokens.as_ref().and_then(reply_positions));
    let is_cond = match *cond.shape.as_slice() {
        [1, found, width] => width > 0 && is_positions(found, positions),
        _ => false,
    };
    if !is_cond {
        let positions = positions.map_or("positions".to_owned(), |count| count.to_string());
        let expected = format!("[1, {positions}, width]");
        return Err(Mismatch::Shape { name: "cond", index, shape: cond.shape, expected });
    }
    if !matches!(*pooled.shape.as_slice(), [1, width] if width > 0) {
        let expected = "[1, width]".to_owned();
        return Err(Mismatch::Shape { name: "pooled", index, shape: pooled.shape, expected });
    }
    let cond = read("cond", index, &cond, attachments)?;
    let pooled = read("pooled", index, &pooled, attachments)?;
    Ok(Conditioning { cond, pooled, tokens })
}

fn is_positions(found: u32, expected: Option<usize>) -> bool {
    match expected {
        Some(expected) => u32::try_from(expected) == Ok(found),
        None => found > 0,
    }
}

fn read(
    name: &'static str,
    index: usize,
    tensor: &TensorRef,
    attachments: &[Bytes],
) -> Result<Tensor, Mismatch> {
    if tensor.dtype != Dtype::Float32 {
        return Err(Mismatch::Dtype { name, index, dtype: tensor.dtype });
    }
    let bytes =
        tensor.bytes(attachments).map_err(|source| Mismatch::Tensor { name, index, source })?;
    let shape = tensor.shape.iter().map(|&size| size as usize).collect();
    Ok(Tensor { shape, data: tensor::f32_from_bytes(bytes) })
}

/// Positions of a prompt that the client tokenised. Components are joined over those that all have.
fn prompt_positions(prompt: &Prompt) -> Option<usize> {
    prompt.tokens.as_ref()?.values().map(|tokens| positions(&tokens.chunks)).min()
}

fn reply_positions(tokens: &BTreeMap<Component, Vec<Chunk>>) -> Option<usize> {
    tokens.values().map(|chunks| positions(chunks)).min()
}

fn positions(chunks: &[Chunk]) -> usize {
    chunks.iter().map(Chunk::positions).sum()
}
