//! Broken and malicious files: always a typed error, never a panic, never a large allocation.

use std::{cell::Cell, fmt::Write as _, io};

use luna_adapter::{
    AdapterError, ByteSource, ErrorKind, FileError, Limits, LowRankError, MatrixError, PatchSet,
    read_lora, read_lora_with,
};
use proptest::prelude::*;

use crate::files::{Entry, entry, file, float32, pair, seeded, with_header};

const PREFIX: &str = "lora_te_text_model_encoder_layers_0_mlp_fc1";
const KOHYA: [&str; 2] = [".lora_up.weight", ".lora_down.weight"];

#[test]
fn pickles_and_other_formats_are_refused_with_advice() {
    for start in [
        &b"PK\x03\x04\x14\0\0\0\0\0archive/data.pkl"[..],
        b"\x80\x02}q\0(X\x05\0\0\0",
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0",
    ] {
        let error = read_lora(start).unwrap_err();
        assert!(matches!(error, AdapterError::File(FileError::Pickle(_))), "{error}");
        assert!(error.to_string().contains("convert it to safetensors"), "{error}");
    }
    for start in
        [&b""[..], b"{", b"\x02\0\0\0\0\0\0\0", b"<!DOCTYPE html><html>", b"GGUF\x03\0\0\0\0\0\0\0"]
    {
        let error = read_lora(start).unwrap_err();
        assert!(matches!(error, AdapterError::File(FileError::NotSafetensors)), "{error}");
    }
}

#[test]
fn a_header_whose_length_looks_like_a_pickle_is_still_a_header() {
    // 0x0280 little-endian is the PROTO 2 opcode of a pickle.
    let header = format!("{:<1$}", "{}", 0x0280);
    assert!(read_lora(with_header(&header, &[]).as_slice()).unwrap().0.is_empty());
}

#[test]
fn duplicate_names_are_refused() {
    let [up, down] = pair(PREFIX, KOHYA, 0.5);
    let name = up.name.clone();
    let error = file_error(&file(&[up.clone(), down, up]));
    assert!(
        matches!(&error, FileError::DuplicateName { name: found } if *found == name),
        "{error}"
    );
    let error = file_error(&with_header(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]));
    assert!(matches!(error, FileError::DuplicateName { .. }), "{error}");
}

#[test]
fn a_million_empty_tensors_are_refused_by_the_header_limit() {
    let mut header = String::from("{");
    for index in 0..1_400_000 {
        write!(header, r#""{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"#).unwrap();
    }
    header.replace_range(header.len() - 1.., "}");
    let bytes = with_header(&header, &[]);
    let source = CountingSource { bytes: &bytes, read: Cell::new(0) };
    let error = read_lora(&source).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::HeaderTooLarge { .. })), "{error}");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    assert!(source.read.get() < 64, "{} bytes were read", source.read.get());
}

#[test]
fn more_tensors_than_the_limit_are_refused() {
    let entries: Vec<_> =
        (0..8193).map(|index| entry(&format!("t{index}"), "U8", &[0], Vec::new())).collect();
    assert!(read_lora(file(&entries[..8192]).as_slice()).unwrap().0.is_empty());
    let error = file_error(&file(&entries));
    assert!(matches!(error, FileError::TooManyTensors { limit: 8192 }), "{error}");
}

#[test]
fn sizes_that_overflow_or_lie_are_refused() {
    let huge = usize::MAX;
    let shapes = [
        (format!("[{huge}, 0]"), "[0, 0]"),
        (format!("[0, {huge}]"), "[0, 0]"),
        (format!("[{huge}, 2]"), "[0, 8]"),
        (format!("[{huge}]"), "[0, 8]"),
        ("[4294967296, 4294967296]".to_owned(), "[0, 8]"),
        ("[3]".to_owned(), "[0, 8]"),
        ("[2]".to_owned(), "[8, 0]"),
        ("[]".to_owned(), "[0, 8]"),
        ("[2]".to_owned(), "[18446744073709551608, 0]"),
    ];
    for (shape, offsets) in shapes {
        let header = format!(
            r#"{{"lora_te_x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#
        );
        let error = file_error(&with_header(&header, &[0; 8]));
        assert!(matches!(error, FileError::TensorSize { .. }), "{shape} {offsets}: {error}");
    }
    let half_bytes = r#"{"x":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#;
    let error = file_error(&with_header(half_bytes, &[0]));
    assert!(matches!(error, FileError::TensorSize { .. }), "{error}");
}

