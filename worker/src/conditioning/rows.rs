//! Tokens as rows of an encoder: checked, and laid out one after the other.

use protocol::{Chunk, Component, ComponentTokens, VectorTable};

use crate::model::TextConfig;

/// Closes the text of every chunk; the pooled output is taken at the first one.
const END_ID: u32 = 49407;

/// Tokens that an encoder cannot take.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("prompt {prompt}, `{component}`: {problem}")]
pub struct InvalidTokens {
    /// Index of the prompt in its request.
    pub prompt: usize,
    /// The encoder.
    pub component: Component,
    /// What is wrong.
    pub problem: TokenProblem,
}

/// What is wrong with tokens.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TokenProblem {
    /// There is nothing to encode.
    #[error("no chunks: an empty prompt is one chunk of start, end and padding")]
    NoChunks,
    /// A chunk is not as long as the encoder.
    #[error("chunk {chunk} has {found} positions: expected {expected}")]
    Positions {
        /// Index of the chunk.
        chunk: usize,
        /// Ids and vectors in it.
        found: usize,
        /// Positions of the encoder.
        expected: usize,
    },
    /// There is not one weight for every position.
    #[error("chunk {chunk} has {found} weights: expected {expected}, or none")]
    Weights {
        /// Index of the chunk.
        chunk: usize,
        /// Weights in it.
        found: usize,
        /// Positions of the encoder.
        expected: usize,
    },
    /// A weight is not a number to multiply with.
    #[error("chunk {chunk} has weight `{weight}` at position {position}: expected a finite number")]
    Weight {
        /// Index of the chunk.
        chunk: usize,
        /// Index of the weight.
        position: usize,
        /// The weight.
        weight: f64,
    },
    /// An id is beyond the vocabulary.
    #[error("chunk {chunk} has id {id}: the vocabulary has {vocab} ids")]
    Id {
        /// Index of the chunk.
        chunk: usize,
        /// The id.
        id: u32,
        /// Ids that the encoder knows.
        vocab: usize,
    },
    /// Vectors are not in ascending order of their positions, or beyond the chunk.
    #[error(
        "chunk {chunk} has a vector at position {position}: expected ascending positions below \
         {positions}"
    )]
    VectorPosition {
        /// Index of the chunk.
        chunk: usize,
        /// The position.
        position: u32,
        /// Positions of the encoder.
        positions: usize,
    },
    /// A chunk refers to a vector that the table does not have.
    #[error("chunk {chunk} refers to vector {row}: the table has {rows}")]
    VectorRow {
        /// Index of the chunk.
        chunk: usize,
        /// The row.
        row: u32,
        /// Rows of the table.
        rows: usize,
    },
    /// The vectors are not as wide as the encoder's hidden state.
    #[error("vectors are {found} wide: expected {expected}")]
    VectorWidth {
        /// Elements of one vector.
        found: usize,
        /// Elements that the encoder takes.
        expected: usize,
    },
    /// The table is not a whole number of vectors, or has an element that is not finite.
    #[error("the table of vectors must hold whole vectors of finite numbers")]
    VectorTable,
}

/// Checks the tokens of one component against its encoder.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(tokens: &ComponentTokens, config: &TextConfig) -> Result<(), TokenProblem> {
    if tokens.chunks.is_empty() {
        return Err(TokenProblem::NoChunks);
    }
    check_table(&tokens.vectors, config)?;
    for (index, chunk) in tokens.chunks.iter().enumerate() {
        check_chunk(index, chunk, &tokens.vectors, config)?;
    }
    Ok(())
}

fn check_table(table: &VectorTable, config: &TextConfig) -> Result<(), TokenProblem> {
    if table.elements.is_empty() {
        return Ok(());
    }
    if table.width != config.hidden {
        return Err(TokenProblem::VectorWidth { found: table.width, expected: config.hidden });
    }
    let is_whole = table.elements.len().is_multiple_of(table.width);
    if !is_whole || !table.elements.iter().all(|element| element.is_finite()) {
        return Err(TokenProblem::VectorTable);
    }
    Ok(())
}

