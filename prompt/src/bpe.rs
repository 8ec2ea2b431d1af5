//! CLIP's byte-pair encoding of one word, and the table behind it.
//!
//! The `tokenizers` crate has a BPE model, too. It is not used: the text before it would be
//! prepared by our own code all the same (its normalisers cannot express [`normalize`]), and this
//! crate also serves clients, which would get a graph of some fifty crates and several times the
//! start-up time for what is a table and one loop.
//!
//! Ids follow from the order of CLIP's vocabulary: 256 bytes, 256 bytes that end a word, then one
//! id per merge, best merge first. So an id above 511 is the rank of its merge, too.
//!
//! [`normalize`]: crate::normalize

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    iter,
};

/// The merges, best first, one `left right` per line; see `data/LICENSE` for their origin.
static MERGES: &str = include_str!("../data/bpe_merges.txt");

/// Marks a symbol that ends a word, in [`MERGES`].
const WORD_END: &str = "</w>";

/// Added to the id of a byte that ends a word.
const WORD_END_OFFSET: u32 = 256;

/// The table of merges.
#[derive(Debug)]
pub(crate) struct Bpe {
    /// Id of each byte that does not end a word.
    bytes: [u32; 256],
    /// Pairs of ids, ascending, and the id that each pair becomes.
    merges: Vec<((u32, u32), u32)>,
}

impl Bpe {
    /// Builds the table from the merges in this crate; takes some milliseconds.
    pub(crate) fn new() -> Self {
        let alphabet = alphabet();
        let mut bytes = [0; 256];
        let mut ids = BTreeMap::new();
        for (id, (byte, letter)) in (0..).zip(&alphabet) {
            bytes[usize::from(*byte)] = id;
            ids.insert(letter.to_string(), id);
            ids.insert(format!("{letter}{WORD_END}"), id + WORD_END_OFFSET);
        }
        let mut merges = Vec::new();
        for (id, line) in (2 * WORD_END_OFFSET..).zip(MERGES.lines()) {
            let (left, right) = line.split_once(' ').expect("a merge in the data has two sides");
            let id_of = |symbol: &str| *ids.get(symbol).expect("the data has no unknown symbol");
            merges.push(((id_of(left), id_of(right)), id));
            ids.insert([left, right].concat(), id);
        }
        merges.sort_unstable();
        Self { bytes, merges }
    }

    /// The ids of one word, in order; at least one for a word that is not empty.
    ///
    /// Takes O(n log n) for n bytes: words of a hostile prompt are as long as the prompt.
    pub(crate) fn encode(&self, word: &str) -> Vec<u32> {
        let mut ids: Vec<_> = word.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
        if let Some(last) = ids.last_mut() {
            *last += WORD_END_OFFSET;
        }
        self.merge(&ids)
    }

    /// Joins neighbours until no merge applies, best merge first, left to right among equals.
    fn merge(&self, ids: &[u32]) -> Vec<u32> {
        let mut chain = Chain::new(ids);
        let mut candidates = BinaryHeap::new();
        for left in 0..ids.len() {
            candidates.extend(self.candidate(&chain, left));
        }
        while let Some(candidate) = candidates.pop() {
            let Reverse((merged, left)) = candidate;
            // A symbol of the pair may have gone into another merge since.
            if self.candidate(&chain, left) != Some(candidate) {
                continue;
            }
            chain.join_with_next(left, merged);
            candidates.extend(self.candidate(&chain, left));
            if let Some(previous) = chain.previous(left) {
                candidates.extend(self.candidate(&chain, previous));
            }
        }
        chain.ids()
    }

    /// The merge of the symbol at `left` with the next one, if there is one.
    fn candidate(&self, chain: &Chain, left: usize) -> Option<Reverse<(u32, usize)>> {
        let pair = chain.pair_at(left)?;
        let index = self.merges.binary_search_by_key(&pair, |&(pair, _)| pair).ok()?;
        Some(Reverse((self.merges[index].1, left)))
    }
}

/// The symbols of a word, linked so that joining two costs nothing.
struct Chain(Vec<Link>);

struct Link {
    /// Nothing once the symbol is part of the one before it.
    id: Option<u32>,
    previous: Option<usize>,
    next: Option<usize>,
}

