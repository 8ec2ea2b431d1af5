//! Blobs on their way from the broker's blob store: which bytes to ask for next.
//!
//! A few fetches are under way at a time; the others wait in the order in which they were started:
//!
//! ```text
//! waiting => under way => gone     (complete, refused or stopped)
//!    |
//!    `=> gone                      (stopped)
//! ```
//!
//! A fetch asks for chunks in order and keeps [`WINDOW`] of them under way, so that a chunk is
//! travelling while the last one is stored. Nothing here sends or verifies; the shell does: after
//! every event it takes requests with [`Fetches::poll_request`] until there are none.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use protocol::{BlobDigest, limits};

/// Fetches under way at a time.
const FETCHES_MAX: usize = 4;

/// Chunks of one fetch that are asked for ahead of what has arrived.
const WINDOW: u64 = 4;

/// A fetch without a chunk for this long asks again.
const STALL: Duration = Duration::from_secs(2);

/// Bytes of one chunk.
const CHUNK_BYTES: u64 = 1 << 20;
const _: () = assert!(CHUNK_BYTES == limits::UPLOAD_CHUNK_BYTES_MAX as u64);

/// All blobs on their way.
#[derive(Debug, Default)]
pub struct Fetches {
    under_way: BTreeMap<BlobDigest, Fetch>,
    /// In order, with the bytes that each may have.
    waiting: VecDeque<(BlobDigest, u64)>,
    requests: VecDeque<ChunkRequest>,
}

#[derive(Debug)]
struct Fetch {
    bytes: Vec<u8>,
    bytes_max: u64,
    /// Bytes of the whole blob, once the first chunk told.
    size: Option<u64>,
    /// The first byte that has not been asked for.
    asked: u64,
    progress: Instant,
}

/// A chunk to ask the broker for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRequest {
    /// The blob.
    pub blob: BlobDigest,
    /// The first byte.
    pub offset: u64,
    /// At most this many bytes.
    pub length: u32,
}

/// What a chunk led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// More chunks are to come.
    Partial,
    /// The blob is complete; its digest is not verified yet.
    Complete(Vec<u8>),
    /// The chunk is not one that was waited for.
    Ignored,
}

/// A chunk that cannot belong to the blob it claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadChunk {
    /// The blob is larger than it may be.
    #[error("blob {blob} has {size} bytes: at most {bytes_max} are accepted")]
    TooLarge {
        /// The blob.
        blob: BlobDigest,
        /// Its size.
        size: u64,
        /// The largest size.
        bytes_max: u64,
    },
    /// The blob changed its size.
    #[error("blob {blob} is announced with {size} bytes after {known}: a size never changes")]
    Size {
        /// The blob.
        blob: BlobDigest,
        /// The announced size.
        size: u64,
        /// The size announced before.
        known: u64,
    },
    /// No bytes, or more than the rest of the blob.
    #[error("a chunk of blob {blob} at byte {offset} has {bytes} bytes of {size}")]
    Length {
        /// The blob.
        blob: BlobDigest,
        /// The first byte.
        offset: u64,
        /// Bytes that came.
        bytes: usize,
        /// The announced size.
        size: u64,
    },
}

impl Fetches {
    /// Begins to fetch `blob`, which may have `bytes_max` bytes, when its turn comes.
    pub fn start(&mut self, blob: BlobDigest, bytes_max: u64, now: Instant) {
        if !self.is_wanted(&blob) {
            self.waiting.push_back((blob, bytes_max));
            self.begin_waiting(now);
        }
    }

    /// Gives up on `blob`.
    pub fn stop(&mut self, blob: &BlobDigest, now: Instant) {
        self.waiting.retain(|(waiting, _)| waiting != blob);
        self.end(blob, now);
    }

    /// Whether `blob` is under way or waits for its turn.
    pub fn is_wanted(&self, blob: &BlobDigest) -> bool {
        self.under_way.contains_key(blob) || self.waiting.iter().any(|(other, _)| other == blob)
    }

    /// A chunk arrived.
    ///
    /// # Errors
    /// When the chunk cannot belong to the blob; the fetch is over.
    pub fn handle_chunk(
        &mut self,
        message: &protocol::worker::Blob,
        chunk: &[u8],
        now: Instant,
    ) -> Result<Progress, BadChunk> {
        let blob = message.blob;
        let Some(fetch) = self.under_way.get_mut(&blob) else { return Ok(Progress::Ignored) };
        if message.offset != fetch.received() {
            return Ok(Progress::Ignored);
        }
        if let Err(bad) = fetch.accept(message, chunk, now) {
            self.end(&blob, now);
            return Err(bad);
        }
        if fetch.received() == message.size {
            let bytes = self.end(&blob, now).map(|fetch| fetch.bytes);
            return Ok(Progress::Complete(bytes.unwrap_or_default()));
        }
        fetch.fill_window(blob, &mut self.requests);
        Ok(Progress::Partial)
    }