#[test]
fn holes_overlaps_and_ends_elsewhere_are_refused() {
    let two = |one: &str, other: &str| {
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{one}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{other}}}}}"#
        );
        file_error(&with_header(&header, &[0; 8]))
    };
    for (one, other) in
        [("[0,4]", "[0,4]"), ("[0,4]", "[2,6]"), ("[0,4]", "[5,9]"), ("[1,5]", "[5,9]")]
    {
        let error = two(one, other);
        assert!(matches!(error, FileError::TensorPlace { .. }), "{one} {other}: {error}");
    }
    let far = r#"{"a":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]}}"#;
    let error = file_error(&with_header(far, &[0; 8]));
    assert!(matches!(error, FileError::Truncated { .. }), "{error}");
    let near = r#"{"a":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}}"#;
    let error = file_error(&with_header(near, &[0; 8]));
    assert!(matches!(error, FileError::TrailingBytes { .. }), "{error}");
}

#[test]
fn headers_that_are_not_headers_are_refused() {
    let deep = format!(r#"{{"a":{}"#, "[".repeat(10_000));
    let long_name = format!(r#"{{"a":{{"dtype":"{}"}}}}"#, "F".repeat(100_000));
    for header in [
        "{",
        "{}x",
        r#"{"a":1}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[0]}}"#,
        r#"{"__metadata__":{"a":1}}"#,
        "{\"\u{1}\":{}}",
        &deep,
        &long_name,
    ] {
        let error = file_error(&with_header(header, &[]));
        assert!(matches!(error, FileError::Header(_)), "{error}");
        assert!(error.to_string().len() < 1000, "{error}");
    }
    let error = file_error(b"\x03\0\0\0\0\0\0\0{\xff}");
    assert!(matches!(error, FileError::Header(_)), "{error}");
}

#[test]
fn every_truncation_is_named() {
    let bytes = seeded("sd15/mid");
    for length in (0..bytes.len()).rev() {
        let error = file_error(&bytes[..length]);
        let named =
            matches!(&error, FileError::Truncated { actual, .. } if *actual == length as u64);
        assert!(
            named || (length < 9 && matches!(error, FileError::NotSafetensors)),
            "{length}: {error}"
        );
    }
}

#[test]
fn numbers_that_are_not_finite_are_named_by_key() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let [up, mut down] = pair(PREFIX, KOHYA, 0.5);
        down.bytes[8..12].copy_from_slice(&bad.to_le_bytes());
        let error = read_lora(file(&[up, down]).as_slice()).unwrap_err();
        let AdapterError::Matrix { key, source } = &error else { panic!("{error}") };
        assert_eq!(*key, format!("{PREFIX}.lora_down.weight"));
        assert_eq!(*source, MatrixError::NotFinite { index: 2 });

        let alpha = float32(&format!("{PREFIX}.alpha"), &[], &[bad]);
        let error = with_pair([alpha]);
        assert!(
            matches!(&error, AdapterError::Alpha { key, .. } if *key == format!("{PREFIX}.alpha")),
            "{error}"
        );
    }
}

