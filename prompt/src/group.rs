//! Segments become groups: the runs of tokens that chunking keeps together if they are short.
//!
//! A piece of text is one group, and so are all vectors of one `embedding:name`. The name must
//! follow a space, a newline or the start of a segment; elsewhere it is ordinary text.

use std::collections::BTreeMap;

use protocol::VectorTable;

use crate::{
    embedding::Embeddings,
    error::{Counted, PromptError, Warning},
    limits::Limits,
    python,
    rows::NamedVectors,
    syntax::Segment,
    token::{Token, VectorRef, WeightedToken},
    tokenized::Encoder,
    tokenizer::Tokenizer,
};

/// What introduces the name of an embedding.
const IDENTIFIER: &str = "embedding:";

/// Tokens that belong together; may be empty.
pub(crate) type Group = Vec<WeightedToken>;

/// Collects the groups of one prompt, and what was found for its embedding names.
pub(crate) struct Grouper<'a> {
    tokenizer: &'a Tokenizer,
    encoder: Encoder,
    /// Without a directory `embedding:` has no meaning.
    directory: Option<&'a dyn Embeddings>,
    limits: Limits,
    groups: Vec<Group>,
    /// Tokens in all groups together.
    tokens: usize,
    /// Every name asked for, with its index among the embeddings if it was found.
    asked: BTreeMap<String, Option<usize>>,
    embeddings: Vec<NamedVectors>,
    warnings: Vec<Warning>,
}

/// All that the segments of a prompt became.
pub(crate) struct Grouped {
    pub(crate) groups: Vec<Group>,
    pub(crate) embeddings: Vec<NamedVectors>,
    pub(crate) warnings: Vec<Warning>,
}

