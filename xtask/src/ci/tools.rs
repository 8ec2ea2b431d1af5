//! Programs that the steps need besides cargo's own: found if installed, else built once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo};

/// The version that `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

/// The `cargo-deny` of the pinned version; builds it into the target folder when it is missing.
///
/// # Errors
///
/// When it cannot be built.
pub(super) fn cargo_deny(workspace: &Workspace) -> Result<PathBuf> {
    let tools = workspace.target.join("tools");
    for candidate in [tools.join("bin/cargo-deny"), PathBuf::from("cargo-deny")] {
        if version(&candidate).is_some_and(|version| version == CARGO_DENY) {
            return Ok(candidate);
        }
    }
    install(&tools, "cargo-deny", CARGO_DENY)?;
    Ok(tools.join("bin/cargo-deny"))
}

/// Whether `cargo nextest` is installed.
pub(super) fn has_nextest() -> bool {
    cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success())
}

/// The version that a program gives itself: the last word of `NAME VERSION`.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let answer = String::from_utf8(output.stdout).ok()?;
    answer.lines().next()?.split_whitespace().nth(1).map(str::to_owned)
}

/// Builds a tool for one quick run: without optimisation, as it runs for seconds only.
fn install(tools: &Path, name: &str, version: &str) -> Result<()> {
    println!("building {name} {version} into {}", tools.display());
    let build = tools.join("build");
    let mut command = cargo();
    command.args(["install", "--locked", "--version", version, "--root"]).arg(tools);
    command.arg("--target-dir").arg(&build).arg(name);
    // Outside of the workspace: cargo would apply its configuration and toolchain here.
    command.current_dir(std::env::temp_dir());
    for (key, value) in
        [("OPT_LEVEL", "0"), ("LTO", "off"), ("CODEGEN_UNITS", "256"), ("DEBUG", "0")]
    {
        command.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "cannot build {name} {version}: `cargo install` ended with {status}");
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove `{}`", build.display()))
}