    /// The connection is a new one: what was asked for on the old one is asked again.
    pub fn handle_reconnect(&mut self, now: Instant) {
        self.requests.clear();
        for (&blob, fetch) in &mut self.under_way {
            self.requests.push_back(fetch.ask_again(blob, now));
        }
    }

    /// Asks again for what has stalled.
    pub fn handle_timeout(&mut self, now: Instant) {
        for (&blob, fetch) in &mut self.under_way {
            if now.saturating_duration_since(fetch.progress) >= STALL {
                self.requests.push_back(fetch.ask_again(blob, now));
            }
        }
    }

    /// The next chunk to ask for, until there is none.
    pub fn poll_request(&mut self) -> Option<ChunkRequest> {
        self.requests.pop_front()
    }

    /// When `handle_timeout` is due, if any fetch is under way.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.values().map(|fetch| fetch.progress + STALL).min()
    }

    /// Ends the fetch of `blob` and begins those that now have their turn.
    fn end(&mut self, blob: &BlobDigest, now: Instant) -> Option<Fetch> {
        let fetch = self.under_way.remove(blob); // ## under way => gone
        self.requests.retain(|request| request.blob != *blob);
        self.begin_waiting(now);
        fetch
    }

    fn begin_waiting(&mut self, now: Instant) {
        while self.under_way.len() < FETCHES_MAX
            && let Some((blob, bytes_max)) = self.waiting.pop_front()
        {
            // ## waiting => under way
            let bytes = Vec::new();
            let fetch = Fetch { bytes, bytes_max, size: None, asked: CHUNK_BYTES, progress: now };
            self.under_way.insert(blob, fetch);
            self.requests.push_back(chunk_at(blob, 0));
        }
    }
}

impl Fetch {
    fn received(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn accept(
        &mut self,
        message: &protocol::worker::Blob,
        chunk: &[u8],
        now: Instant,
    ) -> Result<(), BadChunk> {
        let protocol::worker::Blob { blob, offset, size } = *message;
        let bytes_max = self.bytes_max;
        if size > bytes_max {
            return Err(BadChunk::TooLarge { blob, size, bytes_max });
        }
        if let Some(known) = self.size.filter(|known| *known != size) {
            return Err(BadChunk::Size { blob, size, known });
        }
        if chunk.is_empty() || self.received() + chunk.len() as u64 > size {
            return Err(BadChunk::Length { blob, offset, bytes: chunk.len(), size });
        }
        self.size = Some(size);
        self.bytes.extend_from_slice(chunk);
        self.progress = now;
        Ok(())
    }

    fn fill_window(&mut self, blob: BlobDigest, requests: &mut VecDeque<ChunkRequest>) {
        let end = self.size.unwrap_or(0).min(self.received() + WINDOW * CHUNK_BYTES);
        while self.asked < end {
            requests.push_back(chunk_at(blob, self.asked));
            self.asked += CHUNK_BYTES;
        }
    }

    fn ask_again(&mut self, blob: BlobDigest, now: Instant) -> ChunkRequest {
        self.progress = now;
        self.asked = self.received() + CHUNK_BYTES;
        chunk_at(blob, self.received())
    }
}

fn chunk_at(blob: BlobDigest, offset: u64) -> ChunkRequest {
    ChunkRequest { blob, offset, length: 1 << 20 }
}

#[cfg(test)]
mod tests {
    use protocol::worker::Blob;

    use super::*;

    const MIB: usize = 1 << 20;
    const BYTES_MAX: u64 = 100 << 20;

    #[test]
    fn a_large_blob_arrives_whole_with_a_window_under_way() {
        let content: Vec<u8> = (0..=250).cycle().take(6 * MIB + 17).collect();
        let digest = BlobDigest::of(&content);
        let mut fetches = Fetches::default();
        fetches.start(digest, BYTES_MAX, now());
        let mut asked = requests(&mut fetches);
        let mut under_way_max = 0;
        let arrived = loop {
            under_way_max = under_way_max.max(asked.len());
            match answer(&mut fetches, &content, asked.remove(0)).unwrap() {
                Progress::Partial => asked.extend(requests(&mut fetches)),
                Progress::Complete(bytes) => break bytes,
                Progress::Ignored => panic!("a chunk that was asked for is taken"),
            }
        };
        assert!(arrived == content);
        assert_eq!(under_way_max, 4);
        assert_eq!(fetches.poll_timeout(), None);
    }

