//! Scenarios of fetches.

use protocol::worker::Blob;

use super::*;

const MIB: usize = 1 << 20;
const BYTES_MAX: u64 = 100 << 20;

#[test]
fn a_large_blob_arrives_whole_with_a_window_under_way() {
    let (content, digest) = (6 * MIB + 17, BlobDigest::of(b"x"));
    let mut fetches = Fetches::new(4);
    fetches.start(digest, BYTES_MAX, now());
    let mut asked = requests(&mut fetches);
    let mut under_way_max = 0;
    loop {
        under_way_max = under_way_max.max(asked.len());
        match answer(&mut fetches, content, asked.remove(0)) {
            Progress::Partial => asked.extend(requests(&mut fetches)),
            Progress::Complete => break,
        }
    }
    assert_eq!(under_way_max, 4);
    assert_eq!(fetches.poll_timeout(), None);
}

#[test]
fn a_few_fetches_are_under_way_and_the_others_follow_in_order() {
    let mut fetches = Fetches::new(4);
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
    let complete = answer(&mut fetches, 1, chunk_at(digests[1], 0));
    assert_eq!(complete, Progress::Complete);
    assert_eq!(requests(&mut fetches), [chunk_at(digests[6], 0)]);
    assert!(!fetches.is_wanted(&digests[5]) && fetches.is_wanted(&digests[6]));
}

#[test]
fn a_fetch_that_is_wanted_twice_is_made_once() {
    let mut fetches = Fetches::new(4);
    let digest = BlobDigest::of(b"x");
    fetches.start(digest, BYTES_MAX, now());
    fetches.start(digest, BYTES_MAX, now());
    assert_eq!(requests(&mut fetches), [chunk_at(digest, 0)]);
}

#[test]
fn after_a_reconnect_the_fetch_goes_on_where_it_was() {
    let digest = BlobDigest::of(b"x");
    let mut fetches = Fetches::new(4);
    fetches.start(digest, BYTES_MAX, now());
    let first = requests(&mut fetches)[0];
    answer(&mut fetches, 3 * MIB, first);

    fetches.handle_reconnect(now());
    assert_eq!(requests(&mut fetches), [chunk_at(digest, MIB as u64)]);
}

#[test]
fn a_chunk_of_a_wrong_place_is_ignored_and_of_a_wrong_size_ends_the_fetch() {
    let digest = BlobDigest::of(b"x");
    let mut fetches = Fetches::new(4);
    fetches.start(digest, BYTES_MAX, now());
    let mut chunk = |offset, size, bytes| {
        fetches.handle_chunk(&Blob { blob: digest, offset, size }, bytes, now())
    };
    assert_eq!(chunk(5, 10, 3), Ok(Arrived::Ignored));
    assert!(matches!(chunk(0, 2, 3), Err(BadChunk::Length { .. })));
    assert_eq!(chunk(0, 3, 3), Ok(Arrived::Ignored), "the fetch is over");
}

#[test]
fn a_size_never_changes() {
    let digest = BlobDigest::of(b"x");
    let mut fetches = Fetches::new(4);
    fetches.start(digest, BYTES_MAX, now());
    let mut chunk =
        |offset, size| fetches.handle_chunk(&Blob { blob: digest, offset, size }, 1, now());
    assert_eq!(chunk(0, 3), Ok(Arrived::Next));
    assert_eq!(chunk(1, 4), Err(BadChunk::Size { blob: digest, size: 4, known: 3 }));
}

#[test]
fn a_blob_over_its_limit_is_refused_before_it_is_stored() {
    let digest = BlobDigest::of(b"x");
    let mut fetches = Fetches::new(4);
    fetches.start(digest, 2, now());
    let blob = Blob { blob: digest, offset: 0, size: 3 };
    let refused = fetches.handle_chunk(&blob, 1, now());
    assert_eq!(refused, Err(BadChunk::TooLarge { blob: digest, size: 3, bytes_max: 2 }));
    assert!(!fetches.is_wanted(&digest));
}

#[test]
fn a_stalled_fetch_asks_again() {
    let mut fetches = Fetches::new(4);
    let start = now();
    fetches.start(BlobDigest::of(b"x"), BYTES_MAX, start);
    let first = requests(&mut fetches);
    fetches.handle_timeout(start);
    assert_eq!(requests(&mut fetches), []);
    fetches.handle_timeout(start + STALL);
    assert_eq!(requests(&mut fetches), first);
}

