//! Rust files: each says what it is in its first line, and none is long.

use super::Violation;

/// Most lines of a file, without its unit tests.
const LINES_MAX: usize = 500;

/// Checks one Rust file.
pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    if !text.starts_with("//!") {
        violations.push(Violation::in_line(
            path,
            0,
            "does not start with `//!`: say what the file is",
        ));
    }
    let lines = lines_without_tests(text);
    if lines > LINES_MAX && !is_test_module(path) {
        let message =
            format!("has {lines} lines without tests: at most {LINES_MAX}, split it by concept");
        violations.push(Violation::in_file(path, message));
    }
    violations
}

/// Whether the whole file is the unit tests of another one.
fn is_test_module(path: &str) -> bool {
    path.ends_with("/tests.rs")
}

/// Counts the lines outside of `#[cfg(test)] mod tests { … }`, which ends at a brace in column 0.
fn lines_without_tests(text: &str) -> usize {
    let mut count = 0;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let tests_begin = line == "#[cfg(test)]"
            && lines.peek().is_some_and(|next| next.starts_with("mod ") && next.ends_with('{'));
        if tests_begin {
            lines.by_ref().find(|line| *line == "}");
        } else {
            count += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_first_paragraph_is_named() {
        assert_eq!(check("a/src/lib.rs", "//! What it is.\n"), []);
        let violations = check("a/src/lib.rs", "use std::fmt;\n");
        let message = "a/src/lib.rs:1: does not start with `//!`: say what the file is";
        assert_eq!(violations[0].to_string(), message);
    }

    #[test]
    fn unit_tests_do_not_count_as_lines() {
        let code = format!("//! Code.\n{}", "fn f() {}\n".repeat(LINES_MAX - 1));
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "    // test\n".repeat(300));
        assert_eq!(check("a.rs", &format!("{code}{tests}")), []);

        let violations = check("a.rs", &format!("{code}{tests}fn more() {{}}\n"));
        assert!(violations[0].message.starts_with("has 501 lines without tests"), "{violations:?}");
        assert_eq!(check("broker/tests.rs", &format!("{code}fn more() {{}}\n")), []);
    }
}
