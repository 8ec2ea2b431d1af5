//! `luna lora push`, `ls` and `evict`.

use std::{path::Path, process::ExitCode};

use luna_client::{Client, Uploaded};
use serde::Serialize;

use crate::{
    args::{ListArgs, LoraCommand, LoraEvictArgs, LoraPushArgs},
    command::connect,
    output::{bytes_bar, human_bytes, print_json, print_line, print_table, print_warning},
};

/// Runs one of the `luna lora` commands.
pub(crate) async fn run(command: LoraCommand) -> anyhow::Result<ExitCode> {
    match command {
        LoraCommand::Push(args) => push(args).await,
        LoraCommand::Ls(args) => list(args).await,
        LoraCommand::Evict(args) => evict(args).await,
    }
}

/// Uploads a LoRA file under a progress bar; warns of keys that nothing takes.
pub(crate) async fn upload(client: &Client, path: &Path) -> anyhow::Result<Uploaded> {
    let bar = bytes_bar(&format!("uploading {}", path.display()));
    let uploaded = client
        .upload_lora(path, |progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.sent_bytes);
        })
        .await;
    bar.finish_and_clear();
    let uploaded = uploaded?;
    if !uploaded.report.unmatched.is_empty() {
        let names = uploaded.report.unmatched.join(", ");
        print_warning(&format!("{}: no text encoder has the keys {names}", path.display()));
    }
    Ok(uploaded)
}

#[derive(Serialize)]
struct Pushed {
    file: String,
    adapter: protocol::AdapterId,
    targets: u32,
    unmatched: Vec<String>,
    ignored: u32,
    sent_bytes: u64,
}

async fn push(args: LoraPushArgs) -> anyhow::Result<ExitCode> {
    let client = connect(&args.farm).await?;
    let mut pushed = Vec::new();
    for file in &args.files {
        let Uploaded { adapter, report, sent_bytes } = upload(&client, file).await?;
        let file = file.display().to_string();
        if !args.json {
            let sent = if sent_bytes == 0 {
                "the farm held it already".to_owned()
            } else {
                format!("{} sent", human_bytes(sent_bytes))
            };
            print_line(format_args!("{adapter}  {file}: {} weights, {sent}", report.targets));
            if report.targets == 0 && report.unmatched.is_empty() {
                print_warning(&format!(
                    "{file} has no text-encoder keys: it will change no prompt"
                ));
            }
        }
        pushed.push(Pushed {
            file,
            adapter,
            targets: report.targets,
            unmatched: report.unmatched,
            ignored: report.ignored,
            sent_bytes,
        });
    }
    if args.json {
        print_json(&pushed)?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let loras = connect(&args.farm).await?.list_loras().await?;
    if args.json {
        print_json(&loras)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = loras.iter().map(|lora| {
        let workers = lora.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let stored = if lora.stored { human_bytes(lora.bytes) } else { "not stored".to_owned() };
        vec![lora.adapter.to_string(), stored, lora.label.clone().unwrap_or_default(), workers]
    });
    print_table(&["adapter", "size", "label", "in memory of"], rows);
    Ok(ExitCode::SUCCESS)
}

async fn evict(args: LoraEvictArgs) -> anyhow::Result<ExitCode> {
    let reply = connect(&args.farm).await?.evict_lora(&args.adapters, args.delete).await?;
    if args.json {
        print_json(&reply)?;
    } else {
        for adapter in &reply.evicted {
            print_line(format_args!(
                "{adapter}  {}",
                if args.delete { "deleted" } else { "evicted" }
            ));
        }
        for adapter in &reply.unknown {
            print_warning(&format!("the farm does not hold {adapter}"));
        }
    }
    Ok(if reply.unknown.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