#[test]
fn what_is_not_stored_holds_back_what_is_asked_for() {
    let (size, digest, start) = (9 * MIB as u64, BlobDigest::of(b"x"), now());
    let mut fetches = Fetches::new(1);
    fetches.start(digest, BYTES_MAX, start);
    let mut received = 0;
    let mut take_all = |fetches: &mut Fetches| {
        while let Some(ChunkRequest { blob, offset, .. }) = fetches.poll_request() {
            let arrived = fetches.handle_chunk(&Blob { blob, offset, size }, MIB, start);
            assert_eq!(arrived, Ok(Arrived::Next));
            received += MIB as u64;
        }
        received >> 20
    };
    assert_eq!(take_all(&mut fetches), 4, "a window, and none of it stored");
    assert_eq!(fetches.poll_timeout(), None, "the disk is slow, and not the broker");
    fetches.handle_reconnect(start);
    assert_eq!(fetches.poll_request(), None);

    assert_eq!(fetches.handle_stored(&digest, 2 << 20, start + STALL), Progress::Partial);
    assert_eq!(fetches.poll_timeout(), Some(start + 2 * STALL));
    assert_eq!(take_all(&mut fetches), 6);
    assert_eq!(fetches.handle_stored(&digest, 6 << 20, start), Progress::Partial);
    assert_eq!(take_all(&mut fetches), 9);
    assert_eq!(fetches.handle_stored(&digest, 8 << 20, start), Progress::Partial);
    assert_eq!(fetches.handle_stored(&digest, 9 << 20, start), Progress::Complete);
    assert!(!fetches.is_wanted(&digest));
}

#[test]
fn a_fetch_in_the_background_asks_chunk_by_chunk_and_stops_for_others() {
    let (behind, urgent) = (BlobDigest::of(b"behind"), BlobDigest::of(b"urgent"));
    let mut fetches = Fetches::new(1);
    fetches.start_background(behind, BYTES_MAX, now());
    assert_eq!(requests(&mut fetches), [chunk_at(behind, 0)]);
    answer(&mut fetches, 3 * MIB, chunk_at(behind, 0));
    assert_eq!(requests(&mut fetches), [chunk_at(behind, MIB as u64)], "one at a time");

    fetches.start(urgent, BYTES_MAX, now());
    assert_eq!(requests(&mut fetches), [chunk_at(urgent, 0)], "it does not take the only place");
    answer(&mut fetches, 3 * MIB, chunk_at(behind, MIB as u64));
    assert_eq!(requests(&mut fetches), [], "no more bytes while others are under way");
    assert_eq!(answer(&mut fetches, 9, chunk_at(urgent, 0)), Progress::Complete);
    assert_eq!(requests(&mut fetches), [chunk_at(behind, 2 * MIB as u64)]);
    let last = answer(&mut fetches, 3 * MIB, chunk_at(behind, 2 * MIB as u64));
    assert_eq!(last, Progress::Complete);
    assert!(!fetches.is_wanted(&behind));
    assert_eq!(fetches.poll_timeout(), None);
}

#[test]
fn a_fetch_comes_out_of_the_background_with_what_it_has() {
    let digest = BlobDigest::of(b"x");
    let mut fetches = Fetches::new(1);
    fetches.start_background(digest, BYTES_MAX, now());
    requests(&mut fetches);
    answer(&mut fetches, 6 * MIB, chunk_at(digest, 0));
    assert_eq!(requests(&mut fetches), [chunk_at(digest, MIB as u64)]);

    fetches.start(digest, BYTES_MAX, now());
    let window: Vec<_> = (2..5).map(|mib| chunk_at(digest, mib * MIB as u64)).collect();
    assert_eq!(requests(&mut fetches), window);
    assert!(fetches.poll_timeout().is_some());
}

#[test]
fn a_stopped_fetch_leaves_the_background() {
    let (one, other) = (BlobDigest::of(b"one"), BlobDigest::of(b"other"));
    let mut fetches = Fetches::new(1);
    fetches.start(one, BYTES_MAX, now());
    fetches.start_background(other, BYTES_MAX, now());
    assert_eq!(requests(&mut fetches), [chunk_at(one, 0)]);
    fetches.stop(&other, now());
    fetches.stop(&one, now());
    assert_eq!(requests(&mut fetches), []);
    assert!(!fetches.is_wanted(&other));
}

fn requests(fetches: &mut Fetches) -> Vec<ChunkRequest> {
    std::iter::from_fn(|| fetches.poll_request()).collect()
}

/// Answers a request for a blob of `size` bytes, and stores what comes.
fn answer(fetches: &mut Fetches, size: usize, request: ChunkRequest) -> Progress {
    let ChunkRequest { blob, offset, length } = request;
    let size = size as u64;
    let end = size.min(offset + u64::from(length));
    let bytes = usize::try_from(end - offset).unwrap();
    let arrived = fetches.handle_chunk(&Blob { blob, offset, size }, bytes, now());
    assert_eq!(arrived, Ok(Arrived::Next), "a chunk that was asked for is taken");
    fetches.handle_stored(&blob, end, now())
}

#[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
fn now() -> Instant {
    Instant::now()
}
