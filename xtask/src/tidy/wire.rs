//! The wire's document: every kind of message and every error code stands in it.
//!
//! The names are read from the protocol's sources, from the macros that declare them.

use super::Violation;

/// Where the wire is described.
pub(super) const DOCUMENT: &str = "docs/wire-protocol.md";

/// The beginnings of the declarations that hold names of the wire.
const DECLARATIONS: [&str; 2] = ["kinds! {", "error_codes! {"];

/// Checks that `document` has every name of the protocol's `sources` in backticks.
pub(super) fn check<'a>(sources: impl Iterator<Item = &'a str>, document: &str) -> Vec<Violation> {
    let mut names: Vec<_> = sources.flat_map(declared_names).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        let message =
            "found no `kinds!` and `error_codes!` in protocol/src: adapt xtask/src/tidy/wire.rs";
        return vec![Violation::in_file(DOCUMENT, message)];
    }
    let is_missing = |name: &&str| !document.contains(&format!("`{name}`"));
    let missing = names.into_iter().filter(is_missing);
    missing
        .map(|name| Violation::in_file(DOCUMENT, format!("does not describe `{name}`")))
        .collect()
}

/// The quoted names between the braces of the declarations in one source.
fn declared_names(source: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut in_declaration = false;
    for line in source.lines() {
        if DECLARATIONS.iter().any(|beginning| line.starts_with(beginning)) {
            in_declaration = true;
        } else if line.starts_with('}') {
            in_declaration = false;
        }
        if in_declaration && !line.trim_start().starts_with("//") {
            names.extend(line.split('"').skip(1).step_by(2));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"
macro_rules! kinds { () => { "of the macro" } }

kinds! { REQUEST_KINDS:
    "status" => Status,
    "cancel" => Cancel,
}

error_codes! {
    /// Not "quoted".
    TooLarge = "too_large", retryable: false;
}

const OTHER: &str = "other";
"#;

    #[test]
    fn names_come_from_the_declarations_alone() {
        assert_eq!(declared_names(SOURCE), ["status", "cancel", "too_large"]);
    }

    #[test]
    fn every_name_is_described() {
        let document = "### `status`\nAsks.\n`too_large`: no.\ncancel\n";
        let violations = check([SOURCE].into_iter(), document);
        assert_eq!(violations.len(), 1);
        assert_eq!(violations[0].to_string(), "docs/wire-protocol.md: does not describe `cancel`");
    }

    #[test]
    fn a_protocol_without_names_is_a_mistake_of_the_rule() {
        assert_eq!(check(["//! Nothing."].into_iter(), "").len(), 1);
    }
}
