//! `MessagePack` maps as bytes: finding, replacing and adding entries without reading the rest.
//!
//! The broker forwards headers unread. Where it must change one entry of a reply, or tell whether
//! two requests are equal, it walks over the entries of one map and leaves their values alone.

use std::ops::Range;

use protocol::limits;

/// One entry: the text of its key, and where its value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: Range<usize>,
}

/// A map inside some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawMap<'a> {
    pub(crate) entries: Vec<Entry<'a>>,
    /// Its marker and the number of entries.
    head: Range<usize>,
    /// Where it ends.
    pub(crate) end: usize,
}

impl<'a> RawMap<'a> {
    /// The map that begins at `at`; nothing when there is none, it is cut off, nested too deeply,
    /// or has keys that are not text.
    pub(crate) fn read(bytes: &'a [u8], at: usize) -> Option<Self> {
        let (count, body) = match *bytes.get(at)? {
            marker @ 0x80..=0x8f => (usize::from(marker & 0x0f), at + 1),
            0xde => (number(bytes, at + 1, 2)?, at + 3),
            0xdf => (number(bytes, at + 1, 4)?, at + 5),
            _ => return None,
        };
        let mut entries = Vec::new();
        let mut end = body;
        for _ in 0..count {
            let key = text(bytes, end)?;
            let value = key.end..skip(bytes, key.end, 1)?;
            end = value.end;
            entries.push(Entry { key: &bytes[key], value });
        }
        Some(Self { entries, head: at..body, end })
    }

    /// The value of `key`, when it is there exactly once.
    pub(crate) fn get(&self, key: &str) -> Option<Range<usize>> {
        let mut found = self.entries.iter().filter(|entry| entry.key == key.as_bytes());
        let entry = found.next()?;
        found.next().is_none().then(|| entry.value.clone())
    }

    /// `bytes` with this map's entry of `key` set to the text `value`.
    pub(crate) fn with_text(&self, bytes: &[u8], key: &str, value: &str) -> Option<Vec<u8>> {
        let mut changed = Vec::with_capacity(bytes.len() + key.len() + value.len() + 16);
        if let Some(old) = self.get(key) {
            changed.extend_from_slice(&bytes[..old.start]);
            write_text(&mut changed, value)?;
            changed.extend_from_slice(&bytes[old.end..]);
        } else {
            changed.extend_from_slice(&bytes[..self.head.start]);
            write_map_head(&mut changed, self.entries.len() + 1)?;
            changed.extend_from_slice(&bytes[self.head.end..self.end]);
            write_text(&mut changed, key)?;
            write_text(&mut changed, value)?;
            changed.extend_from_slice(&bytes[self.end..]);
        }
        Some(changed)
    }
}

/// The text at `at`: where its bytes are.
fn text(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let (length, start) = match *bytes.get(at)? {
        marker @ 0xa0..=0xbf => (usize::from(marker & 0x1f), at + 1),
        0xd9 => (number(bytes, at + 1, 1)?, at + 2),
        0xda => (number(bytes, at + 1, 2)?, at + 3),
        0xdb => (number(bytes, at + 1, 4)?, at + 5),
        _ => return None,
    };
    within(bytes, start, length).map(|end| start..end)
}

/// Where the value at `at` ends.
fn skip(bytes: &[u8], at: usize, depth: usize) -> Option<usize> {
    if depth > limits::HEADER_DEPTH_MAX {
        return None;
    }
    let sized = |digits: usize, extra: usize| {
        let length = number(bytes, at + 1, digits)?;
        within(bytes, at + 1 + digits, length.checked_add(extra)?)
    };
    let fixed = |length: usize| within(bytes, at, length);
    let items = |count: usize, start: usize| {
        (0..count).try_fold(start, |end, _| skip(bytes, end, depth + 1))
    };
    match *bytes.get(at)? {
        0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => fixed(1),
        0xc1 => None,
        0xcc | 0xd0 => fixed(2),
        0xcd | 0xd1 | 0xd4 => fixed(3),
        0xd5 => fixed(4),
        0xca | 0xce | 0xd2 => fixed(5),
        0xd6 => fixed(6),
        0xcb | 0xcf | 0xd3 => fixed(9),
        0xd7 => fixed(10),
        0xd8 => fixed(18),
        marker @ 0xa0..=0xbf => fixed(1 + usize::from(marker & 0x1f)),
        0xc4 | 0xd9 => sized(1, 0),
        0xc5 | 0xda => sized(2, 0),
        0xc6 | 0xdb => sized(4, 0),
        0xc7 => sized(1, 1),
        0xc8 => sized(2, 1),
        0xc9 => sized(4, 1),
        marker @ 0x90..=0x9f => items(usize::from(marker & 0x0f), at + 1),
        0xdc => items(number(bytes, at + 1, 2)?, at + 3),
        0xdd => items(number(bytes, at + 1, 4)?, at + 5),
        marker @ 0x80..=0x8f => items(2 * usize::from(marker & 0x0f), at + 1),
        0xde => items(2 * number(bytes, at + 1, 2)?, at + 3),
        0xdf => items(number(bytes, at + 1, 4)?.checked_mul(2)?, at + 5),
    }
}

