//! Brackets and weights: a prompt becomes segments of text, each with one weight.
//!
//! `(text)` multiplies the weight around it by 1.1, `(text:1.3)` *replaces* it, and brackets nest.
//! `\(` and `\)` are ordinary characters. There is no `[…]`, `BREAK`, `AND` or `<lora:…>`.
//!
//! Text is cut by slices and a stack of pending items, never by recursion, so that no prompt can
//! exhaust the thread's stack.

use crate::{
    error::{Counted, PromptError},
    python,
};

/// What a pair of brackets without a number multiplies by.
const BRACKET_FACTOR: f64 = 1.1;

/// Text of one weight.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Segment {
    /// The text, with `\(` and `\)` written as plain brackets.
    pub(crate) text: String,
    /// Finite.
    pub(crate) weight: f64,
}

/// Splits `prompt` into segments, in the order of the text.
pub(crate) fn segments(prompt: &str, levels_max: usize) -> Result<Vec<Segment>, PromptError> {
    let mut segments = Vec::new();
    let mut pending = Vec::new();
    push_items(&mut pending, prompt, 1.0, 0);
    while let Some(Pending { item, weight, level }) = pending.pop() {
        let Some(inner) = inside_brackets(item) else {
            segments.push(segment(item, weight)?);
            continue;
        };
        if level == levels_max {
            let counted = Counted::BracketLevels;
            return Err(PromptError::TooLarge { counted, value: level + 1, limit: levels_max });
        }
        let (inner, weight) = weigh(inner, weight);
        push_items(&mut pending, inner, weight, level + 1);
    }
    Ok(segments)
}

/// An item that is still to be looked at.
struct Pending<'a> {
    item: &'a str,
    /// The weight of the text around it.
    weight: f64,
    /// Brackets around it.
    level: usize,
}

/// Puts the items of `text` on the stack, the first on top.
fn push_items<'a>(pending: &mut Vec<Pending<'a>>, text: &'a str, weight: f64, level: usize) {
    let first_new = pending.len();
    pending.extend(items(text).into_iter().map(|item| Pending { item, weight, level }));
    pending[first_new..].reverse();
}

/// Cuts `text` at its outermost brackets; a pair of brackets and all between is one item.
///
/// A stray `)` is kept as text and makes the depth negative, so that a later `(` brings it back to
/// zero without opening an item. An unclosed `(` makes the rest one item.
fn items(text: &str) -> Vec<&str> {
    let mut items = Vec::new();
    let mut start = 0;
    let mut depth = 0_i64;
    let mut is_escaped = false;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'(' if !is_escaped => {
                if depth == 0 {
                    items.push(&text[start..index]);
                    start = index;
                }
                depth += 1;
            }
            b')' if !is_escaped => {
                depth -= 1;
                if depth == 0 {
                    items.push(&text[start..=index]);
                    start = index + 1;
                }
            }
            _ => {}
        }
        // `\\` is no escape itself: a bracket is escaped by any backslash before it.
        is_escaped = byte == b'\\';
    }
    items.push(&text[start..]);
    items.retain(|item| !item.is_empty());
    items
}

/// The text between the brackets that an item starts and ends with.
///
/// That is not always a pair: the rest of `((a)` is one item, and loses its first and last.
fn inside_brackets(item: &str) -> Option<&str> {
    let inner = item.strip_prefix('(')?.strip_suffix(')')?;
    (!inner.ends_with('\\')).then_some(inner)
}

/// Splits the number off the text between brackets; `weight` is that of the text around them.
fn weigh(inner: &str, weight: f64) -> (&str, f64) {
    inner
        .rsplit_once(':')
        .filter(|(text, _)| !text.is_empty())
        .and_then(|(text, number)| Some((text, python::float(number)?)))
        .unwrap_or((inner, weight * BRACKET_FACTOR))
}

