//! Uploads that break off: what stays of them over crashes, damage and full disks.

use std::fs::OpenOptions;

use proptest::{collection::vec, prelude::*};

use super::*;

const SIZE: usize = 300_000;

#[test]
fn an_upload_that_was_put_aside_goes_on_in_the_same_process() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let file = content();
    assert_eq!(begin_part(&mut store, "u1", Some(name_of(&file))), 0);
    append(&mut store, "u1", &file[..10]);
    keep(&mut store, "u1").unwrap();
    assert!(matches!(keep(&mut store, "u1"), Err(OpError::NotOpen(_))));

    assert_eq!(begin_part(&mut store, "u2", Some(name_of(&file))), 10);
    append(&mut store, "u2", &file[10..]);
    commit(&mut store, "u2", UploadFormat::Model, Some(BlobDigest::of(&file))).unwrap();

    let blob = BlobName::ModelFile(BlobDigest::of(&file));
    assert_eq!(read_blob(&mut store, blob).unwrap(), file);
    assert_eq!(files_in(directory.path(), "uploads"), 0);
}

#[test]
fn an_upload_goes_on_after_a_crash_where_it_was_last_recorded() {
    let directory = directory();
    let file = content();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    begin_part(&mut store, "u1", Some(name_of(&file)));
    append(&mut store, "u1", &file[..200_000]);
    append(&mut store, "u1", &file[200_000..200_005]);
    drop(store);

    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(found.parts.len(), 1);
    assert_eq!((found.parts[0].part, found.parts[0].bytes), (name_of(&file), 200_000));
    assert_eq!(begin_part(&mut store, "u2", Some(name_of(&file))), 200_000);
    append(&mut store, "u2", &file[200_000..]);
    commit(&mut store, "u2", UploadFormat::Model, Some(BlobDigest::of(&file))).unwrap();
    assert_eq!(files_in(directory.path(), "uploads"), 0);
}

#[test]
fn a_process_that_ends_in_order_loses_no_byte() {
    let directory = directory();
    let file = content();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    begin_part(&mut store, "u1", Some(name_of(&file)));
    append(&mut store, "u1", &file[..5]);
    store.close();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(begin_part(&mut store, "u2", Some(name_of(&file))), 5);
}

#[test]
fn parts_of_other_files_are_no_help_and_can_be_dropped() {
    let directory = directory();
    let file = content();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    begin_part(&mut store, "u1", Some(name_of(&file)));
    append(&mut store, "u1", &file[..100_000]);
    keep(&mut store, "u1").unwrap();
    let mut other = name_of(&file);
    other.size += 1;
    assert_eq!(begin_part(&mut store, "u2", Some(other)), 0);
    store.execute(BlobOp::Abort { upload: "u2".parse().unwrap() }, &mut Vec::new()).unwrap();
    assert_eq!(files_in(directory.path(), "uploads"), 2);

    let parts = vec![other, name_of(&file)];
    store.execute(BlobOp::DropParts { parts }, &mut Vec::new()).unwrap();
    assert_eq!(files_in(directory.path(), "uploads"), 0);
    assert_eq!(begin_part(&mut store, "u3", Some(name_of(&file))), 0);
}

#[test]
fn of_two_parts_of_one_file_the_longer_one_is_found() {
    let directory = directory();
    let file = content();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    for (name, length) in [("u1", 70_000), ("u2", 140_000), ("u3", 90_000)] {
        begin_part(&mut store, name, Some(name_of(&file)));
        append(&mut store, name, &file[..length]);
    }
    store.close();
    let (mut store, found) = BlobStore::open(directory.path()).unwrap();
    assert_eq!(found.parts.len(), 1);
    assert_eq!(files_in(directory.path(), "uploads"), 2);
    assert_eq!(begin_part(&mut store, "u4", Some(name_of(&file))), 140_000);
}

