//! Chaos with real processes: built in release mode and started with the rest of the command line.
//!
//! It is a program of its own, because chores depend on none of the workspace's crates.

use std::env;

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo};

/// Builds `luna` and chaos, and runs it. A `luna` that `LUNA_BIN` names is used as it is.
///
/// # Errors
/// When something does not compile, or when an answer was wrong, missing or given twice.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--bins", "--package", "luna-chaos"]);
    build.args(["--package", "luna-cli"]).current_dir(&workspace.root);
    let status = build.status().context("cannot start cargo")?;
    ensure!(status.success(), "chaos does not build: the lines above say why");
    let release = workspace.target.join("release");
    let luna = env::var_os("LUNA_BIN").unwrap_or_else(|| release.join("luna").into());
    let mut chaos = std::process::Command::new(release.join("luna-chaos"));
    chaos.args(arguments).env("LUNA_BIN", luna).current_dir(&workspace.root);
    let status = chaos.status().context("cannot start chaos")?;
    ensure!(status.success(), "chaos found something: the lines above say what");
    Ok(())
}
