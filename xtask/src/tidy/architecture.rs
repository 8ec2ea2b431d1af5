//! `ARCHITECTURE.md`: names every crate, and no path that is not there.

use super::Violation;

const DOCUMENT: &str = "ARCHITECTURE.md";

/// Checks the document against the crates' folders and the files that exist.
///
/// A path may be relative to the root, or to the crate that was named last and its `src` folder.
pub(super) fn check(
    text: &str,
    crates: &[String],
    exists: impl Fn(&str) -> bool,
) -> Vec<Violation> {
    if text.is_empty() {
        return vec![Violation::in_file(DOCUMENT, "is missing or empty")];
    }
    let is_named = |folder: &&String| {
        text.contains(&format!("`{folder}`")) || text.contains(&format!("`{folder}/`"))
    };
    let unnamed = crates.iter().filter(|folder| !is_named(folder));
    let mut violations: Vec<_> = unnamed
        .map(|folder| Violation::in_file(DOCUMENT, format!("does not name the crate `{folder}`")))
        .collect();

    let mut current = "";
    for (index, name) in names(text) {
        let name = name.trim_end_matches('/');
        if crates.iter().any(|folder| folder == name) {
            current = name;
        } else if is_path(name) {
            let places =
                [name.to_owned(), format!("{current}/{name}"), format!("{current}/src/{name}")];
            if !places.iter().any(|place| exists(place)) {
                let message = format!("names `{name}`, which does not exist");
                violations.push(Violation::in_line(DOCUMENT, index, message));
            }
        }
    }
    violations
}

/// Everything in backticks, with the index of its line; fenced blocks are left out.
fn names(text: &str) -> Vec<(usize, &str)> {
    let mut names = Vec::new();
    let mut in_fence = false;
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            in_fence = !in_fence;
        } else if !in_fence {
            names.extend(line.split('`').skip(1).step_by(2).map(|name| (index, name)));
        }
    }
    names
}

/// Whether a name is meant as a path: `core/src/queue.rs`, `docs/adr`, `deny.toml`, not `tokio`.
fn is_path(name: &str) -> bool {
    const FILE_TYPES: [&str; 6] = [".rs", ".md", ".toml", ".json", ".py", ".sh"];
    let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let is_folder =
        name.contains('/') && !name.starts_with('/') && !name.contains(char::is_uppercase);
    is_plain && (is_folder || FILE_TYPES.iter().any(|ending| name.ends_with(ending)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_is_named() {
        let crates = ["broker".to_owned(), "broker/core".to_owned()];
        let violations = check("# A\nSee `broker/core/`.\n", &crates, |_| true);
        assert_eq!(messages(&violations), ["ARCHITECTURE.md: does not name the crate `broker`"]);
        assert_eq!(
            messages(&check("", &crates, |_| true)),
            ["ARCHITECTURE.md: is missing or empty"]
        );
    }

    #[test]
    fn every_path_exists() {
        let text = "# A\n```\n`in/a/picture.rs`\n```\n### `broker/core`\n`queue.rs`, `old.rs`, `tokio`, \
                    `LUNA/1`, `docs/adr`\n";
        let exists = |path: &str| ["broker/core/src/queue.rs", "docs/adr"].contains(&path);
        let violations = check(text, &["broker/core".to_owned()], exists);
        assert_eq!(
            messages(&violations),
            ["ARCHITECTURE.md:6: names `old.rs`, which does not exist"]
        );
    }

    fn messages(violations: &[Violation]) -> Vec<String> {
        violations.iter().map(ToString::to_string).collect()
    }
}
