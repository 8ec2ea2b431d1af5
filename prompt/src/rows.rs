//! Rows of tokens, as ComfyUI's `tokenize` lists them, and how groups fill them.
//!
//! A row is as long as the encoder's table of positions, 77 unless it is a LongCLIP: start, tokens
//! of the prompt, end, padding. The width of the encoder does not matter here: a vector that fits
//! none still has its place, see [`tokenized`](crate::tokenized).

use protocol::{CHUNK_TOKENS, VectorTable};

use crate::{
    embedding::Embeddings,
    error::{Counted, PromptError, Warning},
    group::{Group, Grouped, Grouper},
    limits::Limits,
    syntax::segments,
    token::{END, START, WeightedToken, pad_id},
    tokenized::Encoder,
    tokenizer::Tokenizer,
};

/// A group of fewer tokens is never cut: it opens a new row instead.
const LARGE_GROUP_TOKENS: usize = 8;

/// A prompt as rows of tokens, before the width of the encoder matters.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// The encoder that they are for.
    pub encoder: Encoder,
    /// At least one row, each of [`Encoder::chunk_tokens`] tokens.
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
    encoder: Encoder,
    directory: Option<&dyn Embeddings>,
    limits: Limits,
) -> Result<Rows, PromptError> {
    let Encoder { component, chunk_tokens, .. } = encoder;
    if chunk_tokens < CHUNK_TOKENS {
        return Err(PromptError::ShortChunks { component, chunk_tokens });
    }
    let (value, limit) = (text.len(), limits.prompt_bytes_max);
    if value > limit {
        return Err(PromptError::TooLarge { counted: Counted::Bytes, value, limit });
    }
    let mut grouper = Grouper::new(tokenizer, encoder, directory, limits);
    for segment in segments(text, limits.bracket_levels_max)? {
        grouper.push(&segment)?;
    }
    let Grouped { groups, embeddings, warnings } = grouper.finish();
    let rows = Filler { row_tokens: chunk_tokens, pad: pad_id(component) }.fill(&groups);
    let (value, limit) = (rows.len(), limits.chunks_max);
    if value > limit {
        return Err(PromptError::TooLarge { counted: Counted::Chunks, value, limit });
    }
    Ok(Rows { encoder, rows, embeddings, warnings })
}

/// Lays groups out in rows.
#[derive(Debug, Clone, Copy)]
struct Filler {
    /// Tokens of a row; at least [`CHUNK_TOKENS`], so that a small group always fits an open one.
    row_tokens: usize,
    pad: u32,
}

impl Filler {
    fn fill(self, groups: &[Group]) -> Vec<Vec<WeightedToken>> {
        let mut rows = Vec::new();
        let mut row = self.open();
        for group in groups {
            let is_large = group.len() >= LARGE_GROUP_TOKENS;
            let mut rest = group.as_slice();
            while rest.len() > self.room(&row) {
                // Zero is possible for a large group, too: the row is then closed as it is.
                let taken = if is_large { self.room(&row) } else { 0 };
                row.extend_from_slice(&rest[..taken]);
                rest = &rest[taken..];
                self.close(&mut row);
                rows.push(std::mem::replace(&mut row, self.open()));
            }
            row.extend_from_slice(rest);
        }
        self.close(&mut row);
        rows.push(row);
        rows
    }

    /// A row that has nothing but its start.
    fn open(self) -> Vec<WeightedToken> {
        let mut row = Vec::with_capacity(self.row_tokens);
        row.push(WeightedToken::plain(START));
        row
    }

    /// Tokens that a row can still take, with a place kept for its end.
    fn room(self, row: &[WeightedToken]) -> usize {
        self.row_tokens - 1 - row.len()
    }