#[test]
fn a_part_that_cannot_be_read_is_sent_again() {
    let directory = directory();
    let file = content();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    begin_part(&mut store, "u1", Some(name_of(&file)));
    append(&mut store, "u1", &file[..100_000]);
    store.close();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    for entry in fs::read_dir(directory.path().join("uploads")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(begin_part(&mut store, "u2", Some(name_of(&file))), 0);
    append(&mut store, "u2", &file);
    commit(&mut store, "u2", UploadFormat::Model, Some(BlobDigest::of(&file))).unwrap();
}

#[test]
fn a_full_disk_is_a_typed_error_that_costs_the_upload_and_nothing_else() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let file = content();
    begin_part(&mut store, "u1", Some(name_of(&file)));
    append(&mut store, "u1", &file[..100_000]);
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    store.parts.get_mut(&"u1".parse().unwrap()).unwrap().write_to(full);

    let bytes = Bytes::copy_from_slice(&file[100_000..]);
    let op = BlobOp::Append { upload: "u1".parse().unwrap(), bytes };
    let failure = Failure::from(store.execute(op, &mut Vec::new()).unwrap_err());
    assert_eq!(failure.code, ErrorCode::StoreFull);
    assert!(failure.retry_after_ms.is_some());
    assert!(failure.message.contains("No space left"), "{}", failure.message);
    assert!(failure.message.contains("make room"), "{}", failure.message);

    assert_eq!(files_in(directory.path(), "uploads"), 0, "the room is free again");
    assert!(matches!(keep(&mut store, "u1"), Err(OpError::NotOpen(_))));
    upload(&mut store, "u2", &lora()).unwrap();
}

#[test]
fn a_disk_that_is_full_at_the_end_keeps_nothing_of_it() {
    let directory = directory();
    let (mut store, _) = BlobStore::open(directory.path()).unwrap();
    let new = directory.path().join("uploads").join("new");
    std::os::unix::fs::symlink("/dev/full", &new).unwrap();
    let failure = Failure::from(upload(&mut store, "u1", &lora()).unwrap_err());
    assert_eq!(failure.code, ErrorCode::StoreFull);
    assert_eq!(files_in(directory.path(), "uploads"), 0);
    assert_eq!(files_in(directory.path(), "blobs"), 1, "a directory, and nothing in it");
    upload(&mut store, "u2", &lora()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a crash, a power cut or the disk leaves of a part and of its records: what is gone
    /// on with is what was sent, and so is the file in the end.
    #[test]
    fn what_is_believed_of_a_part_is_what_was_sent(
        sent in 0..SIZE,
        steps in vec(1..120_000_usize, 1..6),
        part_length in option_length(),
        sums_length in option_length(),
        flips in vec((any::<bool>(), any::<prop::sample::Index>()), 0..3),
    ) {
        let directory = directory();
        let file = content();
        let (mut store, _) = BlobStore::open(directory.path()).unwrap();
        begin_part(&mut store, "u1", Some(name_of(&file)));
        let mut at = 0;
        for step in steps {
            let end = sent.min(at + step);
            append(&mut store, "u1", &file[at..end]);
            at = end;
        }
        drop(store);
        damage(directory.path(), "part", part_length, &flips, false);
        damage(directory.path(), "sums", sums_length, &flips, true);

        let (mut store, found) = BlobStore::open(directory.path()).unwrap();
        prop_assert_eq!(found.model_files, vec![], "no half file is ever visible");
        let received = begin_part(&mut store, "u2", Some(name_of(&file)));
        let received = usize::try_from(received).unwrap();
        prop_assert!(received <= at);
        if part_length.is_none() && sums_length.is_none() && flips.is_empty() {
            prop_assert!(at - received < 64 << 10, "{} of {} are left", received, at);
        }
        append(&mut store, "u2", &file[received..]);
        let digest = BlobDigest::of(&file);
        commit(&mut store, "u2", UploadFormat::Model, Some(digest)).unwrap();
        prop_assert!(read_blob(&mut store, BlobName::ModelFile(digest)).unwrap() == file);
        prop_assert_eq!(files_in(directory.path(), "uploads"), 0);
    }
}

/// The length that a file is cut to, or lengthened to with zeros.
fn option_length() -> impl Strategy<Value = Option<u64>> {
    prop::option::of(0..SIZE as u64 + 1000)
}

/// Cuts and flips bits in the files of one ending.
fn damage(
    directory: &Path,
    ending: &str,
    length: Option<u64>,
    flips: &[(bool, prop::sample::Index)],
    which: bool,
) {
    for entry in fs::read_dir(directory.join("uploads")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|found| found != ending) {
            continue;
        }
        if let Some(length) = length {
            OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        for (_, index) in flips.iter().filter(|(concerned, _)| *concerned == which) {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] ^= 1;
            }
        }
        fs::write(&path, bytes).unwrap();
    }
}

fn keep(store: &mut BlobStore, name: &str) -> Result<BlobOutcome, OpError> {
    store.execute(BlobOp::Keep { upload: name.parse().unwrap() }, &mut Vec::new())
}

fn files_in(directory: &Path, name: &str) -> usize {
    fs::read_dir(directory.join(name)).unwrap().count()
}

fn name_of(file: &[u8]) -> PartName {
    let (digest, size) = (BlobDigest::of(file), file.len() as u64);
    PartName { format: UploadFormat::Model, digest, size }
}

/// Bytes without a period that a cut could hide behind.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}
