//! The dependency law: arrows point down, and the pure crates stay pure.
//!
//! Only normal dependencies count: tests may use what they like.

use anyhow::{Context, Result, ensure};

use crate::{
    tidy::Violation,
    workspace::{Package, Workspace, cargo},
};

/// Which crates of the workspace each crate may depend on. A crate that is not here breaks the law.
const ARROWS: [(&str, &[&str]); 20] = [
    ("luna-protocol", &[]),
    ("luna-telemetry", &[]),
    ("luna-settings", &[]),
    ("luna-process", &[]),
    ("luna-adapter", &["luna-protocol"]),
    ("luna-prompt", &["luna-protocol"]),
    ("luna-transport", &[]),
    ("luna-broker-core", &["luna-protocol"]),
    ("luna-worker-core", &["luna-protocol"]),
    (
        "luna-broker",
        &[
            "luna-adapter",
            "luna-broker-core",
            "luna-process",
            "luna-protocol",
            "luna-settings",
            "luna-telemetry",
            "luna-transport",
        ],
    ),
    (
        "luna-worker",
        &[
            "luna-adapter",
            "luna-process",
            "luna-prompt",
            "luna-protocol",
            "luna-settings",
            "luna-telemetry",
            "luna-transport",
            "luna-worker-core",
        ],
    ),
    ("luna-client-core", &["luna-protocol"]),
    ("luna-client", &["luna-adapter", "luna-client-core", "luna-protocol", "luna-transport"]),
    ("luna-bench", &["luna-protocol", "luna-transport"]),
    (
        "luna-cli",
        &[
            "luna-adapter",
            "luna-bench",
            "luna-broker",
            "luna-client",
            "luna-fixtures",
            "luna-process",
            "luna-protocol",
            "luna-settings",
            "luna-telemetry",
            "luna-worker",
        ],
    ),
    ("luna-fixtures", &["luna-protocol"]),
    ("luna-sim", &["luna-broker-core", "luna-client-core", "luna-protocol", "luna-worker-core"]),
    ("luna-e2e", &["luna-client", "luna-fixtures", "luna-protocol", "luna-transport"]),
    (
        "luna-chaos",
        &["luna-client", "luna-e2e", "luna-fixtures", "luna-protocol", "luna-transport"],
    ),
    ("xtask", &[]),
];

/// Crates that only some may name; a name that ends in `-` stands for all that begin with it.
const RESTRICTED: [(&str, &[&str]); 3] = [
    ("zeromq", &["luna-transport"]),
    ("candle-", &["luna-worker"]),
    ("nvml-wrapper", &["luna-worker"]),
];

/// Crates without I/O, clock, chance and GPU.
pub(super) const PURE: [&str; 6] = [
    "luna-protocol",
    "luna-adapter",
    "luna-prompt",
    "luna-broker-core",
    "luna-worker-core",
    "luna-client-core",
];

/// What no pure crate may be built from, however indirectly.
const IMPURE: [&str; 4] = ["tokio", "zeromq", "candle-core", "rand"];

/// Checks what every crate names in its `Cargo.toml`.
pub(super) fn check_arrows(workspace: &Workspace) -> Vec<Violation> {
    let is_local = |name: &str| workspace.packages.iter().any(|package| package.name == name);
    let mut violations = Vec::new();
    for package in &workspace.packages {
        let manifest = workspace.relative(&package.manifest_path);
        violations.extend(check_package(&manifest, package, is_local));
    }
    violations
}

