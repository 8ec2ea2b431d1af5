//! Model files that cannot be served: the worker says which tensor of which file, and ends with
//! the code that tells its supervisor not to try again.

use std::{fs, path::Path};

use fixtures::{Size, Tensor, config_json, encoder_tensors, to_safetensors};
use luna_client::Component;
use luna_e2e::Process;

use crate::support::{Farm, assert_words};

/// `EX_DATAERR` of sysexits.h.
const EXIT_DATA: i32 = 65;

const QUERY: &str = "text_model.encoder.layers.2.self_attn.q_proj.weight";

#[tokio::test]
async fn a_model_file_with_a_missing_tensor_is_refused_by_its_name() {
    let file = with_tensors(|tensors| tensors.retain(|tensor| tensor.name() != QUERY));
    assert_not_served(&file, &[&format!("no tensor `{QUERY}`")]).await;
}

#[tokio::test]
async fn a_model_file_with_a_tensor_of_another_shape_is_refused_by_its_name() {
    // The same module of the other encoder has the name and is 48 wide.
    let other = encoder_tensors(Size::Tiny, Component::ClipG);
    let other = other.into_iter().find(|tensor| tensor.name() == QUERY).expect("it has it, too");
    let file = with_tensors(|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name() == QUERY);
        *tensor.expect("the encoder has it") = other;
    });
    let words = [&*format!("`{QUERY}`"), "[48, 48]", "[32, 32]"];
    assert_not_served(&file, &words).await;
}

#[tokio::test]
async fn a_model_file_that_is_cut_or_no_safetensors_at_all_is_refused() {
    let whole = with_tensors(|_| {});
    assert_not_served(&whole[..whole.len() / 2], &["not a safetensors file"]).await;
    assert_not_served(b"PK\x03\x04 a pickle in a zip archive", &["announces a header"]).await;
    assert_not_served(b"", &["not a safetensors file"]).await;
}

/// Starts a worker with `file` beside a farm that works, and asserts that it ends as it should.
async fn assert_not_served(file: &[u8], words: &[&str]) {
    let mut farm = Farm::start().await;
    let directory = farm.cluster.directory().join("broken");
    fs::create_dir(&directory).expect("the temporary directory is writable");
    let path = directory.join("model.safetensors");
    fs::write(&path, file).expect("the temporary directory is writable");
    let config = config_json(Size::Tiny, Component::ClipL).to_string();
    fs::write(directory.join("config.json"), config).expect("the temporary directory is writable");

    let mut worker = start_worker(&farm, &path);
    let status = worker.wait();
    let output = worker.output();
    assert_eq!(status.code(), Some(EXIT_DATA), "{output}");
    assert_words(&output, &[&format!("`{}`", path.display()), "cannot load model `broken`"]);
    assert_words(&output, words);
    farm.assert_serves().await;
}

fn start_worker(farm: &Farm, model: &Path) -> Process {
    let model = format!("broken=sd15:{}", model.display());
    let arguments = [
        "worker",
        "--exit-on-stdin-eof",
        "--endpoint",
        farm.cluster.worker_endpoint(),
        "--name",
        "broken",
        "--model",
        &model,
    ];
    let log = farm.cluster.directory().join("broken.log");
    Process::start(&arguments.map(str::to_owned), &log)
}

/// The tiny CLIP-L as a file, changed.
fn with_tensors(change: impl FnOnce(&mut Vec<Tensor>)) -> Vec<u8> {
    let mut tensors = encoder_tensors(Size::Tiny, Component::ClipL);
    change(&mut tensors);
    to_safetensors(&tensors).expect("the tensors can be written")
}
