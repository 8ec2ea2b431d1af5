//! `luna encode`: one prompt, a stack of LoRAs, one file of conditioning.

use std::{collections::BTreeMap, path::Path, process::ExitCode};

use anyhow::Context as _;
use luna_client::{Client, EncodeRequest, Encoding, Receipt, Tensor};
use protocol::AdapterId;
use safetensors::{Dtype, tensor::TensorView};

use crate::{
    args::{EncodeArgs, LoraSource},
    command::{connect, lora},
    output::{print_json, print_line, print_warning},
};

/// Uploads what the farm lacks, encodes, and writes the result.
pub(crate) async fn run(args: EncodeArgs) -> anyhow::Result<ExitCode> {
    let client = connect(&args.farm).await?;
    let mut request = EncodeRequest::new(args.model.as_str()).prompt(args.prompt.as_str());
    for lora in &args.loras {
        request = request.lora(adapter(&client, &lora.source).await?, lora.strength);
    }
    if let Some(clip_skip) = args.clip_skip {
        request = request.clip_skip(clip_skip);
    }
    if args.unprojected {
        request = request.unprojected();
    }
    if let Some(mode) = args.mode {
        request = request.mode(mode);
    }
    let encoding = client.encode(request).await?;
    write(&args.output, &encoding)?;
    for warning in &encoding.receipt.warnings {
        print_warning(warning);
    }
    if args.json {
        print_json(&encoding.receipt)?;
    } else {
        print_line(format_args!("{}", summary(&args.output, &encoding)));
    }
    Ok(ExitCode::SUCCESS)
}

async fn adapter(client: &Client, source: &LoraSource) -> anyhow::Result<AdapterId> {
    match source {
        LoraSource::Adapter(adapter) => Ok(*adapter),
        LoraSource::File(path) => Ok(lora::upload(client, path).await?.adapter),
    }
}

/// Writes tensors `cond` and `pooled`, with the receipt as metadata, in one rename.
fn write(path: &Path, encoding: &Encoding) -> anyhow::Result<()> {
    let conditioning =
        encoding.conditionings.first().context("the farm answered without a result")?;
    let (cond, pooled) = (bytes(&conditioning.cond), bytes(&conditioning.pooled));
    let tensors = [
        ("cond", TensorView::new(Dtype::F32, conditioning.cond.shape.clone(), &cond)?),
        ("pooled", TensorView::new(Dtype::F32, conditioning.pooled.shape.clone(), &pooled)?),
    ];
    let receipt = serde_json::to_string(&encoding.receipt)?;
    let metadata = [("receipt".to_owned(), receipt)].into_iter().collect();
    let content = safetensors::serialize(tensors, Some(metadata))?;
    let temporary = path.with_extension("safetensors.tmp");
    std::fs::write(&temporary, content)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    protocol::tensor::f32_to_bytes(&tensor.data).to_vec()
}

fn summary(path: &Path, encoding: &Encoding) -> String {
    let Receipt { worker, times, stack, mode, .. } = &encoding.receipt;
    let shape = &encoding.conditionings[0].cond.shape;
    let applied: BTreeMap<_, _> =
        stack.iter().map(|entry| (entry.adapter.short(), entry.applied)).collect();
    let stack = if applied.is_empty() {
        "no LoRA".to_owned()
    } else {
        let parts = applied.iter().map(|(id, applied)| format!("{id} on {applied} weights"));
        parts.collect::<Vec<_>>().join(", ")
    };
    let total = times.queue_ms + times.load_ms + times.compute_ms;
    format!("wrote {} {shape:?}: {stack}; {worker}, {mode}, {total:.0} ms", path.display())
}
