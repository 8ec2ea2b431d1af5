//! Golden cases of ComfyUI 0.3.64, tiny and true-size models, f32 and f16 storage.

use fixtures::Size;
use luna_worker::{
    execution::{EncodeJob, Encoding, Execution, Functional},
    model::LoadedModel,
};
use protocol::{Dtype, Family, request::EncodeOptions};

use crate::{
    cases::{Case, Golden},
    models::{entry, model},
};

/// LoRAs of kinds that are not implemented yet.
const LATER_KINDS: [&str; 8] = ["loha", "lokr", "dora", "diff", "set", "glora", "oft", "boft"];

#[test]
fn tiny_sd15_in_f32_matches() {
    assert_all_match(Size::Tiny, Family::Sd15, Dtype::Float32, 2e-5, 43);
}

#[test]
fn tiny_sd15_in_f16_matches() {
    assert_all_match(Size::Tiny, Family::Sd15, Dtype::Float16, 1e-3, 10);
}

#[test]
fn tiny_sdxl_in_f32_matches() {
    assert_all_match(Size::Tiny, Family::Sdxl, Dtype::Float32, 2e-5, 49);
}

#[test]
fn tiny_sdxl_in_f16_matches() {
    assert_all_match(Size::Tiny, Family::Sdxl, Dtype::Float16, 1e-3, 12);
}

#[test]
fn full_sd15_in_f32_matches() {
    assert_all_match(Size::Full, Family::Sd15, Dtype::Float32, 1e-4, 5);
}

#[test]
fn full_sd15_in_f16_matches() {
    assert_all_match(Size::Full, Family::Sd15, Dtype::Float16, 3e-4, 5);
}

#[test]
fn full_sdxl_in_f32_matches() {
    assert_all_match(Size::Full, Family::Sdxl, Dtype::Float32, 1e-4, 5);
}

/// Runs every case that is implemented, `expected` of them, and reports the worst.
fn assert_all_match(size: Size, family: Family, dtype: Dtype, tolerance: f32, expected: usize) {
    let golden = Golden::read(size, family, dtype);
    let model = model(size, family, dtype);
    let cases: Vec<&Case> = golden.cases.iter().filter(|case| is_implemented(case)).collect();
    let distances = cases.iter().map(|case| {
        let encoding = encode(&model, size, case);
        (golden.distance(case, &encoding.conditionings[0]), case.id.as_str())
    });
    let mut distances: Vec<(f32, &str)> = distances.collect();
    distances.sort_by(|left, right| right.0.total_cmp(&left.0));
    report(&format!("{size} {family} {dtype}: {} cases, worst {:?}", cases.len(), &distances[..3]));
    assert_eq!(cases.len(), expected, "cases that are implemented");
    let worst = distances[0];
    assert!(worst.0 <= tolerance, "`{}` is {} away: at most {tolerance}", worst.1, worst.0);
}

fn is_implemented(case: &Case) -> bool {
    let is_later = |name: &String| LATER_KINDS.contains(&name.as_str());
    matches!(case.node.as_str(), "encode" | "unprojected" | "sdxl")
        && !case.stack.iter().any(|(name, _)| is_later(name))
}

fn encode(model: &LoadedModel, size: Size, case: &Case) -> Encoding {
    let entries = case.stack.iter();
    let job = EncodeJob {
        prompts: vec![case.tokens.clone()],
        stack: entries.map(|(name, by)| entry(size, model.family, name, *by)).collect(),
        options: EncodeOptions {
            clip_skip: case.skip,
            projected: case.node != "unprojected",
            ..EncodeOptions::default()
        },
    };
    Functional.encode(model, &job).unwrap()
}

#[expect(clippy::print_stderr, reason = "the distances are worth reading when a test passes, too")]
fn report(line: &str) {
    eprintln!("{line}");
}
