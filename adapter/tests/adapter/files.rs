//! Files for tests: the seeded ones of the repository, and small ones built from a list of tensors.

use std::{fmt::Write as _, path::Path};

use half::{bf16, f16};

/// One tensor of a file under construction.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// The seeded file `name`, for example `sd15/kohya`.
pub(crate) fn seeded(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/loras_tiny");
    let path = folder.join(format!("{name}.safetensors"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A safetensors file of `entries` in this order.
pub(crate) fn file(entries: &[Entry]) -> Vec<u8> {
    let mut header = String::from("{\"__metadata__\":{\"ss_output_name\":\"test\"}");
    let mut data = Vec::new();
    for Entry { name, dtype, shape, bytes } in entries {
        let (start, end) = (data.len(), data.len() + bytes.len());
        write!(
            header,
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        )
        .unwrap();
        data.extend_from_slice(bytes);
    }
    header.push('}');
    with_header(&header, &data)
}

/// A file of exactly this header and data.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A tensor of f32 values.
pub(crate) fn float32(name: &str, shape: &[usize], values: &[f32]) -> Entry {
    entry(name, "F32", shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// A tensor of values rounded to f16.
pub(crate) fn float16(name: &str, shape: &[usize], values: &[f32]) -> Entry {
    entry(name, "F16", shape, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect())
}

/// A tensor of values rounded to bf16.
pub(crate) fn bfloat16(name: &str, shape: &[usize], values: &[f32]) -> Entry {
    entry(
        name,
        "BF16",
        shape,
        values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    )
}

/// A tensor of raw bytes.
pub(crate) fn entry(name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Entry {
    Entry { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

/// Up [3, 2] and down [2, 2] under `prefix` with the suffixes `up` and `down`, filled with `fill`.
pub(crate) fn pair(prefix: &str, [up, down]: [&str; 2], fill: f32) -> [Entry; 2] {
    [
        float32(&format!("{prefix}{up}"), &[3, 2], &[fill; 6]),
        float32(&format!("{prefix}{down}"), &[2, 2], &[fill; 4]),
    ]
}
