//! Rows become chunks: vectors that do not fit the encoder leave, the others go into one table.

use std::collections::BTreeMap;

use protocol::{Chunk, Component, ComponentTokens, VectorAt, VectorTable};

use crate::{
    embedding::Embeddings,
    error::{PromptError, Warning},
    limits::Limits,
    rows::{NamedVectors, Rows, rows},
    token::{END, START, Token, VectorRef, WeightedToken, pad_id},
    tokenizer::Tokenizer,
};

/// The encoder that tokens are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoder {
    /// Decides the padding, and which vectors of a file are meant.
    pub component: Component,
    /// Elements of one vector: 768 for `clip_l`, 1280 for `clip_g`, except in test models.
    pub width: usize,
    /// Positions of one chunk: [`CHUNK_TOKENS`](protocol::CHUNK_TOKENS), or more for a LongCLIP.
    pub chunk_tokens: usize,
}

/// A prompt ready for a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokenized {
    /// Chunks of exactly [`Encoder::chunk_tokens`] positions, at least one.
    pub tokens: ComponentTokens,
    /// What had no effect.
    pub warnings: Vec<Warning>,
}

/// Turns `text` into chunks; without a directory `embedding:` is ordinary text.
///
/// # Errors
/// See [`PromptError`].
pub fn tokenize(
    tokenizer: &Tokenizer,
    text: &str,
    encoder: Encoder,
    directory: Option<&dyn Embeddings>,
    limits: Limits,
) -> Result<Tokenized, PromptError> {
    Ok(rows(tokenizer, text, encoder, directory, limits)?.into_tokenized())
}

/// The chunk of an empty prompt: start, end, and padding up to `chunk_tokens`.
pub fn empty_chunk(component: Component, chunk_tokens: usize) -> Chunk {
    let mut ids = vec![START, END];
    ids.resize(chunk_tokens, pad_id(component));
    Chunk { ids, ..Chunk::default() }
}

impl Rows {
    /// The chunks for the encoder.
    ///
    /// As in ComfyUI, a vector of another width leaves its row: the tokens behind it move up, and a
    /// pad is added at the end. Weights do not move with their tokens.
    pub fn into_tokenized(self) -> Tokenized {
        let Self { encoder, rows, embeddings, mut warnings } = self;
        let Encoder { component, width, .. } = encoder;
        let mut table = TableBuilder { embeddings: &embeddings, width, ..TableBuilder::default() };
        let pad = pad_id(component);
        let chunks = rows.iter().map(|row| chunk(row, &mut table, pad)).collect();
        let vectors = table.finish();
        warnings.extend(
            embeddings.into_iter().filter(|embedding| embedding.vectors.width != width).map(
                |NamedVectors { name, vectors: VectorTable { width: got, .. } }| {
                    Warning::WrongWidth { name, component, got, want: width }
                },
            ),
        );
        Tokenized { tokens: ComponentTokens { chunks, vectors }, warnings }
    }
}

/// Collects each vector that is used once.
#[derive(Default)]
struct TableBuilder<'a> {
    embeddings: &'a [NamedVectors],
    width: usize,
    /// Row of each vector in the table, by embedding and row there.
    rows: BTreeMap<(usize, usize), u32>,
    elements: Vec<f32>,
}

impl TableBuilder<'_> {
    /// The row of a vector in the table, or nothing if its width is wrong.
    fn row(&mut self, VectorRef { embedding, row }: VectorRef) -> Option<u32> {
        let vectors = &self.embeddings[embedding].vectors;
        if vectors.width != self.width {
            return None;
        }
        let new = u32::try_from(self.rows.len()).expect("a prompt names fewer vectors than that");
        Some(*self.rows.entry((embedding, row)).or_insert_with(|| {
            self.elements.extend_from_slice(vectors.row(row).unwrap_or_default());
            new
        }))
    }

    fn finish(self) -> VectorTable {
        let width = if self.elements.is_empty() { 0 } else { self.width };
        VectorTable { width, elements: self.elements }
    }
}

