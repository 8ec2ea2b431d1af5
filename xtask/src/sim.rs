//! The simulator: built in release mode and started with the rest of the command line.
//!
//! It is a program of its own, because chores depend on none of the workspace's crates.

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo};

/// Builds and runs the simulator.
///
/// # Errors
///
/// When it does not compile, or when it found a broken promise.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "--package", "luna-sim", "--"]).args(arguments);
    let status = command.current_dir(&workspace.root).status().context("cannot start cargo")?;
    ensure!(status.success(), "the simulation failed: the lines above say how");
    Ok(())
}
