//! Rows of 77 tokens, as ComfyUI's `tokenize` lists them, and how groups fill them.
//!
//! A row is: start, at most 75 tokens, end, padding. Rows do not know the width of an encoder: a
//! vector that fits none still has its place here, see [`tokenized`](crate::tokenized).

use protocol::{CHUNK_TOKENS, Component, VectorTable};

use crate::{
    embedding::Embeddings,
    error::{Counted, PromptError, Warning},
    group::{Group, Grouped, Grouper},
    limits::Limits,
    syntax::segments,
    token::{END, START, WeightedToken, pad_id},
    tokenizer::Tokenizer,
};

/// Tokens of a row between start and end.
pub(crate) const BODY_TOKENS: usize = CHUNK_TOKENS - 2;

/// A group of fewer tokens is never cut: it opens a new row instead.
const LARGE_GROUP_TOKENS: usize = 8;

/// A prompt as rows of tokens, before the width of the encoder matters.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// The encoder that they are for.
    pub component: Component,
    /// At least one row, each of [`CHUNK_TOKENS`] tokens.
    pub rows: Vec<Vec<WeightedToken>>,
    /// The embeddings that the tokens refer to, in order of first use.
    pub embeddings: Vec<NamedVectors>,
    /// What had no effect.
    pub warnings: Vec<Warning>,
}

/// The vectors of one embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedVectors {
    /// The name that found them.
    pub name: String,
    /// At least one vector.
    pub vectors: VectorTable,
}

/// Turns `text` into the rows of one encoder; without a directory `embedding:` is ordinary text.
///
/// # Errors
/// See [`PromptError`].
pub fn rows(
    tokenizer: &Tokenizer,
    text: &str,
    component: Component,
    directory: Option<&dyn Embeddings>,
    limits: Limits,
) -> Result<Rows, PromptError> {
    let (value, limit) = (text.len(), limits.prompt_bytes_max);
    if value > limit {
        return Err(PromptError::TooLarge { counted: Counted::Bytes, value, limit });
    }
    let mut grouper = Grouper::new(tokenizer, component, directory, limits);
    for segment in segments(text, limits.bracket_levels_max)? {
        grouper.push(&segment)?;
    }
    let Grouped { groups, embeddings, warnings } = grouper.finish();
    let rows = fill(&groups, pad_id(component));
    let (value, limit) = (rows.len(), limits.chunks_max);
    if value > limit {
        return Err(PromptError::TooLarge { counted: Counted::Chunks, value, limit });
    }
    Ok(Rows { component, rows, embeddings, warnings })
}

/// Lays the groups out in rows.
fn fill(groups: &[Group], pad: u32) -> Vec<Vec<WeightedToken>> {
    let mut rows = Vec::new();
    let mut row = open();
    for group in groups {
        let is_large = group.len() >= LARGE_GROUP_TOKENS;
        let mut rest = group.as_slice();
        while rest.len() > room(&row) {
            // Zero is possible for a large group, too: the row is then closed as it is.
            let taken = if is_large { room(&row) } else { 0 };
            row.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            close(&mut row, pad);
            rows.push(std::mem::replace(&mut row, open()));
        }
        row.extend_from_slice(rest);
    }
    close(&mut row, pad);
    rows.push(row);
    rows
}

/// A row that has nothing but its start.
fn open() -> Vec<WeightedToken> {
    let mut row = Vec::with_capacity(CHUNK_TOKENS);
    row.push(WeightedToken::plain(START));
    row
}

/// Tokens that a row can still take, with a place kept for its end.
fn room(row: &[WeightedToken]) -> usize {
    CHUNK_TOKENS - 1 - row.len()
}