#[expect(clippy::float_cmp, reason = "a weight is left out only if it is exactly 1")]
fn chunk(row: &[WeightedToken], table: &mut TableBuilder<'_>, pad: u32) -> Chunk {
    let mut chunk = Chunk::default();
    for &WeightedToken { token, .. } in row {
        match token {
            Token::Id(id) => chunk.ids.push(id),
            Token::Vector(vector) => {
                if let Some(row) = table.row(vector) {
                    let position = u32::try_from(chunk.positions()).expect("a chunk is short");
                    chunk.vectors.push(VectorAt { position, row });
                }
            }
        }
    }
    chunk.ids.resize(row.len() - chunk.vectors.len(), pad);
    if row.iter().any(|token| token.weight != 1.0) {
        chunk.weights = row.iter().map(|token| token.weight).collect();
    }
    chunk
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use protocol::CHUNK_TOKENS;

    use super::*;
    use crate::embedding::EmbeddingFailure;

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

    #[test]
    fn an_empty_prompt_is_the_empty_chunk() {
        for component in [Component::ClipL, Component::ClipG] {
            let made = make("", component);
            assert_eq!(made.tokens.chunks, [empty_chunk(component, CHUNK_TOKENS)]);
            assert_eq!(made.tokens.vectors, VectorTable::default());
        }
        assert_eq!(empty_chunk(Component::ClipL, CHUNK_TOKENS).ids[..3], [49406, 49407, 49407]);
        assert_eq!(empty_chunk(Component::ClipG, CHUNK_TOKENS).ids[..3], [49406, 49407, 0]);
    }

    #[test]
    fn a_long_chunk_is_one_where_the_ordinary_length_needs_two() {
        let text = "cat ".repeat(100);
        let make = |chunk_tokens| {
            let encoder = Encoder { component: Component::ClipL, width: 2, chunk_tokens };
            tokenize(&TOKENIZER, &text, encoder, None, Limits::default()).unwrap().tokens.chunks
        };
        assert_eq!(make(CHUNK_TOKENS).len(), 2);
        let [long] = &make(248)[..] else { panic!("100 tokens fit 248 positions") };
        assert_eq!((long.positions(), long.ids[101], long.ids[247]), (248, END, END));
        assert_eq!(long.ids[100], long.ids[1]);
    }

    #[test]
    fn weights_are_left_out_if_all_are_one() {
        assert!(make("a (cat:1.0)", Component::ClipL).tokens.chunks[0].weights.is_empty());
        let weights = &make("a (cat:1.5)", Component::ClipL).tokens.chunks[0].weights;
        assert_eq!((weights.len(), weights[1], weights[2]), (77, 1.0, 1.5));
    }

    #[test]
    fn vectors_keep_their_place_and_share_rows() {
        let made = make("a embedding:fits b embedding:fits", Component::ClipL);
        let [chunk] = &made.tokens.chunks[..] else { panic!("one chunk is enough") };
        assert_eq!(chunk.ids[..4], [49406, 320, 321, 49407]);
        assert_eq!(chunk.ids.len(), 73);
        let at = |position, row| VectorAt { position, row };
        assert_eq!(chunk.vectors, [at(2, 0), at(3, 1), at(5, 0), at(6, 1)]);
        let expected = VectorTable { width: 2, elements: vec![1.0, 2.0, 3.0, 4.0] };
        assert_eq!(made.tokens.vectors, expected);
        assert_eq!(made.warnings, []);
    }

    #[test]
    fn two_embeddings_have_rows_of_their_own() {
        let made = make("embedding:fits embedding:also", Component::ClipL);
        let rows: Vec<_> = made.tokens.chunks[0].vectors.iter().map(|vector| vector.row).collect();
        assert_eq!(rows, [0, 1, 2]);
        assert_eq!(made.tokens.vectors.elements, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn a_vector_of_the_wrong_width_gives_way_to_a_pad() {
        let made = make("a embedding:wide embedding:fits (b:0.5)", Component::ClipG);
        let [chunk] = &made.tokens.chunks[..] else { panic!("one chunk is enough") };
        assert_eq!(chunk.ids[..5], [49406, 320, 321, 49407, 0]);
        assert_eq!((chunk.positions(), chunk.ids.len()), (77, 75));
        assert_eq!(chunk.vectors[0], VectorAt { position: 2, row: 0 });
        // The weight stays where the token was before it moved up.
        assert_eq!(chunk.weights[4..7], [1.0, 0.5, 1.0]);
        let (name, component) = ("wide".to_owned(), Component::ClipG);
        assert_eq!(made.warnings, [Warning::WrongWidth { name, component, got: 3, want: 2 }]);
    }

    #[test]
    fn the_weight_of_a_dropped_vector_still_weighs_its_position() {
        let made = make("(embedding:wide:1.4) b", Component::ClipL);
        assert_eq!(made.tokens.chunks[0].ids[..2], [49406, 321]);
        assert_eq!(made.tokens.chunks[0].weights[..3], [1.0, 1.4, 1.0]);
    }

    proptest! {
        #[test]
        fn any_prompt_gives_valid_chunks_or_an_error(
            prompt in any::<String>().boxed().prop_union(
                r"([()\\:, a]|embedding:|embedding:fits|embedding:wide|1.5|[a-z]{9} ){0,90}".boxed(),
            ),
            chunk_tokens in CHUNK_TOKENS..260,
        ) {
            let encoder = Encoder { component: Component::ClipG, width: 2, chunk_tokens };
            let limits = Limits { bracket_levels_max: 6, chunks_max: 3, ..Limits::default() };
            if let Ok(made) = tokenize(&TOKENIZER, &prompt, encoder, Some(&Shelf), limits) {
                prop_assert!((1..=3).contains(&made.tokens.chunks.len()));
                for chunk in &made.tokens.chunks {
                    check(chunk, chunk_tokens, &made.tokens.vectors)?;
                }
            }
        }
    }

    struct Shelf;

    impl Embeddings for Shelf {
        fn find(&self, name: &str, _: Component) -> Result<Option<VectorTable>, EmbeddingFailure> {
            Ok(match name {
                "fits" => Some(VectorTable { width: 2, elements: vec![1.0, 2.0, 3.0, 4.0] }),
                "also" => Some(VectorTable { width: 2, elements: vec![5.0, 6.0] }),
                "wide" => Some(VectorTable { width: 3, elements: vec![9.0; 3] }),
                _ => None,
            })
        }
    }

    fn make(prompt: &str, component: Component) -> Tokenized {
        let encoder = Encoder { component, width: 2, chunk_tokens: CHUNK_TOKENS };
        tokenize(&TOKENIZER, prompt, encoder, Some(&Shelf), Limits::default()).unwrap()
    }

    fn check(chunk: &Chunk, chunk_tokens: usize, table: &VectorTable) -> Result<(), TestCaseError> {
        prop_assert_eq!(chunk.positions(), chunk_tokens);
        prop_assert!(chunk.weights.is_empty() || chunk.weights.len() == chunk_tokens);
        prop_assert!(chunk.weights.iter().all(|weight| weight.is_finite()));
        prop_assert!(chunk.vectors.is_sorted_by_key(|vector| vector.position));
        for vector in &chunk.vectors {
            prop_assert!((vector.position as usize) < chunk_tokens);
            prop_assert!(table.row(vector.row as usize).is_some());
        }
        Ok(())
    }
}
