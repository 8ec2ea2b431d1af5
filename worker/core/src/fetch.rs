//! Blobs on their way from the broker's blob store: which bytes to ask for next.
//!
//! A fetch asks for chunks in order and keeps [`WINDOW`] of them under way, so that a chunk is
//! travelling while the last one is stored. Nothing here sends or verifies; the shell does.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use protocol::{BlobDigest, limits};

/// Chunks that are asked for ahead of what has arrived.
const WINDOW: u64 = 4;

/// A fetch without a chunk for this long asks again.
const STALL: Duration = Duration::from_secs(2);

/// Bytes of one chunk.
const CHUNK_BYTES: u64 = 1 << 20;
const _: () = assert!(CHUNK_BYTES == limits::UPLOAD_CHUNK_BYTES_MAX as u64);

/// All blobs on their way.
#[derive(Debug, Default)]
pub struct Fetches {
    by_digest: BTreeMap<BlobDigest, Fetch>,
}

#[derive(Debug)]
struct Fetch {
    bytes: Vec<u8>,
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
    /// Ask for these.
    More(Vec<ChunkRequest>),
    /// The blob is complete; its digest is not verified yet.
    Complete(Vec<u8>),
    /// The chunk is not one that was waited for.
    Ignored,
}

/// A chunk that cannot belong to the blob it claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadChunk {
    /// The blob is larger than any upload may be, or changed its size.
    #[error("blob {blob} is announced with {size} bytes: at most {max} are accepted, and a size never changes", max = limits::UPLOAD_BYTES_MAX)]
    Size {
        /// The blob.
        blob: BlobDigest,
        /// The announced size.
        size: u64,
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
    /// Begins to fetch `blob`.
    pub fn start(&mut self, blob: BlobDigest, now: Instant) -> ChunkRequest {
        let fetch = Fetch { bytes: Vec::new(), size: None, asked: CHUNK_BYTES, progress: now };
        self.by_digest.insert(blob, fetch);
        chunk_at(blob, 0)
    }

    /// Gives up on `blob`.
    pub fn stop(&mut self, blob: &BlobDigest) {
        self.by_digest.remove(blob);
    }

    /// Whether bytes of `blob` are waited for.
    pub fn is_under_way(&self, blob: &BlobDigest) -> bool {
        self.by_digest.contains_key(blob)
    }

    /// A chunk arrived.
    ///
    /// # Errors
    /// When the chunk cannot belong to the blob; the fetch is over.
    pub fn handle_chunk(
        &mut self,
        blob: &protocol::worker::Blob,
        chunk: &[u8],
        now: Instant,
    ) -> Result<Progress, BadChunk> {
        let digest = blob.blob;
        let Some(fetch) = self.by_digest.get_mut(&digest) else { return Ok(Progress::Ignored) };
        if blob.offset != fetch.received() {
            return Ok(Progress::Ignored);
        }
        if let Err(bad) = fetch.accept(blob, chunk, now) {
            self.by_digest.remove(&digest);
            return Err(bad);
        }
        if fetch.received() == blob.size {
            let bytes = self.by_digest.remove(&digest).map(|fetch| fetch.bytes);
            return Ok(Progress::Complete(bytes.unwrap_or_default()));
        }
        Ok(Progress::More(fetch.ask(digest)))
    }

    /// What to ask again: everything after a reconnect, else what has stalled.
    pub fn ask_again(&mut self, reconnected: bool, now: Instant) -> Vec<ChunkRequest> {
        let mut requests = Vec::new();
        for (&blob, fetch) in &mut self.by_digest {
            if reconnected || now.saturating_duration_since(fetch.progress) >= STALL {
                fetch.progress = now;
                fetch.asked = fetch.received() + CHUNK_BYTES;
                requests.push(chunk_at(blob, fetch.received()));
            }
        }
        requests
    }

    /// When a fetch will have stalled, if any is under way.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.by_digest.values().map(|fetch| fetch.progress + STALL).min()
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
        if size > limits::UPLOAD_BYTES_MAX || self.size.is_some_and(|known| known != size) {
            return Err(BadChunk::Size { blob, size });
        }
        if chunk.is_empty() || self.received() + chunk.len() as u64 > size {
            return Err(BadChunk::Length { blob, offset, bytes: chunk.len(), size });
        }
        self.size = Some(size);
        self.bytes.extend_from_slice(chunk);
        self.progress = now;
        Ok(())
    }

    /// Fills the window.
    fn ask(&mut self, blob: BlobDigest) -> Vec<ChunkRequest> {
        let end = self.size.unwrap_or(0).min(self.received() + WINDOW * CHUNK_BYTES);
        let mut requests = Vec::new();
        while self.asked < end {
            requests.push(chunk_at(blob, self.asked));
            self.asked += CHUNK_BYTES;
        }
        requests
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

    #[test]
    fn a_large_blob_arrives_whole_with_a_window_under_way() {
        let content: Vec<u8> = (0..=250).cycle().take(6 * MIB + 17).collect();
        let digest = BlobDigest::of(&content);
        let mut fetches = Fetches::default();
        let mut asked = vec![fetches.start(digest, now())];
        let mut under_way_max = 0;
        let arrived = loop {
            under_way_max = under_way_max.max(asked.len());
            let request = asked.remove(0);
            match answer(&mut fetches, &content, request).unwrap() {
                Progress::More(more) => asked.extend(more),
                Progress::Complete(bytes) => break bytes,
                Progress::Ignored => panic!("a chunk that was asked for is taken"),
            }
        };
        assert!(arrived == content);
        assert_eq!(under_way_max, 4);
        assert_eq!(fetches.poll_timeout(), None);
    }

    #[test]
    fn after_a_reconnect_the_fetch_goes_on_where_it_was() {
        let content = vec![7; 3 * MIB];
        let digest = BlobDigest::of(&content);
        let mut fetches = Fetches::default();
        let first = fetches.start(digest, now());
        answer(&mut fetches, &content, first).unwrap();

        let again = fetches.ask_again(true, now());
        assert_eq!(again, [chunk_at(digest, MIB as u64)]);
    }

    #[test]
    fn a_chunk_of_a_wrong_place_is_ignored_and_of_a_wrong_size_ends_the_fetch() {
        let digest = BlobDigest::of(b"x");
        let mut fetches = Fetches::default();
        fetches.start(digest, now());
        let mut chunk = |offset, size, bytes: &[u8]| {
            fetches.handle_chunk(&Blob { blob: digest, offset, size }, bytes, now())
        };
        assert_eq!(chunk(5, 10, b"abc"), Ok(Progress::Ignored));
        assert!(matches!(chunk(0, 2, b"abc"), Err(BadChunk::Length { .. })));
        assert_eq!(chunk(0, 3, b"abc"), Ok(Progress::Ignored), "the fetch is over");
    }

    #[test]
    fn a_blob_over_the_limit_is_refused_before_it_is_stored() {
        let digest = BlobDigest::of(b"x");
        let mut fetches = Fetches::default();
        fetches.start(digest, now());
        let blob = Blob { blob: digest, offset: 0, size: u64::MAX };
        assert!(matches!(fetches.handle_chunk(&blob, b"a", now()), Err(BadChunk::Size { .. })));
    }

    #[test]
    fn a_stalled_fetch_asks_again() {
        let mut fetches = Fetches::default();
        let start = now();
        let first = fetches.start(BlobDigest::of(b"x"), start);
        assert_eq!(fetches.ask_again(false, start), []);
        assert_eq!(fetches.ask_again(false, start + STALL), [first]);
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
