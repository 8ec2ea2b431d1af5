//! The tokenizer gives the ids of transformers' slow `CLIPTokenizer` without `ftfy`.
//!
//! `tokenizer_vectors.json` lists `[text, ids]` made with transformers 4.57.6, regex 2026.11.15 and
//! Python 3.11 (Unicode 14): chosen texts first, then random ones.

use std::sync::LazyLock;

use luna_prompt::Tokenizer;
use proptest::prelude::*;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

#[test]
fn ids_are_those_of_transformers() {
    let vectors: Vec<(String, Vec<u32>)> =
        serde_json::from_str(include_str!("tokenizer_vectors.json")).unwrap();
    assert_eq!(vectors.len(), 152);
    for (text, ids) in vectors {
        assert_eq!(TOKENIZER.ids(&text), ids, "{text:?}");
    }
}

#[test]
fn special_tokens_may_be_written_in_any_case() {
    assert_eq!(TOKENIZER.ids("<|startoftext|><|endoftext|>"), [49406, 49407]);
    assert_eq!(TOKENIZER.ids("a<|EndOfText|>b"), [320, 49407, 321]);
    assert_eq!(TOKENIZER.ids("a<|endoftext|>b"), [320, 49407, 321]);
}

#[test]
fn a_special_token_parts_the_text_before_it_is_cleaned() {
    // The mark would compose with the letter, were it not for the token between them.
    let parted = TOKENIZER.ids("e<|endoftext|>\u{301}");
    assert_eq!(parted.len(), 2 + TOKENIZER.ids("\u{301}").len());
    assert_eq!(TOKENIZER.ids("e\u{301}"), TOKENIZER.ids("é"));
}

proptest! {
    #[test]
    fn any_text_has_ids_of_the_vocabulary(text in any::<String>()) {
        let ids = TOKENIZER.ids(&text);
        prop_assert!(ids.iter().all(|&id| id < 49408));
        prop_assert!(ids.len() <= 3 * text.len());
    }
}