    fn close(self, row: &mut Vec<WeightedToken>) {
        row.push(WeightedToken::plain(END));
        row.resize(self.row_tokens, WeightedToken::plain(self.pad));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use protocol::Component;

    use super::*;
    use crate::token::Token;

    const PAD: u32 = 0;

    const CLIP_L: Encoder =
        Encoder { component: Component::ClipL, width: 768, chunk_tokens: CHUNK_TOKENS };

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

    #[test]
    fn no_text_is_one_row_of_padding() {
        let rows = fill(&[]);
        assert_eq!(ids(&rows), [[&[START, END][..], &[PAD; 75]].concat()]);
        assert_eq!(fill(&[vec![]]), rows);
    }

    #[test]
    fn seventy_five_tokens_fill_a_row_and_one_more_opens_the_next() {
        assert_eq!(texts(&fill(&[group(75)])), [75]);
        assert_eq!(texts(&fill(&[group(76)])), [75, 1]);
        assert_eq!(texts(&fill(&[group(151)])), [75, 75, 1]);
    }

    #[test]
    fn a_group_of_seven_moves_to_the_next_row_whole() {
        assert_eq!(texts(&fill(&[group(69), group(7)])), [69, 7]);
        assert_eq!(texts(&fill(&[group(68), group(7)])), [75]);
    }

    #[test]
    fn a_group_of_eight_is_cut_where_the_row_ends() {
        assert_eq!(texts(&fill(&[group(70), group(8)])), [75, 3]);
    }

    #[test]
    fn what_is_left_of_a_large_group_stays_large() {
        // One token of the large group is left; the next group must still find it in the row.
        assert_eq!(texts(&fill(&[group(68), group(8), group(3)])), [75, 4]);
    }

    #[test]
    fn a_large_group_closes_a_full_row_as_it_is() {
        assert_eq!(texts(&fill(&[group(75), group(8)])), [75, 8]);
        assert_eq!(texts(&fill(&[group(75), group(2)])), [75, 2]);
    }

    #[test]
    fn start_end_and_padding_weigh_one() {
        let rows = fill(&[vec![WeightedToken { token: Token::Id(7), weight: 0.5 }]]);
        let weights: Vec<_> = rows[0].iter().map(|token| token.weight).collect();
        assert_eq!(weights[..4], [1.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn a_longer_row_takes_more_and_keeps_small_groups_whole_all_the_same() {
        let long = Filler { row_tokens: 248, pad: PAD };
        let texts = |groups: &[Group]| texts_in(248, &long.fill(groups));
        assert_eq!(texts(&[]), [0]);
        assert_eq!(texts(&[group(246)]), [246]);
        assert_eq!(texts(&[group(247)]), [246, 1]);
        assert_eq!(texts(&[group(240), group(7)]), [240, 7]);
        assert_eq!(texts(&[group(241), group(8)]), [246, 3]);
        assert_eq!(texts(&[group(246), group(8)]), [246, 8]);
    }

    #[test]
    fn chunks_shorter_than_any_encoder_has_are_refused() {
        let encoder = Encoder { chunk_tokens: CHUNK_TOKENS - 1, ..CLIP_L };
        let error = rows(&TOKENIZER, "a", encoder, None, Limits::default()).unwrap_err();
        let expected = "chunks of `clip_l` have `76` tokens: expected at least `77`";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_prompt_is_bounded_in_bytes_and_chunks() {
        let make = |text: &str, limits| rows(&TOKENIZER, text, CLIP_L, None, limits);

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
            rows(&TOKENIZER, &text, CLIP_L, None, limits)
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
            row_tokens in CHUNK_TOKENS..300,
        ) {
            let groups: Vec<_> = sizes.into_iter().map(group).collect();
            let rows = Filler { row_tokens, pad: PAD }.fill(&groups);
            prop_assert!(rows.iter().all(|row| row.len() == row_tokens));
            prop_assert!(rows.iter().all(|row| row[0] == WeightedToken::plain(START)));
            let text: Vec<_> = rows.iter().flat_map(|row| &row[1..]).filter(|t| is_text(t)).collect();
            prop_assert_eq!(text, groups.iter().flatten().collect::<Vec<_>>());
        }

        #[test]
        fn any_prompt_gives_rows_of_its_own_ids(text in r"[a-z(): ,1.é漢]{0,400}") {
            // Padding for `clip_l` is the end token, which this text cannot contain.
            let made = rows(&TOKENIZER, &text, CLIP_L, None, Limits::default()).unwrap();
            let segments = segments(&text, 256).unwrap();
            let expected: Vec<_> =
                segments.iter().flat_map(|segment| TOKENIZER.ids(&segment.text)).collect();
            let mut actual = ids(&made.rows).concat();
            actual.retain(|&id| id < START);
            prop_assert_eq!(actual, expected);
        }
    }

    /// Rows of the ordinary length.
    fn fill(groups: &[Group]) -> Vec<Vec<WeightedToken>> {
        Filler { row_tokens: CHUNK_TOKENS, pad: PAD }.fill(groups)
    }

    /// A group of ids that are neither start, end nor padding.
    fn group(tokens: usize) -> Group {
        (1..).take(tokens).map(WeightedToken::plain).collect()
    }

    fn is_text(token: &WeightedToken) -> bool {
        ![START, END, PAD].map(Token::Id).contains(&token.token)
    }

    #[track_caller]
    fn texts(rows: &[Vec<WeightedToken>]) -> Vec<usize> {
        texts_in(CHUNK_TOKENS, rows)
    }

    /// How many tokens of text each row has, after checking its start, end and length.
    #[track_caller]
    fn texts_in(row_tokens: usize, rows: &[Vec<WeightedToken>]) -> Vec<usize> {
        let count = |row: &Vec<WeightedToken>| {
            let text = row[1..].iter().take_while(|token| is_text(token)).count();
            assert_eq!((row.len(), row[0]), (row_tokens, WeightedToken::plain(START)));
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
