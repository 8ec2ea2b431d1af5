//! Clients written in Python from `docs/wire-protocol.md` alone, with pyzmq and msgpack.
//!
//! `LUNA_PYTHON` names an interpreter that has `tests/python/requirements.txt`; `cargo xtask ci`
//! makes one. Without it these tests say loudly that they were skipped.

use std::{
    env,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use luna_client::{AdapterId, EncodeRequest};
use luna_e2e::{Cluster, binary::workspace, golden::tiny_lora, models};
use serde::Deserialize;

/// Lines that a client may have to be called simple.
const LINES_MAX: usize = 40;

/// The strength in `wire_client.py`.
const STRENGTH: f64 = 0.8;

/// What `wire_client.py` prints.
#[derive(Debug, Deserialize)]
struct Printed {
    adapter: AdapterId,
    shape: Vec<usize>,
    applied: u32,
    first: Vec<f32>,
}

/// What `req_status.py` prints.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct PrintedStatus {
    kind: String,
    ready: bool,
    workers: usize,
}

#[tokio::test]
async fn a_python_client_gets_what_the_sdk_gets() {
    let Some(python) = python() else { return };
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let lora = tiny_lora("sd15", "kohya");
    let prompt = "an (old:1.3) lighthouse, ((storm))";
    let arguments = [cluster.endpoint(), "tiny", path_text(&lora), prompt];
    let printed = run(&python, "wire_client.py", &arguments);
    let printed: Printed = serde_json::from_slice(&printed.stdout).expect("it prints one object");

    let client = cluster.client().await;
    let held = client.has_lora(&[printed.adapter]).await.expect("the broker answers");
    assert_eq!(held.present, [printed.adapter], "the adapter is where Python left it");
    let uploaded = client.upload_lora(&lora, |_| {}).await.expect("the LoRA is accepted");
    assert_eq!(uploaded.adapter, printed.adapter, "the SDK makes the same adapter of the file");
    assert_eq!(uploaded.sent_bytes, 0, "so nothing is sent again");

    let request =
        EncodeRequest::new("tiny").prompt(prompt).no_cache().lora(uploaded.adapter, STRENGTH);
    let encoding = client.encode(request).await.expect("the farm answers");
    let cond = &encoding.conditionings[0].cond;
    assert_eq!(printed.shape, cond.shape);
    assert_eq!(printed.applied, encoding.receipt.stack[0].applied);
    assert!(printed.applied > 0, "the LoRA has text-encoder keys");
    assert!(!printed.first.is_empty());
    let bits = |elements: &[f32]| elements.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&printed.first), bits(&cond.data[..printed.first.len()]));
}

#[tokio::test]
async fn a_python_client_sees_the_farms_errors() {
    let Some(python) = python() else { return };
    let cluster = Cluster::new().model(&models::tiny_sd15()).tcp().start().await;
    for (model, lora, error) in [
        ("nobody-has-it", tiny_lora("sd15", "kohya"), "unknown_model: "),
        ("tiny", tiny_lora("sdxl", "proj"), "lora_mismatch: "),
        ("tiny", script("wire_client.py"), "lora_rejected: "),
    ] {
        let arguments = [cluster.endpoint(), model, path_text(&lora)];
        let output = command(&python, "wire_client.py", &arguments);
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && complaint.starts_with(error), "{complaint}");
    }
}

#[tokio::test]
async fn a_req_socket_works() {
    let Some(python) = python() else { return };
    let cluster = Cluster::new().model(&models::tiny_sd15()).start().await;
    let printed = run(&python, "req_status.py", &[cluster.endpoint()]);
    let printed: PrintedStatus =
        serde_json::from_slice(&printed.stdout).expect("it prints one object");
    let expected = PrintedStatus { kind: "status_reply".to_owned(), ready: true, workers: 1 };
    assert_eq!(printed, expected);
}

#[test]
fn a_whole_client_takes_few_lines() {
    for name in ["wire_client.py", "req_status.py"] {
        let text = std::fs::read_to_string(script(name)).expect("the client is in the repository");
        let lines = text.lines().count();
        assert!(lines < LINES_MAX, "{name} has {lines} lines: fewer than {LINES_MAX} are promised");
    }
}

/// The interpreter, or nothing and a loud line.
fn python() -> Option<PathBuf> {
    let python = env::var_os("LUNA_PYTHON").map(PathBuf::from);
    if python.is_none() {
        // Not `eprintln`: the test runner hides that when a test passes.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: the Python clients were not run; run `cargo xtask ci`, or set LUNA_PYTHON to \
             an interpreter that has tests/python/requirements.txt"
        );
    }
    python
}

/// Runs a script that must succeed.
fn run(python: &Path, name: &str, arguments: &[&str]) -> Output {
    let output = command(python, name, arguments);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed, {}: {complaint}", output.status);
    output
}

fn command(python: &Path, name: &str, arguments: &[&str]) -> Output {
    let output = Command::new(python).arg(script(name)).args(arguments).output();
    output.unwrap_or_else(|error| panic!("cannot start `{}`: {error}", python.display()))
}

fn script(name: &str) -> PathBuf {
    workspace().join("tests/python").join(name)
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("the paths of the repository are text")
}
