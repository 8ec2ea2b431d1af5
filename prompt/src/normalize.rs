//! What happens to text before it is cut into words: that of transformers' slow `CLIPTokenizer`.
//!
//! Without `ftfy`, that tokenizer borrows BERT's basic tokenizer for the task, so characters vanish
//! (control, format and unassigned ones, hence the joiners in emoji) and every CJK ideograph stands
//! alone. Which characters are assigned depends on the Unicode version of Python there and of the
//! tables here; they differ in newly added characters alone.

use unicode_general_category::{GeneralCategory, get_general_category};
use unicode_normalization::UnicodeNormalization;

use crate::python;

/// Cleans `text`: NFC, lower case, single blanks between the words, none around them.
pub(crate) fn normalize(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len());
    for character in text.chars().filter(|&character| !is_dropped(character)) {
        if is_ideograph(character) {
            spaced.extend([' ', character, ' ']);
        } else {
            spaced.push(character);
        }
    }
    let composed: String = spaced.nfc().collect();
    let words: Vec<_> = composed
        .split(python::is_space)
        .filter(|word| !word.is_empty())
        // Word by word, because the lower case of a sigma depends on its neighbours.
        .map(str::to_lowercase)
        .collect();
    words.join(" ")
}

/// The replacement character and everything of category C but the blanks among them.
fn is_dropped(character: char) -> bool {
    use GeneralCategory::{Control, Format, PrivateUse, Surrogate, Unassigned};
    match character {
        '\t' | '\n' | '\r' => false,
        '\u{fffd}' => true,
        _ => matches!(
            get_general_category(character),
            Control | Format | PrivateUse | Surrogate | Unassigned
        ),
    }
}

/// The ranges that BERT's tokenizer takes for Chinese characters; kana and hangul are not in them.
fn is_ideograph(character: char) -> bool {
    matches!(
        character,
        '\u{4e00}'..='\u{9fff}'
            | '\u{3400}'..='\u{4dbf}'
            | '\u{20000}'..='\u{2a6df}'
            | '\u{2a700}'..='\u{2b73f}'
            | '\u{2b740}'..='\u{2b81f}'
            | '\u{2b820}'..='\u{2ceaf}'
            | '\u{f900}'..='\u{faff}'
            | '\u{2f800}'..='\u{2fa1f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_of_every_kind_collapse() {
        assert_eq!(normalize("  a\n\tb \u{a0}\u{3000} c\r\n"), "a b c");
        assert_eq!(normalize("a\u{2028}b\u{2029}c"), "a b c");
        assert_eq!(normalize(" \n "), "");
    }

    #[test]
    fn control_format_private_and_unassigned_characters_vanish() {
        assert_eq!(normalize("a\0b\u{fffd}c\u{85}d\u{b}e\u{1c}f"), "abcdef");
        assert_eq!(normalize("a\u{200d}b\u{feff}c\u{e000}d\u{378}e"), "abcde");
    }

    #[test]
    fn ideographs_stand_alone_but_kana_do_not() {
        assert_eq!(normalize("a漢字かなb"), "a 漢 字 かなb");
        assert_eq!(normalize("\u{20000}\u{f900}"), "\u{20000} 豈");
    }

    #[test]
    fn text_is_composed_and_lower_case() {
        assert_eq!(normalize("CAFE\u{301} ÜN"), "café ün");
        assert_eq!(normalize("ΟΔΟΣ ΣΑΣ"), "οδος σας");
        assert_eq!(normalize("İ"), "i\u{307}");
    }

    #[test]
    fn compatibility_forms_stay() {
        assert_eq!(normalize("ﬁ ＡＢ ½ “q” &amp;"), "ﬁ ａｂ ½ “q” &amp;");
    }
}