fn segment(item: &str, weight: f64) -> Result<Segment, PromptError> {
    if !weight.is_finite() {
        return Err(PromptError::NonFiniteWeight { weight });
    }
    Ok(Segment { text: item.replace("\\)", ")").replace("\\(", "("), weight })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_brackets_multiply_and_nest() {
        check("a cat", &[("a cat", 1.0)]);
        check("a ((mat)) b", &[("a ", 1.0), ("mat", 1.1 * 1.1), (" b", 1.0)]);
        check("(((f)))", &[("f", 1.1 * 1.1 * 1.1)]);
        check("", &[]);
        check("()", &[]);
        check("(())", &[]);
    }

    #[test]
    fn a_number_replaces_the_weight_around_it() {
        check("(red:1.3) cat", &[("red", 1.3), (" cat", 1.0)]);
        check(
            "((a (b:0.8) c) d:1.2)",
            &[("a ", 1.2 * 1.1), ("b", 0.8), (" c", 1.2 * 1.1), (" d", 1.2)],
        );
        check("(blurry:-0.4)", &[("blurry", -0.4)]);
        check("(a:0)", &[("a", 0.0)]);
    }

    #[test]
    fn the_number_stands_behind_the_last_colon_that_is_not_the_first_character() {
        check("(a:b:1.2)", &[("a:b", 1.2)]);
        check("(c:)", &[("c:", 1.1)]);
        check("(:1.5)", &[(":1.5", 1.1)]);
        check("(a:1.5:b)", &[("a:1.5:b", 1.1)]);
        check("(::1.5)", &[(":", 1.5)]);
        check("(漢:1.5)", &[("漢", 1.5)]);
    }

    #[test]
    fn the_number_is_one_of_python() {
        for (number, weight) in
            [("1e1", 10.0), ("+0.8", 0.8), (" 0.7 ", 0.7), ("1_0", 10.0), ("१", 1.0)]
        {
            check(&format!("(a:{number})"), &[("a", weight)]);
        }
        check("(g:x)", &[("g:x", 1.1)]);
    }

    #[test]
    fn escaped_brackets_are_text() {
        check(r"smile \(happy\)", &[("smile (happy)", 1.0)]);
        check(r"(x \(y\):1.2)", &[("x (y)", 1.2)]);
        check(r"(a\)", &[("(a)", 1.0)]);
        check(r"\(a)", &[("(a)", 1.0)]);
        check(r"back\\slash", &[(r"back\\slash", 1.0)]);
        check(r"\\(a\\)", &[(r"\(a\)", 1.0)]);
    }

    #[test]
    fn a_stray_closing_bracket_lets_the_next_opening_one_pass() {
        check("a) b (c:1.5) d", &[("a) b (c:1.5) d", 1.0)]);
        check("a) ( (b:1.5)", &[("a) ( ", 1.0), ("b", 1.5)]);
    }

    #[test]
    fn an_unclosed_bracket_makes_the_rest_one_item() {
        check("x (y", &[("x ", 1.0), ("(y", 1.0)]);
        check("((a b (c:1.2) ) x (y", &[("((a b (c:1.2) ) x (y", 1.0)]);
        check("((a)", &[("(a", 1.1)]);
        check("(", &[("(", 1.0)]);
    }

    #[test]
    fn a_weight_that_is_not_finite_is_an_error_where_text_has_it() {
        for prompt in ["(a:inf)", "(a:-inf)", "(a:nan)", "(a:1e999)", "(((a)):1.7e308)"] {
            let error = segments(prompt, 9).unwrap_err();
            assert!(matches!(error, PromptError::NonFiniteWeight { .. }), "{prompt}: {error}");
        }
        check("((a:0.5):inf)", &[("a", 0.5)]);
        assert!(
            segments("(a:-inf)", 9).unwrap_err().to_string().starts_with("weight `-inf` is not")
        );
    }

    #[test]
    fn brackets_nest_up_to_the_limit() {
        let nested = |levels: usize| format!("{}a{}", "(".repeat(levels), ")".repeat(levels));
        assert_eq!(segments(&nested(256), 256).unwrap().len(), 1);
        let error = segments(&nested(257), 256).unwrap_err();
        let expected =
            "the prompt has `257` levels of brackets, the limit is `256`: shorten the prompt";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_wall_of_brackets_costs_no_stack() {
        check(&"(".repeat(60_000), &[("(".repeat(60_000).as_str(), 1.0)]);
        check(&")".repeat(60_000), &[(")".repeat(60_000).as_str(), 1.0)]);
        assert!(segments(&("(".repeat(30_000) + &")".repeat(30_000)), 256).is_err());
    }

    proptest! {
        #[test]
        fn any_text_gives_finite_weights_or_an_error(prompt in r"[()\\:a1.é ]{0,60}|\PC{0,60}") {
            for segment in segments(&prompt, 8).unwrap_or_default() {
                prop_assert!(segment.weight.is_finite());
                prop_assert!(!segment.text.is_empty());
            }
        }

        #[test]
        fn text_without_brackets_is_one_segment(prompt in r"[^()\\]{1,60}") {
            check(&prompt, &[(&prompt, 1.0)]);
        }
    }

    #[track_caller]
    fn check(prompt: &str, expected: &[(&str, f64)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|&(text, weight)| Segment { text: text.to_owned(), weight })
            .collect();
        assert_eq!(segments(prompt, 256).unwrap(), expected, "{prompt:?}");
    }
}
