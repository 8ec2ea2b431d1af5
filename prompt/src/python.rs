//! Two functions of Python whose finer points show in prompts: `float()` and `str.isspace()`.
//!
//! `float()` is not Rust's `parse`: it takes surrounding blanks, underscores between digits and
//! the decimal digits of every script.

use unicode_general_category::{GeneralCategory, get_general_category};

/// Parses `text` as Python's `float()` does; may be infinite or NaN, as there.
pub(crate) fn float(text: &str) -> Option<f64> {
    let ascii: String = text.trim().chars().map(to_ascii_digit).collect();
    if has_misplaced_underscore(&ascii) {
        return None;
    }
    // What is left differs from Rust's syntax in nothing: both take a sign, `.5`, `5.`, `1e5`,
    // and `inf`, `infinity`, `nan` in any case; both round correctly and overflow to infinity.
    ascii.replace('_', "").parse().ok()
}

/// Whether Python's `str.isspace()` and `str.split()` take `character` for a blank.
pub(crate) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// An underscore is allowed between two digits only.
fn has_misplaced_underscore(ascii: &str) -> bool {
    let bytes = ascii.as_bytes();
    let is_digit_at = |index: Option<usize>| {
        index.and_then(|index| bytes.get(index)).is_some_and(u8::is_ascii_digit)
    };
    let mut underscores = (0..bytes.len()).filter(|&index| bytes[index] == b'_');
    underscores.any(|index| !is_digit_at(index.checked_sub(1)) || !is_digit_at(Some(index + 1)))
}

/// The ASCII form of a decimal digit of any script; any other character as it is.
///
/// Unicode guarantees that decimal digits come in ascending runs from zero to nine, and adjacent
/// runs are whole, so the distance to the start of the run gives the value.
fn to_ascii_digit(character: char) -> char {
    if character.is_ascii() || !is_decimal_digit(character) {
        return character;
    }
    let code = u32::from(character);
    let before = (0..code).rev().map_while(char::from_u32);
    let distance = before.take_while(|&character| is_decimal_digit(character)).count();
    u8::try_from(distance % 10).map_or(character, |value| char::from(b'0' + value))
}

fn is_decimal_digit(character: char) -> bool {
    get_general_category(character) == GeneralCategory::DecimalNumber
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_python() {
        for (text, number) in [
            ("1_0", 10.0),
            ("1e1_0", 1e10),
            ("+.8", 0.8),
            ("-0.4", -0.4),
            ("1.", 1.0),
            (" 0.7 ", 0.7),
            ("\t1\n\u{b}\u{c}\r", 1.0),
            ("\u{a0}1.0\u{2003}", 1.0),
            ("\u{85}1.0", 1.0),
            ("１２.５", 12.5),
            ("१", 1.0),
            ("1\u{661}", 11.0),
            ("\u{1d7cf}", 1.0),
            ("\u{1d7ff}", 9.0),
            ("\u{a0}1_\u{662}", 12.0),
            ("٣_٤", 34.0),
            ("1e-400", 0.0),
            ("1e400", f64::INFINITY),
            ("inf", f64::INFINITY),
            ("-Infinity", f64::NEG_INFINITY),
        ] {
            assert_eq!(float(text), Some(number), "{text:?}");
        }
        assert!(float("iNf").is_some_and(f64::is_infinite));
        assert!(float(" +NaN ").is_some_and(f64::is_nan));
    }

    #[test]
    fn what_python_refuses_is_no_number() {
        for text in [
            "",
            "  ",
            ".",
            "e5",
            "1e",
            "+ 1",
            "--1",
            "1 2",
            "infi",
            "0x10",
            "1d",
            "1f",
            "1,5",
            "1j",
            "1__0",
            "_1",
            "1_",
            "1_.0",
            "1._0",
            "1e_1",
            "1_e5",
            "1e5_",
            "_inf",
            "i_nf",
            "\u{a0}_1",
            "²",
            "½",
            "∞",
            "−1",
            "1\u{66b}5",
            "1\u{200b}",
            "\u{feff}1",
            "1\0",
            "\u{180e}1",
            // `isspace()` takes these for blanks, `float()` does not.
            "\u{1c}1.0",
            "1.0\u{1f}",
            "\u{a0}1\u{1c}",
        ] {
            assert_eq!(float(text), None, "{text:?}");
        }
    }

    #[test]
    fn blanks_are_unicode_white_space_and_four_separators() {
        for blank in [' ', '\t', '\n', '\u{1c}', '\u{1f}', '\u{85}', '\u{a0}', '\u{2028}', '　'] {
            assert!(is_space(blank), "{blank:?}");
        }
        for other in ['\u{1b}', '\u{200b}', '\u{feff}', '\u{180e}', 'a'] {
            assert!(!is_space(other), "{other:?}");
        }
    }
}
