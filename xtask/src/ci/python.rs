//! The virtual environment for the client that is written in Python.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The packages of the environment, with their versions.
const REQUIREMENTS: &str = "tests/python/requirements.txt";

/// The interpreter of the environment; makes the environment when it is missing or out of date.
///
/// # Errors
///
/// When there is no Python 3 with `venv`, or the packages cannot be installed.
pub(super) fn interpreter(workspace: &Workspace) -> Result<PathBuf> {
    let requirements = workspace.root.join(REQUIREMENTS);
    let wanted = fs::read_to_string(&requirements)
        .with_context(|| format!("cannot read `{REQUIREMENTS}`"))?;
    let venv = workspace.target.join("venv");
    let interpreter = venv.join("bin/python");
    // Written last, so it stands for a complete environment.
    let stamp = venv.join("requirements.txt");
    if interpreter.exists() && fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted)
    {
        return Ok(interpreter);
    }
    call(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))
        .context("cannot make a virtual environment: install Python 3 with its `venv` module")?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"];
    call(Command::new(&interpreter).args(pip).arg(&requirements))
        .with_context(|| format!("cannot install the packages of `{REQUIREMENTS}`"))?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write `{}`", stamp.display()))?;
    Ok(interpreter)
}

fn call(command: &mut Command) -> Result<()> {
    let status = command.status().context("cannot start it")?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}