fn close(row: &mut Vec<WeightedToken>, pad: u32) {
    row.push(WeightedToken::plain(END));
    row.resize(CHUNK_TOKENS, WeightedToken::plain(pad));
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::token::Token;

    const PAD: u32 = 0;

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

    #[test]
    fn no_text_is_one_row_of_padding() {
        let rows = fill(&[], PAD);
        assert_eq!(ids(&rows), [[&[START, END][..], &[PAD; 75]].concat()]);
        assert_eq!(fill(&[vec![]], PAD), rows);
    }

    #[test]
    fn seventy_five_tokens_fill_a_row_and_one_more_opens_the_next() {
        assert_eq!(texts(&fill(&[group(75)], PAD)), [75]);
        assert_eq!(texts(&fill(&[group(76)], PAD)), [75, 1]);
        assert_eq!(texts(&fill(&[group(151)], PAD)), [75, 75, 1]);
    }

    #[test]
    fn a_group_of_seven_moves_to_the_next_row_whole() {
        assert_eq!(texts(&fill(&[group(69), group(7)], PAD)), [69, 7]);
        assert_eq!(texts(&fill(&[group(68), group(7)], PAD)), [75]);
    }

    #[test]
    fn a_group_of_eight_is_cut_where_the_row_ends() {
        assert_eq!(texts(&fill(&[group(70), group(8)], PAD)), [75, 3]);
    }

    #[test]
    fn what_is_left_of_a_large_group_stays_large() {
        // One token of the large group is left; the next group must still find it in the row.
        assert_eq!(texts(&fill(&[group(68), group(8), group(3)], PAD)), [75, 4]);
    }

    #[test]
    fn a_large_group_closes_a_full_row_as_it_is() {
        assert_eq!(texts(&fill(&[group(75), group(8)], PAD)), [75, 8]);
        assert_eq!(texts(&fill(&[group(75), group(2)], PAD)), [75, 2]);
    }

    #[test]
    fn start_end_and_padding_weigh_one() {
        let rows = fill(&[vec![WeightedToken { token: Token::Id(7), weight: 0.5 }]], PAD);
        let weights: Vec<_> = rows[0].iter().map(|token| token.weight).collect();
        assert_eq!(weights[..4], [1.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn a_prompt_is_bounded_in_bytes_and_chunks() {
        let make = |text: &str, limits| rows(&TOKENIZER, text, Component::ClipL, None, limits);

        let limits = Limits { prompt_bytes_max: 4, ..Limits::default() };
        assert!(make("cats", limits).is_ok());
        let error = make("a cat", limits).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the prompt has `5` bytes, the limit is `4`: shorten the prompt"
        );

        let limits = Limits { chunks_max: 2, ..Limits::default() };
        assert!(make(&"cat ".repeat(150), limits).is_ok());
        let error = make(&"cat ".repeat(151), limits).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the prompt has `3` chunks, the limit is `2`: shorten the prompt"
        );
    }

    #[test]
    fn chunks_that_only_padding_adds_count_as_well() {
        let limits = Limits { chunks_max: 2, ..Limits::default() };
        let make = |sevens: usize| {
            let text = format!("{}{}", "cat ".repeat(72), "(c c c c c c c)".repeat(sevens));
            rows(&TOKENIZER, &text, Component::ClipL, None, limits)
        };
        assert_eq!(make(10).unwrap().rows.len(), 2);
        // 149 tokens would fit into two rows, if groups of seven could be cut.
        let error = make(11).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the prompt has `3` chunks, the limit is `2`: shorten the prompt"
        );
    }

    proptest! {
        #[test]
        fn rows_are_whole_and_hold_the_groups_in_order(
            sizes in prop::collection::vec(0_usize..200, 0..12),
        ) {
            let groups: Vec<_> = sizes.into_iter().map(group).collect();
            let rows = fill(&groups, PAD);
            prop_assert!(rows.iter().all(|row| row.len() == CHUNK_TOKENS));
            prop_assert!(rows.iter().all(|row| row[0] == WeightedToken::plain(START)));
            let text: Vec<_> = rows.iter().flat_map(|row| &row[1..]).filter(|t| is_text(t)).collect();
            prop_assert_eq!(text, groups.iter().flatten().collect::<Vec<_>>());
        }

        #[test]
        fn any_prompt_gives_rows_of_its_own_ids(text in r"[a-z(): ,1.é漢]{0,400}") {
            // Padding for `clip_l` is the end token, which this text cannot contain.
            let made = rows(&TOKENIZER, &text, Component::ClipL, None, Limits::default()).unwrap();
            let segments = segments(&text, 256).unwrap();
            let expected: Vec<_> =
                segments.iter().flat_map(|segment| TOKENIZER.ids(&segment.text)).collect();
            let mut actual = ids(&made.rows).concat();
            actual.retain(|&id| id < START);
            prop_assert_eq!(actual, expected);
        }
    }

    /// A group of ids that are neither start, end nor padding.
    fn group(tokens: usize) -> Group {
        (1..).take(tokens).map(WeightedToken::plain).collect()
    }

    fn is_text(token: &WeightedToken) -> bool {
        ![START, END, PAD].map(Token::Id).contains(&token.token)
    }

    /// How many tokens of text each row has, after checking its start, end and length.
    #[track_caller]
    fn texts(rows: &[Vec<WeightedToken>]) -> Vec<usize> {
        let count = |row: &Vec<WeightedToken>| {
            let text = row[1..].iter().take_while(|token| is_text(token)).count();
            assert_eq!((row.len(), row[0]), (CHUNK_TOKENS, WeightedToken::plain(START)));
            assert_eq!(row[text + 1], WeightedToken::plain(END));
            assert!(row[text + 2..].iter().all(|&token| token == WeightedToken::plain(PAD)));
            text
        };
        rows.iter().map(count).collect()
    }

    fn ids(rows: &[Vec<WeightedToken>]) -> Vec<Vec<u32>> {
        let id = |token: &WeightedToken| match token.token {
            Token::Id(id) => id,
            Token::Vector(_) => u32::MAX,
        };
        rows.iter().map(|row| row.iter().map(id).collect()).collect()
    }
}
