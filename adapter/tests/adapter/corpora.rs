//! The corpora of the fuzz targets, replayed: what a fuzzer once found stays fixed.
//!
//! `cargo xtask fuzz` looks for more.

use std::{panic::catch_unwind, path::Path};

#[path = "../../../fuzz/src/checks.rs"]
#[expect(unreachable_pub, reason = "the fuzz targets use the same file from another crate")]
mod checks;

#[test]
fn the_corpus_of_any_bytes_holds_what_must_hold() {
    replay("safetensors", checks::any_file);
}

#[test]
fn the_corpus_of_any_keys_holds_what_must_hold() {
    replay("key_map", checks::any_keys);
}

/// Calls `check` on every file of a corpus. It panics where something is wrong, and says whether an
/// adapter came out: a corpus has many of both.
fn replay(target: &str, check: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).unwrap();
    let accepted: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            catch_unwind(|| check(&bytes)).unwrap_or_else(|_| panic!("{}", path.display()))
        })
        .collect();
    let adapters = accepted.iter().filter(|is_adapter| **is_adapter).count();
    assert!(adapters >= 20, "{adapters} of {} files are adapters", accepted.len());
    assert!(adapters < accepted.len(), "all {adapters} files are adapters");
}
