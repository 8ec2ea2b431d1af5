//! The rules of the house that the compiler does not know.
//!
//! A rule is a function from texts to [`Violation`]s; reading files and asking cargo happens here.
//! All rules run and all violations are printed, because they are fixed in one go.

mod architecture;
mod dependencies;
mod links;
mod machine_paths;
mod source;
mod wire;

use std::{fmt, fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// Folders whose content is made by tools, as in `.gitignore`.
const GENERATED: [&str; 5] = [".git", ".venv", "__pycache__", "node_modules", "target"];

/// Something that breaks a rule, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    /// The file, relative to the root.
    path: String,
    /// The line, counted from 1, when there is one.
    line: Option<usize>,
    /// What is wrong and what to do.
    message: String,
}

/// A text file of the repository.
#[derive(Debug)]
struct TextFile {
    /// Relative to the root, with `/` between the parts.
    path: String,
    text: String,
}

/// Checks every rule and prints what breaks it.
///
/// # Errors
///
/// When a rule is broken, a file cannot be read or cargo fails.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let files = text_files(workspace)?;
    let violations = check(workspace, &files)?;
    for violation in &violations {
        eprintln!("{violation}");
    }
    if !violations.is_empty() {
        bail!("{} violations of the rules in CONTRIBUTING.md", violations.len());
    }
    println!("tidy: {} files follow the rules", files.len());
    Ok(())
}

fn check(workspace: &Workspace, files: &[TextFile]) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for file in files {
        let extension = Path::new(&file.path).extension().unwrap_or_default();
        if extension == "rs" {
            violations.extend(source::check(&file.path, &file.text));
        }
        if extension == "md" {
            let exists = |path: &str| workspace.root.join(path).exists();
            violations.extend(links::check(&file.path, &file.text, exists));
        }
        violations.extend(machine_paths::check(&file.path, &file.text));
    }

    let crates: Vec<_> =
        workspace.packages.iter().map(|package| workspace.folder_of(package)).collect();
    let exists = |path: &str| workspace.root.join(path).exists();
    violations.extend(architecture::check(&text_of(files, "ARCHITECTURE.md"), &crates, exists));

    violations.extend(dependencies::check_arrows(workspace));
    for package in dependencies::PURE {
        let tree = dependencies::normal_tree(workspace, package)?;
        violations.extend(dependencies::check_purity(package, &tree));
    }

    let protocol: Vec<_> =
        files.iter().filter(|file| file.path.starts_with("protocol/src/")).collect();
    let sources = protocol.iter().map(|file| file.text.as_str());
    violations.extend(wire::check(sources, &text_of(files, wire::DOCUMENT)));
    Ok(violations)
}

/// The text of the file at `path`; empty when there is none, which breaks every rule about it.
fn text_of(files: &[TextFile], path: &str) -> String {
    files.iter().find(|file| file.path == path).map(|file| file.text.clone()).unwrap_or_default()
}

/// All files of the repository that are text, in the order of their paths.
fn text_files(workspace: &Workspace) -> Result<Vec<TextFile>> {
    let mut files = Vec::new();
    let mut folders = vec![workspace.root.clone()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read `{}`", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            let is_generated = GENERATED.iter().any(|name| entry.file_name() == *name);
            if is_generated || path == workspace.target {
                continue;
            }
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                files.push(TextFile { path: workspace.relative(&path), text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

impl Violation {
    fn in_file(path: &str, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line: None, message: message.into() }
    }

    /// `index` counts from 0, as iterators do.
    fn in_line(path: &str, index: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line: Some(index + 1), message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.path, self.message),
            None => write!(f, "{}: {}", self.path, self.message),
        }
    }
}
