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
//! A fetch that nobody waits for yet is in the *background*: there is at most one of them, it asks
//! for one chunk at a time, and for none while others are under way. It comes to the foreground when
//! it is started as such.
//!
//! A fetch asks for chunks in order and keeps [`WINDOW`] of them between being asked for and being
//! stored, so that a chunk is travelling while the last one is stored, and a slow disk is never sent
//! more than it takes. Nothing here sends, keeps or verifies bytes; the shell does: it tells what
//! arrived ([`Fetches::handle_chunk`]) and what it has stored of that ([`Fetches::handle_stored`]),
//! and after every event it takes requests with [`Fetches::poll_request`] until there are none.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use protocol::{BlobDigest, limits};

/// Chunks of one fetch that are asked for ahead of what is stored.
const WINDOW: u64 = 4;

/// A fetch without the chunk that it asked for, for this long, asks again.
const STALL: Duration = Duration::from_secs(2);

/// Bytes of one chunk.
const CHUNK_BYTES: u64 = 1 << 20;
const _: () = assert!(CHUNK_BYTES == limits::UPLOAD_CHUNK_BYTES_MAX as u64);

/// All blobs of one kind on their way.
#[derive(Debug)]
pub struct Fetches {
    at_once: usize,
    under_way: BTreeMap<BlobDigest, Fetch>,
    /// In order, with the bytes that each may have.
    waiting: VecDeque<(BlobDigest, u64)>,
    /// The one that is under way in the background.
    background: Option<BlobDigest>,
    requests: VecDeque<ChunkRequest>,
}

/// **Invariant:** `stored <= received <= size`.
#[derive(Debug)]
struct Fetch {
    bytes_max: u64,
    /// Bytes of the whole blob, once the first chunk told.
    size: Option<u64>,
    stored: u64,
    received: u64,
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

/// What to do with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// These are the next bytes of the blob: store them.
    Next,
    /// The chunk is not one that was waited for.
    Ignored,
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More chunks are to come, or nothing of the kind is under way.
    Partial,
    /// The blob is stored as a whole, and the fetch is over. Its digest is not verified yet.
    Complete,
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
    /// No fetches; `at_once` will be under way at a time.
    pub fn new(at_once: usize) -> Self {
        let (under_way, waiting, background, requests) = Default::default();
        Self { at_once, under_way, waiting, background, requests }
    }

    /// Begins to fetch `blob`, which may have `bytes_max` bytes, when its turn comes.
    pub fn start(&mut self, blob: BlobDigest, bytes_max: u64, now: Instant) {
        if self.background == Some(blob) {
            return self.bring_forward(blob, now);
        }
        if !self.is_wanted(&blob) {
            self.waiting.push_back((blob, bytes_max));
            self.begin_waiting(now);
        }
    }

    /// Begins to fetch `blob` in the background, in place of what is fetched there.
    pub fn start_background(&mut self, blob: BlobDigest, bytes_max: u64, now: Instant) {
        if self.is_wanted(&blob) {
            return;
        }
        if let Some(before) = self.background.take() {
            self.end(&before, now);
        }
        // ## absent => background
        self.background = Some(blob);
        let fetch =
            Fetch { bytes_max, size: None, stored: 0, received: 0, asked: 0, progress: now };
        self.under_way.insert(blob, fetch);
        self.go_on_behind(now);
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

    /// A chunk of `bytes` bytes arrived.
    ///
    /// # Errors
    /// When the chunk cannot belong to the blob; the fetch is over.
    pub fn handle_chunk(
        &mut self,
        message: &protocol::worker::Blob,
        bytes: usize,
        now: Instant,
    ) -> Result<Arrived, BadChunk> {
        let blob = message.blob;
        let Some(fetch) = self.under_way.get_mut(&blob) else { return Ok(Arrived::Ignored) };
        if message.offset != fetch.received {
            return Ok(Arrived::Ignored);
        }
        if let Err(bad) = fetch.accept(message, bytes, now) {
            self.end(&blob, now);
            return Err(bad);
        }
        if self.background != Some(blob) {
            fetch.fill_window(blob, &mut self.requests);
        }
        Ok(Arrived::Next)
    }

    /// The first `stored` bytes of `blob` are where they belong.
    pub fn handle_stored(&mut self, blob: &BlobDigest, stored: u64, now: Instant) -> Progress {
        let Some(fetch) = self.under_way.get_mut(blob) else { return Progress::Partial };
        fetch.stored = stored.clamp(fetch.stored, fetch.received);
        if fetch.size == Some(fetch.stored) {
            self.end(blob, now);
            return Progress::Complete;
        }
        if !fetch.is_waiting() {
            // Whatever is asked for now is awaited from now on.
            fetch.progress = now;
        }
        if self.background == Some(*blob) {
            self.go_on_behind(now);
        } else {
            fetch.fill_window(*blob, &mut self.requests);
        }
        Progress::Partial
    }

    /// The connection is a new one: what was asked for on the old one is asked again.
    pub fn handle_reconnect(&mut self, now: Instant) {
        self.requests.clear();
        for (&blob, fetch) in &mut self.under_way {
            if fetch.is_waiting() {
                self.requests.push_back(fetch.ask_again(blob, now));
            }
        }
    }

    /// Asks again for what has stalled.
    pub fn handle_timeout(&mut self, now: Instant) {
        for (&blob, fetch) in &mut self.under_way {
            if fetch.stalls_at().is_some_and(|at| at <= now) {
                self.requests.push_back(fetch.ask_again(blob, now));
            }
        }
    }

    /// The next chunk to ask for, until there is none.
    pub fn poll_request(&mut self) -> Option<ChunkRequest> {
        self.requests.pop_front()
    }

    /// When `handle_timeout` is due, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.values().filter_map(Fetch::stalls_at).min()
    }