fn check_chunk(
    index: usize,
    chunk: &Chunk,
    table: &VectorTable,
    config: &TextConfig,
) -> Result<(), TokenProblem> {
    let expected = config.positions;
    if chunk.positions() != expected {
        let found = chunk.positions();
        return Err(TokenProblem::Positions { chunk: index, found, expected });
    }
    if !chunk.weights.is_empty() && chunk.weights.len() != expected {
        let found = chunk.weights.len();
        return Err(TokenProblem::Weights { chunk: index, found, expected });
    }
    #[expect(clippy::cast_possible_truncation, reason = "whether f32 holds it is the question")]
    let bad = chunk.weights.iter().position(|&weight| !(weight as f32).is_finite());
    if let Some(position) = bad {
        let weight = chunk.weights[position];
        return Err(TokenProblem::Weight { chunk: index, position, weight });
    }
    if let Some(&id) = chunk.ids.iter().find(|id| **id as usize >= config.vocab) {
        return Err(TokenProblem::Id { chunk: index, id, vocab: config.vocab });
    }
    let mut next = 0;
    for vector in &chunk.vectors {
        let at = vector.position as usize;
        if at < next || at >= config.positions {
            let (position, positions) = (vector.position, config.positions);
            return Err(TokenProblem::VectorPosition { chunk: index, position, positions });
        }
        if vector.row as usize >= table.rows() {
            let (row, rows) = (vector.row, table.rows());
            return Err(TokenProblem::VectorRow { chunk: index, row, rows });
        }
        next = at + 1;
    }
    Ok(())
}

/// One row of an encoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    chunk: &'a Chunk,
    table: Option<&'a VectorTable>,
    /// Whether the pooled output of its prompt is taken from this row.
    pub(super) is_first: bool,
}

impl<'a> Row<'a> {
    /// One id per position; 0 where a vector goes.
    pub(super) fn ids(&self) -> Vec<u32> {
        let mut ids = self.chunk.ids.clone();
        for vector in &self.chunk.vectors {
            ids.insert((vector.position as usize).min(ids.len()), 0);
        }
        ids
    }

    /// Position and elements of every vector.
    pub(super) fn vectors(&self) -> impl Iterator<Item = (usize, &'a [f32])> {
        let table = self.table;
        self.chunk.vectors.iter().filter_map(move |vector| {
            Some((vector.position as usize, table?.row(vector.row as usize)?))
        })
    }

    /// Where the pooled output is: ids up to and including the first end token, and all vectors,
    /// are counted; the position is one less.
    pub(super) fn pooled_position(&self) -> usize {
        let end = self.chunk.ids.iter().position(|id| *id == END_ID);
        let ids = end.map_or(self.chunk.ids.len(), |end| end + 1);
        (ids + self.chunk.vectors.len()).saturating_sub(1)
    }
}

/// The rows of several prompts for one component: chunk after chunk, prompt after prompt. When any
/// prompt is weighted, `empty` is the last; it is nothing when weights are not applied.
pub(super) fn rows_of<'a>(
    prompts: &[&'a ComponentTokens],
    empty: Option<&'a Chunk>,
) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = prompts
        .iter()
        .flat_map(|tokens| {
            tokens.chunks.iter().enumerate().map(|(index, chunk)| Row {
                chunk,
                table: Some(&tokens.vectors),
                is_first: index == 0,
            })
        })
        .collect();
    if let Some(chunk) = empty
        && rows.iter().any(|row| row.chunk.is_weighted())
    {
        rows.push(Row { chunk, table: None, is_first: false });
    }
    rows
}

#[cfg(test)]
mod tests {
    use protocol::VectorAt;

    use super::*;
    use crate::model::Activation;

