//! Everything that has to pass before a change is merged, as one list of steps.
//!
//! Steps run in order, each one prints its time, and the first failure ends the run: what comes
//! later is rarely worth reading then. Every step also runs alone (`--step NAME`) and makes what it
//! needs if an earlier step has not.

mod python;
mod tools;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    tidy,
    workspace::{Workspace, cargo},
};

/// All steps in their order.
const STEPS: [Step; 10] = [
    Step { name: "fmt", about: "formatting", run: fmt },
    Step { name: "tidy", about: "the rules that the compiler does not know", run: tidy },
    Step {
        name: "deny",
        about: "licences, duplicates, bans and sources of dependencies",
        run: deny,
    },
    Step { name: "clippy", about: "lints of all targets", run: clippy },
    Step { name: "doc", about: "documentation of all items, private ones too", run: doc },
    Step { name: "build", about: "the programs that the end-to-end tests start", run: build },
    Step { name: "python", about: "a virtual environment for the Python wire test", run: python },
    Step { name: "test", about: "all tests", run: test },
    Step { name: "doctest", about: "the examples in the documentation", run: doctest },
    Step { name: "chaos", about: "three minutes of faults in a farm under load", run: chaos },
];

/// One step and how to run it.
struct Step {
    name: &'static str,
    about: &'static str,
    run: fn(&Settings<'_>) -> Result<()>,
}

/// What a step may want to know.
struct Settings<'a> {
    workspace: &'a Workspace,
    online: bool,
}

/// A step that has run.
struct Finished {
    name: &'static str,
    time: Duration,
    outcome: &'static str,
}

/// Prints the steps.
pub(crate) fn list() {
    for Step { name, about, .. } in STEPS {
        println!("{name:8} {about}");
    }
}

/// Runs the steps called `only`, or all of them when it is empty.
///
/// # Errors
///
/// When a step fails or does not exist.
pub(crate) fn run(workspace: &Workspace, only: &[String], online: bool) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| !STEPS.iter().any(|step| step.name == **name)) {
        let known = STEPS.map(|step| step.name).join(", ");
        bail!("there is no step `{unknown}`: expected one of {known}");
    }
    let settings = Settings { workspace, online };
    let mut finished = Vec::new();
    for step in
        STEPS.iter().filter(|step| only.is_empty() || only.iter().any(|name| name == step.name))
    {
        println!("\n=== {}: {}", step.name, step.about);
        let start = Instant::now();
        let result = (step.run)(&settings);
        let time = start.elapsed();
        let outcome = if result.is_ok() { "passed" } else { "FAILED" };
        finished.push(Finished { name: step.name, time, outcome });
        println!("=== {}: {outcome} after {:.1} s", step.name, time.as_secs_f64());
        if let Err(error) = result {
            summarise(&finished);
            let again = format!("`cargo xtask ci --step {}` runs it alone", step.name);
            return Err(error.context(again))
                .with_context(|| format!("step `{}` failed", step.name));
        }
    }
    summarise(&finished);
    Ok(())
}

fn summarise(finished: &[Finished]) {
    println!("\n=== summary");
    for Finished { name, time, outcome } in finished {
        println!("{name:8} {:>8.1} s  {outcome}", time.as_secs_f64());
    }
    let total: Duration = finished.iter().map(|step| step.time).sum();
    println!("{:8} {:>8.1} s", "together", total.as_secs_f64());
}

fn fmt(settings: &Settings<'_>) -> Result<()> {
    call(settings, cargo().args(["fmt", "--all", "--check"]))
}

fn tidy(settings: &Settings<'_>) -> Result<()> {
    tidy::run(settings.workspace)
}

/// The advisory database is not reachable from everywhere, so it is asked for.
fn deny(settings: &Settings<'_>) -> Result<()> {
    let mut command = Command::new(tools::cargo_deny(settings.workspace)?);
    command.args(["check", "bans", "licenses", "sources"]);
    if settings.online {
        command.arg("advisories");
    }
    call(settings, &mut command)
}

fn clippy(settings: &Settings<'_>) -> Result<()> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--release", "--", "-D", "warnings"];
    call(settings, cargo().args(arguments))
}

fn doc(settings: &Settings<'_>) -> Result<()> {
    let arguments = ["doc", "--workspace", "--no-deps", "--document-private-items", "--release"];
    call(settings, cargo().args(arguments).env("RUSTDOCFLAGS", "-Dwarnings"))
}

fn build(settings: &Settings<'_>) -> Result<()> {
    call(settings, cargo().args(["build", "--workspace", "--bins", "--release"]))
}

fn python(settings: &Settings<'_>) -> Result<()> {
    python::interpreter(settings.workspace).map(drop)
}

/// Runs the tests with nextest where it is installed; it is too large to build for one run.
fn test(settings: &Settings<'_>) -> Result<()> {
    let luna = settings.workspace.target.join("release/luna");
    if !luna.exists() {
        build(settings)?;
    }
    let mut command = cargo();
    if tools::has_nextest() {
        command.args(["nextest", "run", "--workspace", "--release"]);
    } else {
        command.args(["test", "--workspace", "--lib", "--bins", "--tests", "--release"]);
    }
    command.env("LUNA_BIN", luna).env("LUNA_PYTHON", python::interpreter(settings.workspace)?);
    call(settings, &mut command)
}

fn doctest(settings: &Settings<'_>) -> Result<()> {
    call(settings, cargo().args(["test", "--workspace", "--doc", "--release"]))
}

/// Always the same faults: a seed that finds something is looked into, not drawn by chance.
fn chaos(settings: &Settings<'_>) -> Result<()> {
    let arguments = ["--minutes", "3", "--seed", "1"].map(str::to_owned);
    crate::chaos::run(settings.workspace, &arguments)
}

/// Prints a command and runs it at the root of the workspace.
fn call(settings: &Settings<'_>, command: &mut Command) -> Result<()> {
    let shown = shown(command);
    println!("$ {shown}");
    let status = command.current_dir(&settings.workspace.root).status();
    let status = status.with_context(|| format!("cannot start `{shown}`"))?;
    ensure!(status.success(), "`{shown}` ended with {status}");
    Ok(())
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let environment = command.get_envs().filter_map(|(key, value)| {
        value.map(|value| format!("{}={} ", key.to_string_lossy(), value.to_string_lossy()))
    });
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    let arguments = command.get_args().map(|argument| format!(" {}", argument.to_string_lossy()));
    environment.chain([program]).chain(arguments).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("/opt/bin/cargo");
        command.args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings");
        assert_eq!(shown(&command), "RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps");
    }

    #[test]
    fn an_unknown_step_is_answered_with_the_known_ones() {
        let workspace =
            Workspace { root: "/".into(), target: "/target".into(), packages: Vec::new() };
        let error = run(&workspace, &["lint".to_owned()], false).unwrap_err();
        let expected = "there is no step `lint`: expected one of fmt, tidy, deny, ";
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}
