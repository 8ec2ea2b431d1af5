//! CLIP's tokenizer: text to ids, as transformers' slow `CLIPTokenizer` without `ftfy` does it.

use regex::Regex;

use crate::{
    bpe::Bpe,
    normalize::normalize,
    token::{END, START},
};

/// The tokens that may be written in a prompt, and their ids.
const SPECIALS: [(&str, u32); 2] = [("<|startoftext|>", START), ("<|endoftext|>", END)];

/// What is one word of normalised text; characters that fit nowhere are skipped.
///
/// Only the iota subscript U+0345 fits nowhere. It is a mark whose upper case is a letter, and the
/// original pattern, which ignores case throughout, takes it neither for a letter nor for another.
const WORD: &str = r"(?x)
    (?i: <\|startoftext\|> | <\|endoftext\|> | 's | 't | 're | 've | 'm | 'll | 'd )
    | \p{L}+ | \p{N} | [^\s\p{L}\p{N}\u{345}]+";

/// CLIP's vocabulary, ready for use. Building it takes some milliseconds, so keep it.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: Bpe,
    word: Regex,
}

impl Tokenizer {
    /// Builds the tables from the vocabulary in this crate.
    pub fn new() -> Self {
        Self { bpe: Bpe::new(), word: Regex::new(WORD).expect("the pattern is well-formed") }
    }

    /// The ids of `text`, without start, end and padding. Knows nothing of weights or embeddings.
    ///
    /// `<|startoftext|>` and `<|endoftext|>` become their ids: written exactly so they also part
    /// the text on both sides, and in another case they are found among the words.
    pub fn ids(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((before, id, after)) = split_at_special(rest) {
            self.push_words(before, &mut ids);
            ids.push(id);
            rest = after;
        }
        self.push_words(rest, &mut ids);
        ids
    }

    fn push_words(&self, text: &str, ids: &mut Vec<u32>) {
        for word in self.word.find_iter(&normalize(text)) {
            match SPECIALS.iter().find(|(special, _)| *special == word.as_str()) {
                Some(&(_, id)) => ids.push(id),
                None => ids.extend(self.bpe.encode(word.as_str())),
            }
        }
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

/// The text before the first special token, its id, and the text behind it.
fn split_at_special(text: &str) -> Option<(&str, u32, &str)> {
    // One search for both, or many of one kind would take quadratic time to miss the other.
    text.match_indices("<|").find_map(|(at, _)| {
        let (before, rest) = text.split_at(at);
        SPECIALS.iter().find_map(|&(special, id)| Some((before, id, rest.strip_prefix(special)?)))
    })
}
