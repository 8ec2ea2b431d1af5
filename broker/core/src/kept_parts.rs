//! Parts of files whose uploads broke off, as far as the core was told.
//!
//! They wait for a client that announces the same file, for a limited time, and are the first to go
//! when room is needed.

use std::{collections::BTreeMap, time::Instant};

use protocol::request::UploadFormat;

use crate::blob::PartName;

/// Kept parts by name.
#[derive(Debug, Default)]
pub(crate) struct KeptParts {
    kept: BTreeMap<PartName, Kept>,
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    bytes: u64,
    expires: Instant,
}

impl KeptParts {
    /// Takes in a part that is dropped at `expires`.
    pub(crate) fn insert(&mut self, part: PartName, bytes: u64, expires: Instant) {
        self.kept.insert(part, Kept { bytes, expires });
    }

    /// Takes out a part; returns its bytes and when it would have expired.
    pub(crate) fn remove(&mut self, part: &PartName) -> Option<(u64, Instant)> {
        self.kept.remove(part).map(|Kept { bytes, expires }| (bytes, expires))
    }

    /// Bytes of the parts of models' files, or of all others.
    pub(crate) fn bytes(&self, model_files: bool) -> u64 {
        self.of_sort(model_files).map(|(_, kept)| kept.bytes).sum()
    }

    /// When the next part is dropped.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.kept.values().map(|kept| kept.expires).min()
    }

    /// Takes out the parts whose time is over.
    pub(crate) fn remove_expired(&mut self, now: Instant) -> Vec<PartName> {
        self.kept.extract_if(.., |_, kept| kept.expires <= now).map(|(part, _)| part).collect()
    }

    /// Takes out parts, those that expire first, so that at most `count_max` are left.
    pub(crate) fn remove_beyond(&mut self, count_max: usize) -> Vec<PartName> {
        let excess = self.kept.len().saturating_sub(count_max);
        let mut parts: Vec<_> =
            self.kept.iter().map(|(part, kept)| (kept.expires, *part)).collect();
        parts.sort_unstable();
        self.take(parts.into_iter().take(excess).map(|(_, part)| part).collect())
    }

    /// Takes out parts of one sort, those that expire first, so that at most `bytes_max` are left.
    pub(crate) fn remove_excess(&mut self, model_files: bool, bytes_max: u64) -> Vec<PartName> {
        let mut bytes = self.bytes(model_files);
        let mut parts: Vec<_> = self
            .of_sort(model_files)
            .map(|(part, kept)| (kept.expires, *part, kept.bytes))
            .collect();
        parts.sort_unstable();
        let excess = parts.into_iter().take_while(|(_, _, kept)| {
            let is_excess = bytes > bytes_max;
            bytes -= kept;
            is_excess
        });
        let excess = excess.map(|(_, part, _)| part).collect();
        self.take(excess)
    }

    fn take(&mut self, parts: Vec<PartName>) -> Vec<PartName> {
        for part in &parts {
            self.kept.remove(part);
        }
        parts
    }

    fn of_sort(&self, model_files: bool) -> impl Iterator<Item = (&PartName, &Kept)> {
        let is_of_sort = move |part: &PartName| (part.format == UploadFormat::Model) == model_files;
        self.kept.iter().filter(move |(part, _)| is_of_sort(part))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use protocol::BlobDigest;

    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "some instant to count from")]
    fn those_that_expire_first_make_room_and_sorts_are_counted_apart() {
        let now = Instant::now();
        let mut parts = KeptParts::default();
        for (name, after) in [("a", 3), ("b", 1), ("c", 2)] {
            parts.insert(part(name, UploadFormat::Canonical), 10, now + Duration::from_secs(after));
        }
        parts.insert(part("m", UploadFormat::Model), 50, now + Duration::from_secs(9));
        assert_eq!((parts.bytes(false), parts.bytes(true)), (30, 50));

        assert_eq!(parts.remove_excess(false, 30), []);
        assert_eq!(parts.remove_excess(false, 15), ["b", "c"].map(canonical));
        assert_eq!(parts.remove_beyond(1), [canonical("a")]);
        assert_eq!(parts.next_expiry(), Some(now + Duration::from_secs(9)));
        assert_eq!(parts.remove_expired(now + Duration::from_secs(8)), []);
        assert_eq!(parts.remove_expired(now + Duration::from_secs(9)).len(), 1);
        assert_eq!(parts.next_expiry(), None);
    }

    fn canonical(name: &str) -> PartName {
        part(name, UploadFormat::Canonical)
    }

    fn part(name: &str, format: UploadFormat) -> PartName {
        PartName { format, digest: BlobDigest::of(name.as_bytes()), size: 100 }
    }
}