impl Chain {
    fn new(ids: &[u32]) -> Self {
        let link = |(index, &id): (usize, &u32)| Link {
            id: Some(id),
            previous: index.checked_sub(1),
            next: Some(index + 1).filter(|&next| next < ids.len()),
        };
        Self(ids.iter().enumerate().map(link).collect())
    }

    fn previous(&self, index: usize) -> Option<usize> {
        self.0[index].previous
    }

    fn pair_at(&self, left: usize) -> Option<(u32, u32)> {
        let Link { id, next, .. } = self.0[left];
        Some((id?, self.0[next?].id?))
    }

    fn join_with_next(&mut self, left: usize, id: u32) {
        if let Some(right) = self.0[left].next {
            self.0[right].id = None;
            self.0[left].next = self.0[right].next;
        }
        self.0[left].id = Some(id);
        if let Some(next) = self.0[left].next {
            self.0[next].previous = Some(left);
        }
    }

    fn ids(&self) -> Vec<u32> {
        let first = (!self.0.is_empty()).then_some(0);
        iter::successors(first, |&index| self.0[index].next)
            .filter_map(|index| self.0[index].id)
            .collect()
    }
}

/// Every byte with the letter that stands for it in [`MERGES`], in the order of their ids.
///
/// Printable Latin-1 stands for itself; the others get the code points from 256 on.
fn alphabet() -> Vec<(u8, char)> {
    let is_printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let printable = (0..=255).filter(is_printable).map(|byte| (byte, char::from(byte)));
    let others = (0..=255).filter(|byte| !is_printable(byte)).zip('\u{100}'..);
    printable.chain(others).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_has_every_merge_of_clip_once() {
        let bpe = Bpe::new();
        assert_eq!(bpe.merges.len(), 48_894);
        let pairs: BTreeSet<_> = bpe.merges.iter().map(|(pair, _)| pair).collect();
        assert_eq!(pairs.len(), 48_894);
        let symbols: BTreeSet<_> = MERGES.lines().map(|line| line.replace(' ', "")).collect();
        assert_eq!(symbols.len(), 48_894);
    }

    #[test]
    fn bytes_have_the_ids_of_their_letters() {
        let bpe = Bpe::new();
        assert_eq!(bpe.encode("!"), [256]);
        assert_eq!(bpe.encode("a"), [320]);
        assert_eq!(bpe.encode(","), [267]);
        assert_eq!(bpe.encode(""), []);
    }

    #[test]
    fn words_merge_to_the_ids_of_clip() {
        let bpe = Bpe::new();
        assert_eq!(bpe.encode("cat"), [2368]);
        assert_eq!(bpe.encode("masterpiece"), [12066]);
        assert_eq!(bpe.encode("embedding"), [19703, 796]);
    }

    #[test]
    fn merging_agrees_with_the_textbook_loop() {
        let bpe = Bpe::new();
        for word in
            ["aaaaaaa", "antidisestablishmentarianism", "ßüñ漢😀", "----======", "lolololol"]
        {
            assert_eq!(bpe.encode(word), textbook(&bpe, word), "{word}");
        }
    }

    #[test]
    fn a_word_as_long_as_a_prompt_may_be_is_encoded_quickly() {
        let bpe = Bpe::new();
        let word: String =
            (0..64 * 1024_u32).map(|n| char::from(b'a' + (n * n % 26) as u8)).collect();
        assert!(bpe.encode(&word).len() > 1000);
        assert!(bpe.encode(&"a".repeat(64 * 1024)).len() > 1000);
    }

    /// Merges every occurrence of the best pair, again and again.
    fn textbook(bpe: &Bpe, word: &str) -> Vec<u32> {
        let mut ids: Vec<u32> = word.bytes().map(|byte| bpe.bytes[usize::from(byte)]).collect();
        *ids.last_mut().unwrap() += WORD_END_OFFSET;
        let merge_of = |pair: (u32, u32)| {
            bpe.merges.iter().find(|(known, _)| *known == pair).map(|&(_, merged)| merged)
        };
        while let Some(best) = ids.windows(2).filter_map(|w| merge_of((w[0], w[1]))).min() {
            let mut joined = Vec::new();
            let mut index = 0;
            while index < ids.len() {
                let pair = ids.get(index + 1).map(|&next| (ids[index], next));
                let is_best = pair.and_then(merge_of) == Some(best);
                joined.push(if is_best { best } else { ids[index] });
                index += if is_best { 2 } else { 1 };
            }
            ids = joined;
        }
        ids
    }
}