impl<'a> Grouper<'a> {
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        encoder: Encoder,
        directory: Option<&'a dyn Embeddings>,
        limits: Limits,
    ) -> Self {
        Self {
            tokenizer,
            encoder,
            directory,
            limits,
            groups: Vec::new(),
            tokens: 0,
            asked: BTreeMap::new(),
            embeddings: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Adds the groups of one segment.
    pub(crate) fn push(&mut self, segment: &Segment) -> Result<(), PromptError> {
        for piece in pieces(&segment.text) {
            match (piece.strip_prefix(IDENTIFIER), self.directory) {
                (Some(rest), Some(directory)) => {
                    self.push_embedding(rest, segment.weight, directory)?;
                }
                _ => self.push_text(piece, segment.weight)?,
            }
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Grouped {
        let Self { groups, embeddings, warnings, .. } = self;
        Grouped { groups, embeddings, warnings }
    }

    fn push_text(&mut self, text: &str, weight: f64) -> Result<(), PromptError> {
        let ids = self.tokenizer.ids(text);
        self.push_group(ids.into_iter().map(Token::Id), weight)
    }

    /// Adds the vectors named by the first word of `rest`, and the words behind it as text.
    fn push_embedding(
        &mut self,
        rest: &str,
        weight: f64,
        directory: &dyn Embeddings,
    ) -> Result<(), PromptError> {
        let mut words = rest.split(python::is_space).filter(|word| !word.is_empty());
        let name = words.next().ok_or(PromptError::UnnamedEmbedding)?;
        let mut text = words.collect::<Vec<_>>().join(" ");
        let bare = name.trim_matches(',');
        let mut found = self.ask(name, directory)?;
        if found.is_none() && bare.len() < name.len() {
            found = if bare.is_empty() { None } else { self.ask(bare, directory)? };
            // ComfyUI cuts the name off by its length, also when the commas stand before it.
            let behind: String = name.chars().skip(bare.chars().count()).collect();
            text = format!("{behind} {text}");
        }
        match found {
            Some(embedding) => {
                let rows = self.embeddings[embedding].vectors.rows();
                let vector = |row| Token::Vector(VectorRef { embedding, row });
                self.push_group((0..rows).map(vector), weight)?;
            }
            None => self.warn_of_missing(if bare.is_empty() { name } else { bare }),
        }
        if text.is_empty() { Ok(()) } else { self.push_text(&text, weight) }
    }

    /// Looks a name up, once per prompt; gives the index of the embedding.
    fn ask(
        &mut self,
        name: &str,
        directory: &dyn Embeddings,
    ) -> Result<Option<usize>, PromptError> {
        if let Some(&known) = self.asked.get(name) {
            return Ok(known);
        }
        let limit = self.limits.embedding_names_max;
        if self.asked.len() >= limit {
            let (counted, value) = (Counted::EmbeddingNames, self.asked.len() + 1);
            return Err(PromptError::TooLarge { counted, value, limit });
        }
        let component = self.encoder.component;
        let vectors = directory.find(name, component).map_err(|source| {
            PromptError::UnreadableEmbedding { name: name.to_owned(), component, source }
        })?;
        let index = match vectors {
            Some(vectors) => Some(self.keep(name, vectors)?),
            None => None,
        };
        self.asked.insert(name.to_owned(), index);
        Ok(index)
    }

    fn keep(&mut self, name: &str, vectors: VectorTable) -> Result<usize, PromptError> {
        let (name, width, elements) = (name.to_owned(), vectors.width, vectors.elements.len());
        if elements == 0 || elements.checked_rem(width) != Some(0) {
            return Err(PromptError::MalformedEmbedding { name, elements, width });
        }
        self.embeddings.push(NamedVectors { name, vectors });
        Ok(self.embeddings.len() - 1)
    }

    fn warn_of_missing(&mut self, name: &str) {
        let warning = Warning::EmbeddingNotFound { name: name.to_owned() };
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Adds a group, unless the prompt cannot fit into its chunks any more.
    fn push_group(
        &mut self,
        tokens: impl ExactSizeIterator<Item = Token>,
        weight: f64,
    ) -> Result<(), PromptError> {
        self.tokens += tokens.len();
        // A chunk has a start and an end, too.
        let body_tokens = self.encoder.chunk_tokens - 2;
        let (value, limit) = (self.tokens.div_ceil(body_tokens), self.limits.chunks_max);
        if value > limit {
            return Err(PromptError::TooLarge { counted: Counted::Chunks, value, limit });
        }
        self.groups.push(tokens.map(|token| WeightedToken { token, weight }).collect());
        Ok(())
    }
}

/// Cuts `text` before every [`IDENTIFIER`] behind a space or newline, which is dropped.
fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices(IDENTIFIER) {
        if text[..at].ends_with([' ', '\n']) {
            pieces.push(&text[start..at - 1]);
            start = at;
        }
    }
    pieces.push(&text[start..]);
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use protocol::Component;

    use super::*;
    use crate::embedding::EmbeddingFailure;

    const CLIP_L: Encoder = Encoder { component: Component::ClipL, width: 2, chunk_tokens: 77 };

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);

    #[test]
    fn a_name_follows_a_space_a_newline_or_nothing() {
        assert_eq!(pieces("a embedding:x b"), ["a", "embedding:x b"]);
        assert_eq!(pieces("a\nembedding:x"), ["a", "embedding:x"]);
        assert_eq!(pieces("embedding:x embedding:y"), ["embedding:x", "embedding:y"]);
        assert_eq!(pieces("a  embedding:x"), ["a ", "embedding:x"]);
        assert_eq!(pieces(" embedding:x"), ["embedding:x"]);
        for whole in ["x,embedding:y", "a\tembedding:x", "a Embedding:x", "aembedding:x", "a"] {
            assert_eq!(pieces(whole), [whole]);
        }
        assert_eq!(pieces(""), [""; 0]);
    }

    #[test]
    fn an_embedding_is_one_group_and_the_text_behind_it_another() {
        let groups = [text("a"), vectors(0, 3), text("big cat")];
        check("a embedding:three big   cat", &groups, &[]);
        check("embedding:three", &[vectors(0, 3)], &[]);
        check("embedding:\n three\n", &[vectors(0, 3)], &[]);
        check("embedding:dir/one\u{1c}x", &[vectors(0, 1), text("x")], &[]);
    }

    #[test]
    fn an_embedding_named_twice_is_asked_for_once() {
        let mut grouper = grouper(Limits { embedding_names_max: 2, ..Limits::default() });
        grouper.push(&segment("embedding:three embedding:nope embedding:three")).unwrap();
        assert_eq!(grouper.embeddings.len(), 1);
        let error = grouper.push(&segment("embedding:more")).unwrap_err();
        let expected = "the prompt has `3` embedding names, the limit is `2`: shorten the prompt";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn commas_around_a_name_belong_to_the_text() {
        check("embedding:three, cat", &[vectors(0, 3), text(", cat")], &[]);
        check("embedding:three,,", &[vectors(0, 3), text(",, ")], &[]);
        // As long as the name without its commas, so "ee" is left of ",,three".
        check("embedding:,,three", &[vectors(0, 3), text("ee")], &[]);
    }

    #[test]
    fn commas_may_be_part_of_a_name() {
        check("embedding:x,y, z", &[vectors(0, 1), text(", z")], &[]);
        check("embedding:comma, z", &[vectors(0, 2), text("z")], &[]);
    }

    #[test]
    fn a_missing_embedding_leaves_only_the_text_behind_it_and_one_warning() {
        check("embedding:nope cat", &[text("cat")], &["nope"]);
        check("embedding:nope, embedding:nope", &[text(", ")], &["nope"]);
        check("embedding:,,", &[text(",, ")], &[",,"]);
    }

    #[test]
    fn without_a_directory_a_name_is_ordinary_text() {
        let mut grouper = Grouper::new(&TOKENIZER, CLIP_L, None, Limits::default());
        grouper.push(&segment("a embedding:three")).unwrap();
        assert_eq!(ids(grouper.finish()), [text("a"), text("embedding:three")]);
    }

    #[test]
    fn an_embedding_without_a_name_is_an_error() {
        for nameless in ["embedding:", "a embedding: \n", "embedding: embedding:three"] {
            let error = grouper(Limits::default()).push(&segment(nameless)).unwrap_err();
            assert!(matches!(error, PromptError::UnnamedEmbedding), "{nameless:?}: {error}");
        }
    }

    #[test]
    fn an_embedding_that_cannot_be_used_is_an_error() {
        for (name, message) in [
            ("torn", "embedding `torn` cannot be read for `clip_l`: repair or remove its file"),
            (
                "ragged",
                "embedding `ragged` has `5` elements for vectors of width `2`: repair or remove its file",
            ),
            (
                "hollow",
                "embedding `hollow` has `0` elements for vectors of width `0`: repair or remove its file",
            ),
        ] {
            let segment = segment(&format!("embedding:{name}"));
            let error = grouper(Limits::default()).push(&segment).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn vectors_count_against_the_chunks() {
        let limits = Limits { chunks_max: 1, ..Limits::default() };
        let many = "embedding:three ".repeat(25);
        grouper(limits).push(&segment(many.trim())).unwrap();
        assert!(grouper(limits).push(&segment(&format!("{many}embedding:three"))).is_err());
    }

    #[test]
    fn longer_chunks_take_more_vectors() {
        let limits = Limits { chunks_max: 1, ..Limits::default() };
        let long = Encoder { chunk_tokens: 248, ..CLIP_L };
        let mut grouper = Grouper::new(&TOKENIZER, long, Some(&Shelf), limits);
        grouper.push(&segment("embedding:three ".repeat(82).trim())).unwrap();
        assert!(grouper.push(&segment("embedding:three")).is_err());
    }

    #[test]
    fn every_token_of_a_segment_has_its_weight() {
        let mut grouper = grouper(Limits::default());
        let text = "a embedding:three, b".to_owned();
        grouper.push(&Segment { text, weight: 0.7 }).unwrap();
        let weights: Vec<_> = grouper.groups.concat().iter().map(|token| token.weight).collect();
        assert_eq!(weights, [0.7; 6]);
    }

    /// Some embeddings by name, of 2 elements each.
    struct Shelf;

    impl Embeddings for Shelf {
        fn find(&self, name: &str, _: Component) -> Result<Option<VectorTable>, EmbeddingFailure> {
            let elements = match name {
                "three" => 6,
                "dir/one" | "x,y" => 2,
                "comma," => 4,
                "ragged" => 5,
                "torn" => return Err("unexpected end of file".into()),
                "hollow" => return Ok(Some(VectorTable::default())),
                _ => return Ok(None),
            };
            Ok(Some(VectorTable { width: 2, elements: vec![0.0; elements] }))
        }
    }

    fn grouper(limits: Limits) -> Grouper<'static> {
        Grouper::new(&TOKENIZER, CLIP_L, Some(&Shelf), limits)
    }

    fn segment(text: &str) -> Segment {
        Segment { text: text.to_owned(), weight: 1.0 }
    }

    fn text(text: &str) -> Vec<Token> {
        TOKENIZER.ids(text).into_iter().map(Token::Id).collect()
    }

    fn vectors(embedding: usize, rows: usize) -> Vec<Token> {
        (0..rows).map(|row| Token::Vector(VectorRef { embedding, row })).collect()
    }

    fn ids(grouped: Grouped) -> Vec<Vec<Token>> {
        let tokens = |group: Group| group.into_iter().map(|token| token.token).collect();
        grouped.groups.into_iter().map(tokens).collect()
    }

    #[track_caller]
    fn check(prompt: &str, groups: &[Vec<Token>], missing: &[&str]) {
        let mut grouper = grouper(Limits::default());
        grouper.push(&segment(prompt)).unwrap();
        let made = grouper.finish();
        let expected: Vec<_> = missing
            .iter()
            .map(|&name| Warning::EmbeddingNotFound { name: name.to_owned() })
            .collect();
        assert_eq!(made.warnings, expected, "{prompt:?}");
        assert_eq!(ids(made), groups, "{prompt:?}");
    }
}
