//! `luna encode`: one prompt, a stack of LoRAs, one file of conditioning.

use std::{
    fs::Permissions, io::Write as _, os::unix::fs::PermissionsExt as _, path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use luna_client::{CacheUse, Client, EncodeRequest, Encoding, Receipt, Tensor};
use protocol::{AdapterId, AdapterReceipt, Component, FailedPatch};
use safetensors::{Dtype, tensor::TensorView};

use crate::{
    args::{EncodeArgs, LoraSource},
    command::{connect, lora},
    output::{print_json, print_line, print_warning},
};

/// Uploads what the farm lacks, encodes, and writes the result.
pub(crate) async fn run(args: EncodeArgs) -> anyhow::Result<ExitCode> {
    let client = connect(&args.farm).await?;
    let mut request = EncodeRequest::new(args.model.as_str());
    request = match (args.prompt, args.prompt_l, args.prompt_g) {
        (Some(prompt), ..) => request.prompt(prompt),
        (None, Some(l), Some(g)) => request.texts([(Component::ClipL, l), (Component::ClipG, g)]),
        _ => bail!("give --prompt, or both --prompt-l and --prompt-g"),
    };
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
    if let Some(fidelity) = args.fidelity {
        request = request.fidelity(fidelity);
    }
    if args.lenient {
        request = request.lenient();
    }
    if args.no_cache {
        request = request.no_cache();
    }
    let encoding = client.encode(request).await?;
    write(&args.output, &encoding)?;
    for warning in &encoding.receipt.warnings {
        print_warning(warning);
    }
    warn_of_left_out(&encoding.receipt);
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
    replace(path, &content).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file of its own name beside `path`, then renames it: two encodes into one directory
/// never mix, and a failure leaves nothing behind.
fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The mode of any new file; the process's mask takes its part from it.
    let everyone = Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(everyone).tempfile_in(directory)?;
    file.write_all(content)?;
    file.persist(path)?;
    Ok(())
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    protocol::tensor::f32_to_bytes(&tensor.data).to_vec()
}

/// Says which keys of which adapter had no effect.
fn warn_of_left_out(receipt: &Receipt) {
    for AdapterReceipt { adapter, not_matched, failed, .. } in &receipt.stack {
        let adapter = adapter.short();
        if !not_matched.is_empty() {
            let keys = not_matched.join(", ");
            print_warning(&format!("{adapter}: the model does not have the keys {keys}"));
        }
        for FailedPatch { key, reason } in failed {
            print_warning(&format!("{adapter}: `{key}` was not changed: {reason}"));
        }
    }
}

fn summary(path: &Path, encoding: &Encoding) -> String {
    let Receipt { worker, times, stack, mode, fidelity, .. } = &encoding.receipt;
    let shape = &encoding.conditionings[0].cond.shape;
    let stack = if stack.is_empty() {
        "no LoRA".to_owned()
    } else {
        let part = |entry: &AdapterReceipt| {
            format!("{} on {} weights", entry.adapter.short(), entry.applied)
        };
        stack.iter().map(part).collect::<Vec<_>>().join(", ")
    };
    let total = times.queue_ms + times.load_ms + times.compute_ms;
    let path = path.display();
    let took = match encoding.receipt.cache {
        Some(CacheUse::Hit) => "kept from an equal request".to_owned(),
        None => format!("{total:.0} ms"),
    };
    format!("wrote {path} {shape:?}: {stack}; {worker}, {mode}, {fidelity}, {took}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_replaces_its_own_file_and_touches_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let neighbour = folder.path().join("cat.safetensors.tmp");
        std::fs::write(&neighbour, "mine").unwrap();
        let path = folder.path().join("cat.positive");
        replace(&path, b"first").unwrap();
        replace(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(std::fs::read(&neighbour).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);

        std::fs::create_dir(folder.path().join("directory")).unwrap();
        assert!(replace(&folder.path().join("directory"), b"x").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "something was left");
    }
}