    #[test]
    fn a_few_fetches_are_under_way_and_the_others_follow_in_order() {
        let mut fetches = Fetches::default();
        let digests: Vec<_> = (0..7u8).map(|n| BlobDigest::of(&[n])).collect();
        for digest in &digests {
            fetches.start(*digest, BYTES_MAX, now());
        }
        let first: Vec<_> = digests[..4].iter().map(|digest| chunk_at(*digest, 0)).collect();
        assert_eq!(requests(&mut fetches), first);

        fetches.stop(&digests[5], now());
        assert_eq!(requests(&mut fetches), []);
        fetches.stop(&digests[0], now());
        assert_eq!(requests(&mut fetches), [chunk_at(digests[4], 0)]);
        let complete = answer(&mut fetches, &[1], chunk_at(digests[1], 0)).unwrap();
        assert_eq!(complete, Progress::Complete(vec![1]));
        assert_eq!(requests(&mut fetches), [chunk_at(digests[6], 0)]);
        assert!(!fetches.is_wanted(&digests[5]) && fetches.is_wanted(&digests[6]));
    }

    #[test]
    fn a_fetch_that_is_wanted_twice_is_made_once() {
        let mut fetches = Fetches::default();
        let digest = BlobDigest::of(b"x");
        fetches.start(digest, BYTES_MAX, now());
        fetches.start(digest, BYTES_MAX, now());
        assert_eq!(requests(&mut fetches), [chunk_at(digest, 0)]);
    }

    #[test]
    fn after_a_reconnect_the_fetch_goes_on_where_it_was() {
        let content = vec![7; 3 * MIB];
        let digest = BlobDigest::of(&content);
        let mut fetches = Fetches::default();
        fetches.start(digest, BYTES_MAX, now());
        let first = requests(&mut fetches)[0];
        answer(&mut fetches, &content, first).unwrap();

        fetches.handle_reconnect(now());
        assert_eq!(requests(&mut fetches), [chunk_at(digest, MIB as u64)]);
    }

    #[test]
    fn a_chunk_of_a_wrong_place_is_ignored_and_of_a_wrong_size_ends_the_fetch() {
        let digest = BlobDigest::of(b"x");
        let mut fetches = Fetches::default();
        fetches.start(digest, BYTES_MAX, now());
        let mut chunk = |offset, size, bytes: &[u8]| {
            fetches.handle_chunk(&Blob { blob: digest, offset, size }, bytes, now())
        };
        assert_eq!(chunk(5, 10, b"abc"), Ok(Progress::Ignored));
        assert!(matches!(chunk(0, 2, b"abc"), Err(BadChunk::Length { .. })));
        assert_eq!(chunk(0, 3, b"abc"), Ok(Progress::Ignored), "the fetch is over");
    }

    #[test]
    fn a_size_never_changes() {
        let digest = BlobDigest::of(b"x");
        let mut fetches = Fetches::default();
        fetches.start(digest, BYTES_MAX, now());
        let mut chunk =
            |offset, size| fetches.handle_chunk(&Blob { blob: digest, offset, size }, b"a", now());
        assert_eq!(chunk(0, 3), Ok(Progress::Partial));
        assert_eq!(chunk(1, 4), Err(BadChunk::Size { blob: digest, size: 4, known: 3 }));
    }

    #[test]
    fn a_blob_over_its_limit_is_refused_before_it_is_stored() {
        let digest = BlobDigest::of(b"x");
        let mut fetches = Fetches::default();
        fetches.start(digest, 2, now());
        let blob = Blob { blob: digest, offset: 0, size: 3 };
        let refused = fetches.handle_chunk(&blob, b"a", now());
        assert_eq!(refused, Err(BadChunk::TooLarge { blob: digest, size: 3, bytes_max: 2 }));
        assert!(!fetches.is_wanted(&digest));
    }

    #[test]
    fn a_stalled_fetch_asks_again() {
        let mut fetches = Fetches::default();
        let start = now();
        fetches.start(BlobDigest::of(b"x"), BYTES_MAX, start);
        let first = requests(&mut fetches);
        fetches.handle_timeout(start);
        assert_eq!(requests(&mut fetches), []);
        fetches.handle_timeout(start + STALL);
        assert_eq!(requests(&mut fetches), first);
    }

    fn requests(fetches: &mut Fetches) -> Vec<ChunkRequest> {
        std::iter::from_fn(|| fetches.poll_request()).collect()
    }

    fn answer(
        fetches: &mut Fetches,
        content: &[u8],
        request: ChunkRequest,
    ) -> Result<Progress, BadChunk> {
        let start = usize::try_from(request.offset).unwrap();
        let end = content.len().min(start + request.length as usize);
        let blob = Blob { blob: request.blob, offset: request.offset, size: content.len() as u64 };
        fetches.handle_chunk(&blob, &content[start..end], now())
    }

    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    fn now() -> Instant {
        Instant::now()
    }
}