fn check_package(
    manifest: &str,
    package: &Package,
    is_local: impl Fn(&str) -> bool,
) -> Vec<Violation> {
    let name = package.name.as_str();
    let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == name) else {
        let message = format!("the crate `{name}` has no row in xtask/src/tidy/dependencies.rs");
        return vec![Violation::in_file(manifest, message)];
    };
    let mut violations = Vec::new();
    for dependency in package.normal_dependencies() {
        if is_local(dependency) && !allowed.contains(&dependency) {
            let message =
                format!("`{name}` must not depend on `{dependency}`: arrows point down only");
            violations.push(Violation::in_file(manifest, message));
        }
        for (restricted, owners) in RESTRICTED {
            let is_meant = dependency == restricted
                || (restricted.ends_with('-') && dependency.starts_with(restricted));
            if is_meant && !owners.contains(&name) {
                let message = format!("only {} may name `{dependency}`", owners.join(" and "));
                violations.push(Violation::in_file(manifest, message));
            }
        }
    }
    violations
}

/// Checks the names of all packages that a pure crate is built from.
pub(super) fn check_purity(package: &str, tree: &[String]) -> Vec<Violation> {
    let impure = IMPURE.iter().filter(|impure| tree.iter().any(|name| name == *impure));
    impure
        .map(|impure| {
            let message = format!(
                "`{package}` is pure, but is built from `{impure}`: see `cargo tree -p {package} -e normal -i {impure}`"
            );
            Violation::in_file("Cargo.lock", message)
        })
        .collect()
}

/// The names of all packages that `package` is built from, with the features that it asks for.
///
/// `cargo metadata` cannot tell: it joins the features of the whole workspace.
pub(super) fn normal_tree(workspace: &Workspace, package: &str) -> Result<Vec<String>> {
    let mut command = cargo();
    command.current_dir(&workspace.root);
    command.args([
        "tree",
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--format",
        "{p}",
        "--package",
        package,
    ]);
    let output = command.output().context("cannot start cargo")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`cargo tree -p {package}` failed: {complaint}");
    let tree = String::from_utf8(output.stdout).context("`cargo tree` answered something odd")?;
    Ok(tree.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::workspace::Dependency;

    #[test]
    fn arrows_up_and_sideways_are_violations() {
        let worker = package("luna-worker", &["luna-broker", "luna-protocol", "candle-nn"]);
        let expected = "worker/Cargo.toml: `luna-worker` must not depend on `luna-broker`: arrows point down only";
        assert_eq!(messages(&worker), [expected]);
    }

    #[test]
    fn restricted_crates_have_owners() {
        assert_eq!(messages(&package("luna-transport", &["zeromq"])), Vec::<String>::new());
        let broker = package("luna-broker", &["zeromq", "candle-nn"]);
        let expected = [
            "worker/Cargo.toml: only luna-transport may name `zeromq`",
            "worker/Cargo.toml: only luna-worker may name `candle-nn`",
        ];
        assert_eq!(messages(&broker), expected);
    }

    #[test]
    fn tests_may_depend_on_anything() {
        let mut broker = package("luna-broker", &["zeromq"]);
        broker.dependencies[0].kind = Some("dev".to_owned());
        assert_eq!(messages(&broker), Vec::<String>::new());
    }

    #[test]
    fn a_new_crate_needs_a_row() {
        let violations = messages(&package("luna-new", &[]));
        assert!(violations[0].contains("the crate `luna-new` has no row"), "{violations:?}");
    }

    #[test]
    fn pure_crates_are_built_from_pure_ones() {
        let tree = ["serde", "rand_core", "tokio"].map(str::to_owned);
        let violations = check_purity("luna-prompt", &tree);
        assert_eq!(violations.len(), 1);
        assert!(
            violations[0].message.starts_with("`luna-prompt` is pure, but is built from `tokio`")
        );
    }

    fn package(name: &str, dependencies: &[&str]) -> Package {
        let dependency = |name: &&str| Dependency { name: (*name).to_owned(), kind: None };
        Package {
            name: name.to_owned(),
            manifest_path: PathBuf::from("worker/Cargo.toml"),
            dependencies: dependencies.iter().map(dependency).collect(),
        }
    }

    fn messages(package: &Package) -> Vec<String> {
        let is_local = |name: &str| name.starts_with("luna-");
        let violations = check_package("worker/Cargo.toml", package, is_local);
        violations.iter().map(ToString::to_string).collect()
    }
}
