//! `luna model ls` and `register`.

use std::{path::Path, process::ExitCode};

use anyhow::Context as _;
use luna_client::{Client, ErrorCode, ModelStatus, RegisterModel, WorkerName};
use protocol::reply::RegisterModelReply;

use crate::{
    args::{ListArgs, ModelCommand, ModelRegisterArgs},
    command::connect,
    output::{bytes_bar, human_bytes, print_json, print_line, print_table, print_warning, spinner},
};

/// Runs one of the `luna model` commands.
pub(crate) async fn run(command: ModelCommand) -> anyhow::Result<ExitCode> {
    match command {
        ModelCommand::Ls(args) => list(args).await,
        ModelCommand::Register(args) => register(args).await,
    }
}

async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let models = connect(&args.farm).await?.list_models().await?;
    if args.json {
        print_json(&models)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = models.iter().map(|ModelStatus { model, workers, loaded }| {
        vec![
            model.name.to_string(),
            model.family.to_string(),
            model.weights_dtype.to_string(),
            human_bytes(model.bytes),
            model.digest.short(),
            names(workers),
            names(loaded),
        ]
    });
    let header = ["model", "family", "weights", "memory", "digest", "workers", "loaded"];
    print_table(&header, rows);
    Ok(ExitCode::SUCCESS)
}

async fn register(args: ModelRegisterArgs) -> anyhow::Result<ExitCode> {
    let client = connect(&args.farm).await?;
    let mut model = RegisterModel::new(args.name.as_str(), args.family);
    for file in &args.files {
        model = if args.upload {
            model.blob(upload(&client, file).await?)
        } else {
            model.path(absolute(file)?)
        };
    }
    let waiting = spinner("the workers read the model");
    let reply = client.register_model(model, |_, _| {}).await;
    waiting.finish_and_clear();
    let reply = reply.map_err(|error| {
        let remedy = remedy(error.code(), args.upload);
        anyhow::Error::new(error).context(format!("`{}` is not served; {remedy}", args.name))
    })?;
    for failed in &reply.failed {
        print_warning(&format!("worker {} does not serve it: {}", failed.worker, failed.failure));
    }
    if args.json {
        print_json(&reply)?;
    } else {
        print_line(format_args!("{}", summary(&reply)));
    }
    Ok(if reply.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn upload(client: &Client, file: &Path) -> anyhow::Result<protocol::BlobDigest> {
    let bar = bytes_bar(&format!("uploading {}", file.display()));
    let uploaded = client
        .upload_model_file(file, |progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.sent_bytes);
        })
        .await;
    bar.finish_and_clear();
    Ok(uploaded?.blob)
}

/// The path as the workers of this machine see it.
fn absolute(file: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(file)
        .with_context(|| format!("{} cannot be made absolute", file.display()))?;
    let text = path.to_str().with_context(|| format!("{}: the path is not UTF-8", path.display()));
    Ok(text?.to_owned())
}

/// What to do about a failure.
fn remedy(code: Option<ErrorCode>, uploaded: bool) -> &'static str {
    match code {
        Some(ErrorCode::Forbidden) => {
            "start the workers with `--model-root DIR` for the file's directory, or give `--upload`"
        }
        Some(ErrorCode::TooLarge) if uploaded => {
            "give the broker more room (`--model-store-mb`), or name a path that the workers can read"
        }
        Some(ErrorCode::DeadlineExceeded) => "give more time with `--timeout`, or ask again",
        Some(ErrorCode::Overloaded | ErrorCode::WorkerLost) => "try again, see `luna status`",
        _ if uploaded => "check the files",
        _ => "check that the workers' machines have the files, or give `--upload`",
    }
}

fn summary(reply: &RegisterModelReply) -> String {
    let RegisterModelReply { model, workers, .. } = reply;
    let size = human_bytes(model.bytes);
    let digest = model.digest.short();
    format!("{} ({}, {size}, {digest}) is served by {}", model.name, model.family, names(workers))
}

fn names(workers: &[WorkerName]) -> String {
    workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_is_made_absolute_and_odd_ones_are_named() {
        assert_eq!(absolute(Path::new("/models/a")).unwrap(), "/models/a");
        let here = std::env::current_dir().unwrap().join("a");
        assert_eq!(absolute(Path::new("a")).unwrap(), here.to_str().unwrap());
        assert!(absolute(Path::new("")).is_err());
    }

    #[test]
    fn every_failure_has_a_remedy() {
        assert!(remedy(Some(ErrorCode::Forbidden), false).contains("--model-root"));
        assert!(remedy(Some(ErrorCode::TooLarge), true).contains("--model-store-mb"));
        assert!(
            remedy(None, false).contains("--upload") && !remedy(None, true).contains("--upload")
        );
    }
}
