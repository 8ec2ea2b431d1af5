//! Any bytes as a LoRA file and as a canonical adapter.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    luna_fuzz::any_file(bytes);
});
