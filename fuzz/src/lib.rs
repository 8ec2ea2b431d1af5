//! What the fuzz targets do with the bytes that they are given, and what must hold then.
//!
//! The tests of `adapter` include [`checks`] as a file and run it on the corpora.

mod checks;

pub use checks::{any_file, any_keys};
