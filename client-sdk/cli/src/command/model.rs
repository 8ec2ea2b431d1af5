//! `luna model ls`.

use std::process::ExitCode;

use crate::{
    args::{ListArgs, ModelCommand},
    command::connect,
    output::{human_bytes, print_json, print_table},
};

/// Runs one of the `luna model` commands.
pub(crate) async fn run(command: ModelCommand) -> anyhow::Result<ExitCode> {
    let ModelCommand::Ls(ListArgs { farm, json }) = command;
    let models = connect(&farm).await?.list_models().await?;
    if json {
        print_json(&models)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = models.iter().map(|status| {
        let model = &status.model;
        let workers = status.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        vec![
            model.name.to_string(),
            model.family.to_string(),
            model.weights_dtype.to_string(),
            human_bytes(model.bytes),
            model.digest.short(),
            workers,
        ]
    });
    print_table(&["model", "family", "weights", "memory", "digest", "workers"], rows);
    Ok(ExitCode::SUCCESS)
}