    /// Ends the fetch of `blob` and begins those that now have their turn.
    fn end(&mut self, blob: &BlobDigest, now: Instant) {
        self.under_way.remove(blob); // ## under way => gone
        self.requests.retain(|request| request.blob != *blob);
        self.background.take_if(|background| background == blob);
        self.begin_waiting(now);
        self.go_on_behind(now);
    }

    /// Somebody waits for the blob that is under way in the background.
    fn bring_forward(&mut self, blob: BlobDigest, now: Instant) {
        self.background = None;
        // ## background => under way
        let Some(fetch) = self.under_way.get_mut(&blob) else { return };
        if fetch.asked == 0 {
            fetch.progress = now;
            fetch.asked = CHUNK_BYTES;
            self.requests.push_back(chunk_at(blob, 0));
        } else {
            if !fetch.is_waiting() {
                fetch.progress = now;
            }
            fetch.fill_window(blob, &mut self.requests);
        }
    }

    /// Asks for the next chunk in the background, if nothing else is under way and the last one is
    /// stored.
    fn go_on_behind(&mut self, now: Instant) {
        let Some(blob) = self.background else { return };
        if self.under_way.len() > 1 {
            return;
        }
        let Some(fetch) = self.under_way.get_mut(&blob) else { return };
        let is_stored = fetch.stored == fetch.asked;
        if is_stored && fetch.size.is_none_or(|size| fetch.asked < size) {
            fetch.progress = now;
            self.requests.push_back(chunk_at(blob, fetch.asked));
            fetch.asked += CHUNK_BYTES;
        }
    }

    /// How many fetches are under way that somebody waits for.
    fn in_front(&self) -> usize {
        self.under_way.len() - usize::from(self.background.is_some())
    }

    fn begin_waiting(&mut self, now: Instant) {
        while self.in_front() < self.at_once
            && let Some((blob, bytes_max)) = self.waiting.pop_front()
        {
            // ## waiting => under way
            let (size, stored, received) = (None, 0, 0);
            let asked = CHUNK_BYTES;
            let fetch = Fetch { bytes_max, size, stored, received, asked, progress: now };
            self.under_way.insert(blob, fetch);
            self.requests.push_back(chunk_at(blob, 0));
        }
    }
}

impl Fetch {
    fn accept(
        &mut self,
        message: &protocol::worker::Blob,
        bytes: usize,
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
        if bytes == 0 || self.received + bytes as u64 > size {
            return Err(BadChunk::Length { blob, offset, bytes, size });
        }
        self.size = Some(size);
        self.received += bytes as u64;
        self.progress = now;
        Ok(())
    }

    /// Whether bytes were asked for that have not come.
    fn is_waiting(&self) -> bool {
        self.received < self.size.map_or(self.asked, |size| size.min(self.asked))
    }

    fn stalls_at(&self) -> Option<Instant> {
        self.is_waiting().then(|| self.progress + STALL)
    }

    fn fill_window(&mut self, blob: BlobDigest, requests: &mut VecDeque<ChunkRequest>) {
        let end = self.size.unwrap_or(0).min(self.stored + WINDOW * CHUNK_BYTES);
        while self.asked < end {
            requests.push_back(chunk_at(blob, self.asked));
            self.asked += CHUNK_BYTES;
        }
    }

    fn ask_again(&mut self, blob: BlobDigest, now: Instant) -> ChunkRequest {
        self.progress = now;
        self.asked = self.received + CHUNK_BYTES;
        chunk_at(blob, self.received)
    }
}

fn chunk_at(blob: BlobDigest, offset: u64) -> ChunkRequest {
    ChunkRequest { blob, offset, length: 1 << 20 }
}

#[cfg(test)]
mod tests;
