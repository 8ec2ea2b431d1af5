//! Where the `luna` executable is that the tests start.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The `luna` executable: what `LUNA_BIN` names, else built now in the release profile.
pub fn luna() -> &'static Path {
    static LUNA: OnceLock<PathBuf> = OnceLock::new();
    LUNA.get_or_init(|| match env::var_os("LUNA_BIN") {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

/// A directory that outlives a test run, for seeded models that are slow to write.
pub fn scratch() -> PathBuf {
    let directory = target_directory().join("luna-fixtures");
    std::fs::create_dir_all(&directory).expect("the target directory is writable");
    directory
}

fn build() -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "luna-cli", "--bin", "luna"])
        .current_dir(workspace())
        .status()
        .expect("cargo can be started");
    assert!(status.success(), "`luna` could not be built: {status}");
    target_directory().join("release").join("luna")
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("`tests` is a folder of the workspace")
}

/// The target directory that this program itself was built in: `<target>/<profile>/deps/<test>`,
/// or `<target>/<profile>/<program>`.
fn target_directory() -> PathBuf {
    let program = env::current_exe().expect("the running program has a path");
    let folder = program.parent().expect("a program lies in a folder");
    let profile = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
    let target = profile.and_then(Path::parent);
    target.expect("programs lie in <target>/<profile>").to_path_buf()
}
