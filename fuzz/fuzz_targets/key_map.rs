//! Sound LoRA files whose keys, types and shapes the fuzzer chooses.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    luna_fuzz::any_keys(bytes);
});
