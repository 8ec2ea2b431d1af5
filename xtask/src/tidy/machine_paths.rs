//! Absolute paths that exist on somebody's machine only.

use super::Violation;

/// Beginnings of such paths, in parts so that this file does not break its own rule.
const BEGINNINGS: [[&str; 2]; 2] = [["/wo", "rk/"], ["/ro", "ot/"]];

/// Checks any text file.
pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let beginnings = BEGINNINGS.map(|parts| parts.concat());
    let mut violations = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let found = beginnings.iter().find(|beginning| holds_path(line, beginning));
        violations.extend(found.map(|beginning| {
            let message = format!("names `{beginning}…`, a path of one machine: make it relative");
            Violation::in_line(path, index, message)
        }));
    }
    violations
}

/// Whether `line` has `beginning` where a path can begin, not within a longer one.
fn holds_path(line: &str, beginning: &str) -> bool {
    line.match_indices(beginning).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-}/".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_paths_are_violations_and_similar_ones_are_not() {
        let home = ["/ro", "ot/x"].concat();
        let violations = check("a.toml", &format!("ok = 1\ndir = \"{home}\"\n"));
        assert_eq!(violations.len(), 1);
        assert_eq!(violations[0].line, Some(2));
        assert_eq!(check("a.md", &format!("https://example.org{home} and sys{home}")), []);
    }
}