/// The big-endian number of `digits` bytes at `at`.
fn number(bytes: &[u8], at: usize, digits: usize) -> Option<usize> {
    let digits = bytes.get(at..at.checked_add(digits)?)?;
    Some(digits.iter().fold(0, |number, &digit| (number << 8) | usize::from(digit)))
}

/// The end of `length` bytes from `start` on, if there are so many.
fn within(bytes: &[u8], start: usize, length: usize) -> Option<usize> {
    start.checked_add(length).filter(|&end| end <= bytes.len())
}

fn write_map_head(bytes: &mut Vec<u8>, entries: usize) -> Option<()> {
    match u16::try_from(entries).ok()? {
        few @ 0..=15 => bytes.push(0x80 | u8::try_from(few).ok()?),
        many => {
            bytes.push(0xde);
            bytes.extend_from_slice(&many.to_be_bytes());
        }
    }
    Some(())
}

fn write_text(bytes: &mut Vec<u8>, text: &str) -> Option<()> {
    match u8::try_from(text.len()).ok()? {
        short @ 0..=31 => bytes.push(0xa0 | short),
        long => bytes.extend_from_slice(&[0xd9, long]),
    }
    bytes.extend_from_slice(text.as_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::{
        header,
        reply::CancelReply,
        request::{ClipEncode, EncodeOptions, Prompt},
    };

    use super::*;

    #[test]
    fn an_entry_is_replaced_and_the_rest_stays() {
        let id = |text: &str| text.parse().unwrap();
        let bytes = header::write(&CancelReply { id: id("r-1"), cancelled: true });
        for new in ["x", &"long".repeat(30)] {
            let map = RawMap::read(&bytes, 0).unwrap();
            let changed = map.with_text(&bytes, "id", new).unwrap();
            let read: CancelReply = header::read(&changed).unwrap();
            assert_eq!(read, CancelReply { id: id(new), cancelled: true });
        }
    }

    #[test]
    fn an_entry_is_added_whatever_the_marker_of_the_map() {
        for count in [0_usize, 1, 14, 15, 16, 300] {
            let mut bytes = b"before".to_vec();
            write_map_head(&mut bytes, count).unwrap();
            for number in 0..count {
                write_text(&mut bytes, &format!("key {number}")).unwrap();
                bytes.push(7);
            }
            let end = bytes.len();
            bytes.extend_from_slice(b"after");
            let map = RawMap::read(&bytes, 6).unwrap();
            assert_eq!((map.entries.len(), map.end), (count, end));
            let changed = map.with_text(&bytes, "cache", "hit").unwrap();
            let map = RawMap::read(&changed, 6).unwrap();
            assert_eq!(map.entries.len(), count + 1);
            assert_eq!(&changed[map.get("cache").unwrap()], b"\xa3hit");
            assert!(changed.starts_with(b"before") && changed.ends_with(b"after"));
        }
    }

    #[test]
    fn a_key_that_is_there_twice_is_not_found() {
        let bytes = b"\x82\xa1a\x01\xa1a\x02";
        assert_eq!(RawMap::read(bytes, 0).unwrap().get("a"), None);
    }

    #[test]
    fn what_is_no_map_or_cut_off_or_too_deep_is_refused() {
        let deep = [b"\x81\xa1a".as_slice(), &[0x91; 40], b"\x01"].concat();
        for bytes in [b"".as_slice(), b"\x90", b"\x81", b"\x81\xa1a", b"\x81\x01\x01", &deep] {
            assert_eq!(RawMap::read(bytes, 0), None, "{bytes:02x?}");
        }
        assert_eq!(RawMap::read(b"\xdf\xff\xff\xff\xff\xa1a\x01", 0), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_break_it(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(map) = RawMap::read(&bytes, 0) {
                prop_assert!(map.end <= bytes.len());
                prop_assert!(map.with_text(&bytes, "id", "x").is_some());
            }
        }

        #[test]
        fn every_header_is_walked_to_its_end(text in ".{0,400}", clip_skip: Option<i32>) {
            let request = ClipEncode {
                id: "r".parse().unwrap(),
                model: "sd15".parse().unwrap(),
                model_digest: None,
                prompts: vec![Prompt { text: Some(text), ..Prompt::default() }],
                stack: Vec::new(),
                options: EncodeOptions { clip_skip, ..EncodeOptions::default() },
                budget_ms: Some(70_000),
                no_cache: true,
                requires: Vec::new(),
            };
            let bytes = header::write(&request);
            let map = RawMap::read(&bytes, 0).unwrap();
            prop_assert_eq!(map.end, bytes.len());
            let changed = map.with_text(&bytes, "id", "other").unwrap();
            let read: ClipEncode = header::read(&changed).unwrap();
            prop_assert_eq!(read, ClipEncode { id: "other".parse().unwrap(), ..request });
        }
    }
}