#[test]
fn alphas_that_are_not_one_number_are_refused() {
    let name = format!("{PREFIX}.alpha");
    let error = with_pair([float32(&name, &[2], &[1.0, 1.0])]);
    assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
    let error = with_pair([float32(&name, &[0], &[])]);
    assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
    let error = with_pair([entry(&name, "I64", &[], i64::MAX.to_le_bytes().to_vec())]);
    assert!(matches!(error, AdapterError::Alpha { .. }), "{error}");
    let error = with_pair([entry(&name, "F8_E4M3", &[], vec![0])]);
    assert!(matches!(error, AdapterError::Alpha { .. }), "{error}");
}

#[test]
fn shapes_that_do_not_fit_are_named_with_their_key() {
    let [up, down, mid] =
        ["lora_up", "lora_down", "lora_mid"].map(|part| format!("{PREFIX}.{part}.weight"));
    let matrix =
        |name: &str, shape: &[usize]| float32(name, shape, &vec![0.5; shape.iter().product()]);
    let read = |entries: &[Entry]| read_lora(file(entries).as_slice()).unwrap_err();

    let error = read(&[matrix(&up, &[3, 2]), matrix(&down, &[4, 5])]);
    let expected = format!(
        "`{PREFIX}`: up [3, 2] and down [4, 5] do not fit: the columns of up must be the rows of down"
    );
    assert_eq!(error.to_string(), expected);

    let error = read(&[matrix(&up, &[3, 2]), matrix(&down, &[2, 5]), matrix(&mid, &[2, 3, 1, 1])]);
    let is_mid = matches!(
        error,
        AdapterError::LowRank { source: LowRankError::Mid { mid: [2, 3], rank: 2 }, .. }
    );
    assert!(is_mid, "{error}");

    let error = read(&[matrix(&up, &[3, 2]), matrix(&down, &[2, 0])]);
    assert!(
        matches!(error, AdapterError::LowRank { source: LowRankError::Empty { .. }, .. }),
        "{error}"
    );

    for (shape, key) in [(vec![3], &up), (vec![], &up), (vec![0, 2], &up)] {
        let error = read(&[matrix(key, &shape), matrix(&down, &[2, 5])]);
        assert!(
            matches!(&error, AdapterError::Shape { key: found, .. } if found == key),
            "{error}"
        );
    }
    for shape in [vec![2, 2], vec![2, 2, 3, 3], vec![2, 2, 1], vec![1; 10_000]] {
        let error = read(&[matrix(&up, &[3, 2]), matrix(&down, &[2, 5]), matrix(&mid, &shape)]);
        assert!(matches!(&error, AdapterError::Shape { key, .. } if *key == mid), "{error}");
        assert!(error.to_string().len() < 1000, "{error}");
    }
}

#[test]
fn ranks_and_files_over_the_limit_are_too_large() {
    let wide = |rank: usize| {
        let up = float32(&format!("{PREFIX}.lora_up.weight"), &[1, rank], &vec![0.5; rank]);
        let down = float32(&format!("{PREFIX}.lora_down.weight"), &[rank, 1], &vec![0.5; rank]);
        file(&[up, down])
    };
    assert!(read_lora(wide(512).as_slice()).is_ok());
    let error = read_lora(wide(513).as_slice()).unwrap_err();
    assert!(matches!(error, AdapterError::RankTooLarge { rank: 513, limit: 512, .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::TooLarge);

    let limits = Limits { file_bytes_max: 100, ..Limits::default() };
    let error = read_lora_with(wide(8).as_slice(), &limits).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::TooLarge { limit: 100, .. })), "{error}");
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