    #[test]
    fn whatever_an_encoder_cannot_take_is_named() {
        let config = config();
        let problem = |change: fn(&mut ComponentTokens)| {
            let mut tokens = valid();
            change(&mut tokens);
            check(&tokens, &config).unwrap_err().to_string()
        };

        assert_eq!(check(&valid(), &config), Ok(()));
        assert!(problem(|t| t.chunks.clear()).starts_with("no chunks"));
        assert_eq!(
            problem(|t| t.chunks[0].ids.truncate(3)),
            "chunk 0 has 4 positions: expected 77"
        );
        assert!(problem(|t| t.chunks[0].weights = vec![1.0; 3]).contains("3 weights"));
        assert!(problem(|t| t.chunks[0].weights = vec![f64::NAN; 77]).contains("`NaN`"));
        assert!(problem(|t| t.chunks[0].weights = vec![1e300; 77]).contains("finite"));
        assert_eq!(
            problem(|t| t.chunks[0].ids[5] = 49408),
            "chunk 0 has id 49408: the vocabulary has 49408 ids"
        );
        assert!(problem(|t| t.chunks[0].vectors[0].position = 77).contains("position 77"));
        assert_eq!(
            problem(|t| t.chunks[0].vectors[0].row = 1),
            "chunk 0 refers to vector 1: the table has 1"
        );
        assert_eq!(
            problem(|t| t.vectors = VectorTable { width: 3, elements: vec![0.0; 3] }),
            "vectors are 3 wide: expected 4"
        );
        assert!(problem(|t| t.vectors.elements[0] = f32::INFINITY).contains("finite"));
    }

    #[test]
    fn a_chunk_is_as_long_as_the_encoder() {
        let config = TextConfig { positions: 248, ..config() };
        let long = || {
            let mut tokens = valid();
            tokens.chunks[0].ids = vec![END_ID; 247];
            tokens.chunks[0].vectors[0].position = 247;
            tokens
        };
        let problem = |tokens: &ComponentTokens| check(tokens, &config).unwrap_err().to_string();

        assert_eq!(check(&long(), &config), Ok(()));
        assert_eq!(problem(&valid()), "chunk 0 has 77 positions: expected 248");
        let mut tokens = long();
        tokens.chunks[0].weights = vec![1.0; 77];
        assert_eq!(problem(&tokens), "chunk 0 has 77 weights: expected 248, or none");
        let mut tokens = long();
        tokens.chunks[0].vectors[0].position = 248;
        assert!(problem(&tokens).ends_with("ascending positions below 248"));
    }

    #[test]
    fn the_pooled_position_counts_ids_to_the_first_end_token_and_every_vector() {
        let vectors = [VectorAt { position: 1, row: 0 }];
        for (ids, vectors, expected) in [
            (vec![49406, END_ID, END_ID], &vectors[..0], 1),
            (vec![49406, END_ID, END_ID], &vectors[..], 2),
            (vec![49406, 5, 6], &vectors[..0], 2),
        ] {
            let chunk = Chunk { ids, vectors: vectors.to_vec(), weights: Vec::new() };
            let row = Row { chunk: &chunk, table: None, is_first: true };
            assert_eq!(row.pooled_position(), expected);
        }
    }

    #[test]
    fn the_empty_prompt_is_encoded_only_where_a_weight_asks_for_it() {
        let mut tokens = valid();
        let empty = prompt::empty_chunk(Component::ClipL, 77);
        let count = |tokens: &ComponentTokens, empty| rows_of(&[tokens, tokens], empty).len();
        assert_eq!(count(&tokens, Some(&empty)), 2);
        tokens.chunks[0].weights = vec![1.1; 77];
        assert_eq!(count(&tokens, Some(&empty)), 3);
        assert_eq!(count(&tokens, None), 2);
    }

    fn valid() -> ComponentTokens {
        let chunk = Chunk {
            ids: vec![END_ID; 76],
            weights: Vec::new(),
            vectors: vec![VectorAt { position: 2, row: 0 }],
        };
        let vectors = VectorTable { width: 4, elements: vec![0.5; 4] };
        ComponentTokens { chunks: vec![chunk], vectors }
    }

    fn config() -> TextConfig {
        TextConfig {
            hidden: 4,
            layers: 1,
            intermediate: 8,
            heads: 2,
            activation: Activation::Gelu,
            vocab: 49408,
            positions: 77,
            projection: None,
        }
    }
}
