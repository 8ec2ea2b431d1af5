//! What an executor makes of a request: an answer that depends on the tensors it was really given.

use bytes::Bytes;
use protocol::{
    AdapterId, AdapterReceipt, AdapterSource, Dtype, ExecutionMode, Fidelity, Receipt, TensorRef,
    Times, WorkerName, header,
    reply::{ClipEncodeReply, ConditioningRef, ModelInfo},
    request::{ClipEncode, StackEntry},
    worker::Busy,
};

use crate::{catalog::answer, event::Connection};

/// A request on a lane.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: ClipEncode,
    pub(crate) attempt: u32,
    /// What the tensors of the stack's entries really are.
    pub(crate) stack: Vec<AdapterId>,
    /// What is asked for, and how it is to run.
    pub(crate) given: Option<Busy>,
    /// Where it came from.
    pub(crate) connection: Option<Connection>,
}

impl Job {
    /// The reply's header frame and its attachments.
    pub(crate) fn reply(&self, model: &ModelInfo, worker: WorkerName) -> Vec<Bytes> {
        let Self { request, attempt, stack, .. } = self;
        let prompt = request.prompts[0].text.as_deref().unwrap_or_default();
        let value = answer(&model.digest, prompt, request.stack.iter().zip(stack.iter().copied()));
        let value = Bytes::copy_from_slice(&value.to_le_bytes());
        let reply = ClipEncodeReply {
            id: request.id.clone(),
            results: vec![ConditioningRef { cond: tensor(0), pooled: tensor(1), tokens: None }],
            receipt: Receipt {
                model: model.name.clone(),
                model_digest: model.digest,
                weights_dtype: model.weights_dtype,
                stack: request.stack.iter().map(receipt).collect(),
                hook_stacks: Vec::new(),
                mode: ExecutionMode::Functional,
                fidelity: Fidelity::Comfyui,
                merged_weights: None,
                worker,
                attempts: *attempt,
                times: Times::default(),
                cache: None,
                warnings: Vec::new(),
            },
        };
        vec![header::write(&reply).into(), value.clone(), value]
    }
}

fn tensor(attachment: u16) -> TensorRef {
    TensorRef { dtype: Dtype::Float32, shape: vec![1, 2], attachment }
}

fn receipt(entry: &StackEntry) -> AdapterReceipt {
    AdapterReceipt {
        adapter: entry.adapter,
        strength_patch: entry.strength_patch,
        strength_model: entry.strength_model,
        applied: 1,
        not_matched: Vec::new(),
        failed: Vec::new(),
        source: AdapterSource::Resident,
    }
}