#[test]
fn other_element_types_are_refused_for_text_encoders_only() {
    let [up, mut down] = pair(PREFIX, KOHYA, 0.5);
    down.dtype = "I32";
    let error = read_lora(file(&[up, down]).as_slice()).unwrap_err();
    assert!(
        matches!(&error, AdapterError::UnsupportedDtype { dtype, .. } if dtype == "I32"),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn unmatched_keys_that_cannot_be_listed_are_refused() {
    for name in [r"te_\u0000", r"te_\n", "te_ä", r"te_\\", &"te_x".repeat(200)] {
        let error = with_pair([float32(name, &[], &[1.0])]);
        assert!(matches!(error, AdapterError::Key { .. }), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

#[test]
fn only_the_header_and_the_needed_tensors_are_read() {
    let image = entry("lora_unet_x.lora_up.weight", "F16", &[1 << 20], vec![0; 2 << 20]);
    let entries: Vec<_> = [image].into_iter().chain(pair(PREFIX, KOHYA, 0.5)).collect();
    let bytes = file(&entries);
    let source = CountingSource { bytes: &bytes, read: Cell::new(0) };
    assert_eq!(read_lora(&source).unwrap().0.patches().len(), 1);
    assert_eq!(source.read.get(), 9 + (bytes.len() - (2 << 20) - 8));
}

#[test]
fn a_source_that_fails_or_gives_less_is_an_error() {
    struct Short(Vec<u8>);
    impl ByteSource for Short {
        fn byte_len(&self) -> u64 {
            self.0.len() as u64
        }
        fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
            self.0.as_slice().read(offset, length.min(100))
        }
    }
    let error = read_lora(&Short(seeded("sd15/mid"))).unwrap_err();
    assert!(matches!(error, AdapterError::File(FileError::Io(_))), "{error}");
}

proptest! {
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        for mut bytes in [
            seeded("sd15/mid"),
            seeded("sdxl/proj"),
            seeded("sd15/boft"),
            canonical("sd15/mid"),
            canonical("sd15/boft"),
        ] {
            for (place, value) in &changes {
                let place = place.index(bytes.len());
                bytes[place] = *value;
            }
            read_without_panic(&bytes)?;
        }
    }

    #[test]
    fn changed_headers_never_panic(changes in prop::collection::vec((0..900_usize, "[\\]\\[{}\",:0-9a-z_.]"), 1..4)) {
        for mut bytes in [
            seeded("sdxl/mid"),
            seeded("sd15/boft"),
            seeded("sd15/lokr"),
            seeded("sd15/diff"),
            canonical("sdxl/mid"),
            canonical("sd15/oft"),
            canonical("sd15/loha"),
        ] {
            for (place, value) in &changes {
                bytes[*place] = value.as_bytes()[0];
            }
            read_without_panic(&bytes)?;
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), with_length: bool) {
        let bytes = if with_length { [&200_u64.to_le_bytes()[..], b"{", &bytes].concat() } else { bytes };
        read_without_panic(&bytes)?;
    }
}

fn read_without_panic(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok((set, report)) = read_lora(bytes) {
        prop_assert_eq!(PatchSet::from_bytes(&set.to_bytes()).unwrap(), set);
        prop_assert!(report.unmatched.len() + report.superseded.len() <= report.text_encoder_keys);
    }
    if let Ok(set) = PatchSet::from_bytes(bytes) {
        prop_assert_eq!(set.to_bytes(), bytes);
    }
    Ok(())
}

/// Counts the bytes that are asked for.
struct CountingSource<'b> {
    bytes: &'b [u8],
    read: Cell<usize>,
}

impl ByteSource for CountingSource<'_> {
    fn byte_len(&self) -> u64 {
        self.bytes.byte_len()
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.read.set(self.read.get() + length);
        self.bytes.read(offset, length)
    }
}

fn canonical(name: &str) -> Vec<u8> {
    read_lora(seeded(name).as_slice()).unwrap().0.to_bytes()
}

#[track_caller]
fn file_error(bytes: &[u8]) -> FileError {
    let error = read_lora(bytes).unwrap_err();
    let AdapterError::File(error) = error else { panic!("{error}") };
    error
}

#[track_caller]
fn with_pair<const N: usize>(more: [Entry; N]) -> AdapterError {
    let entries: Vec<_> = pair(PREFIX, KOHYA, 0.5).into_iter().chain(more).collect();
    read_lora(file(&entries).as_slice()).unwrap_err()
}
