//! Links of Markdown files to other files of the repository.

use super::Violation;

/// Checks the relative links of the file at `path`; `exists` takes paths from the root.
///
/// Links elsewhere are left alone: tidy works without a network.
pub(super) fn check(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Violation> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut violations = Vec::new();
    let mut in_fence = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
        }
        if in_fence {
            continue;
        }
        for target in targets(line) {
            let file = target.split_once('#').map_or(target, |(file, _)| file);
            let is_elsewhere = file.contains(':') || file.is_empty();
            if !is_elsewhere && !resolve(folder, file).is_some_and(|path| exists(&path)) {
                let message = format!("links to `{target}`, which does not exist");
                violations.push(Violation::in_line(path, index, message));
            }
        }
    }
    violations
}

/// What `[text](target)` and `[text]: target` of one line point to.
fn targets(line: &str) -> Vec<&str> {
    let mut targets: Vec<_> = line
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .filter_map(|(target, _)| target.split_whitespace().next())
        .collect();
    if line.starts_with('[')
        && let Some((_, target)) = line.split_once("]: ")
    {
        targets.extend(target.split_whitespace().next());
    }
    targets
}

/// `target` as seen from the root; nothing when it leaves the repository.
fn resolve(folder: &str, target: &str) -> Option<String> {
    let mut parts: Vec<_> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_from_the_folder_of_their_file() {
        let exists = |path: &str| ["docs/wire-protocol.md", "README.md"].contains(&path);
        let text = "See [the wire](../wire-protocol.md#errors) and [home](../../README.md).\n";
        assert_eq!(check("docs/adr/0001.md", text, exists), []);

        let violations = check("README.md", "a\n[x](docs/gone.md) [y](../outside.md)\n", exists);
        let expected = [
            "README.md:2: links to `docs/gone.md`, which does not exist",
            "README.md:2: links to `../outside.md`, which does not exist",
        ];
        let messages: Vec<_> = violations.iter().map(ToString::to_string).collect();
        assert_eq!(messages, expected);
    }

    #[test]
    fn other_sites_headings_and_code_are_left_alone() {
        let text = "[a](https://example.org/x) [b](#here) <mailto:a@example.org>\n```\n[c](gone.md)\n```\n";
        assert_eq!(check("README.md", text, |_| false), []);
    }

    #[test]
    fn reference_definitions_are_links_too() {
        assert_eq!(check("README.md", "[wire]: docs/gone.md\n", |_| false).len(), 1);
    }
}
