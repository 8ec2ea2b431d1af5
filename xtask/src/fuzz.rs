//! Runs the fuzz targets in `fuzz/` on the stable toolchain.
//!
//! `cargo fuzz` wants a nightly compiler for its sanitizers only. The code under test has no
//! `unsafe`, so coverage is enough, and the flags for that are stable.

use std::{ffi::OsString, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::{Workspace, cargo};

/// The programs in `fuzz/fuzz_targets`.
const TARGETS: [&str; 2] = ["safetensors", "key_map"];

/// What `cargo fuzz` gives the compiler for coverage and for values that are compared.
const RUSTFLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// Largest input in bytes: room for all parts of a patch and their names.
const INPUT_BYTES_MAX: usize = 4096;

/// Length of the names that libFuzzer gives. Files with a name that says what they are stay.
const HASH_DIGITS: usize = 40;

/// How to fuzz.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzArguments {
    /// Runs these targets alone
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Afterwards makes the corpus in the repository the smallest one with the same coverage
    #[arg(long)]
    minimise: bool,
}

/// Builds the targets and runs one after the other.
///
/// # Errors
///
/// When a target does not exist, does not build or finds something. What it found is kept.
pub(crate) fn run(workspace: &Workspace, arguments: &FuzzArguments) -> Result<()> {
    let FuzzArguments { targets, seconds, minimise } = arguments;
    if let Some(unknown) = targets.iter().find(|name| !TARGETS.contains(&name.as_str())) {
        bail!("there is no fuzz target `{unknown}`: expected one of {}", TARGETS.join(", "));
    }
    let host = host()?;
    build(workspace, &host)?;
    for name in
        TARGETS.iter().filter(|name| targets.is_empty() || targets.iter().any(|t| t == *name))
    {
        let target = Target { workspace, host: &host, name };
        target.fuzz(*seconds)?;
        if *minimise {
            target.minimise()?;
        }
    }
    Ok(())
}

/// One target that is built.
struct Target<'a> {
    workspace: &'a Workspace,
    host: &'a str,
    name: &'a str,
}

impl Target<'_> {
    fn fuzz(&self, seconds: u64) -> Result<()> {
        // libFuzzer writes what is new into the first folder; the one in the repository stays.
        let (found, artifacts) = (self.folder("corpus")?, self.folder("artifacts")?);
        let mut prefix = OsString::from("-artifact_prefix=");
        prefix.push(artifacts.join(""));
        let mut command = self.command();
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(prefix).arg("-print_final_stats=1").arg(found).arg(self.seeds());
        println!("\n=== {}: {seconds} s", self.name);
        let status = command.status().context("cannot start the fuzz target")?;
        let artifacts = artifacts.display();
        ensure!(
            status.success(),
            "`{}` found something: fix it and move its file from `{artifacts}` to `fuzz/corpus/{}`",
            self.name,
            self.name
        );
        Ok(())
    }

    fn minimise(&self) -> Result<()> {
        let smallest = self.folder("smallest")?;
        fs::remove_dir_all(&smallest).and_then(|()| fs::create_dir(&smallest))?;
        let mut command = self.command();
        // Without counters: a file for every line that is reached, not for every number of times.
        command
            .args(["-set_cover_merge=1", "-use_counters=0"])
            .arg(&smallest)
            .arg(self.seeds())
            .arg(self.folder("corpus")?);
        let status = command.status().context("cannot start the fuzz target")?;
        ensure!(status.success(), "the corpus of `{}` cannot be minimised: {status}", self.name);
        for entry in fs::read_dir(self.seeds())? {
            let entry = entry?;
            if entry.file_name().len() == HASH_DIGITS {
                fs::remove_file(entry.path())?;
            }
        }
        for entry in fs::read_dir(&smallest)? {
            let entry = entry?;
            fs::copy(entry.path(), self.seeds().join(entry.file_name()))?;
        }
        Ok(())
    }

    fn command(&self) -> Command {
        let program = build_folder(self.workspace).join(self.host).join("release").join(self.name);
        let mut command = Command::new(program);
        command.arg(format!("-max_len={INPUT_BYTES_MAX}")).current_dir(&self.workspace.root);
        command
    }

    /// The corpus in the repository.
    fn seeds(&self) -> PathBuf {
        self.workspace.root.join("fuzz/corpus").join(self.name)
    }

    /// A folder of this target among what is built.
    fn folder(&self, kind: &str) -> Result<PathBuf> {
        let folder = build_folder(self.workspace).join(kind).join(self.name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create `{}`", folder.display()))?;
        Ok(folder)
    }
}

fn build_folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("fuzz")
}

fn build(workspace: &Workspace, host: &str) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--release", "--bins", "--manifest-path", "fuzz/Cargo.toml"]);
    // With a target named, the flags hold for the programs and not for build scripts and macros.
    command.args(["--target", host]).arg("--target-dir").arg(build_folder(workspace));
    command.env("RUSTFLAGS", RUSTFLAGS.join(" ")).current_dir(&workspace.root);
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "the fuzz targets do not build: they need a C++ compiler too");
    Ok(())
}

/// The triple of the machine that compiles.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot start rustc")?;
    let text = String::from_utf8(output.stdout).context("cannot read the answer of rustc")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc does not name its host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_target_is_answered_with_the_known_ones() {
        let workspace =
            Workspace { root: "/".into(), target: "/target".into(), packages: Vec::new() };
        let arguments =
            FuzzArguments { targets: vec!["json".to_owned()], seconds: 1, minimise: false };
        let error = run(&workspace, &arguments).unwrap_err();
        let expected = "there is no fuzz target `json`: expected one of safetensors, key_map";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn every_target_has_a_program_and_a_corpus() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        for name in TARGETS {
            assert!(fuzz.join("fuzz_targets").join(name).with_extension("rs").exists(), "{name}");
            assert!(fs::read_dir(fuzz.join("corpus").join(name)).unwrap().count() > 0, "{name}");
        }
    }
}
