//! A client that asks for much and never reads: its answers fill its socket and its queue at the
//! broker, and nobody else's.

use std::time::Duration;

use protocol::request::{ClipEncode, EncodeOptions, Prompt};
use tokio::time::sleep;

use crate::raw::Raw;

/// Sends `requests` encodes, stays deaf for `stay` and goes.
pub(crate) async fn run(endpoint: String, requests: usize, stay: Duration) {
    let Some(raw) = Raw::connect(&endpoint).await else { return };
    for number in 0..requests {
        if !raw.send(&encode(number), Vec::new()) {
            break;
        }
    }
    sleep(stay).await;
    raw.close().await;
}

fn encode(number: usize) -> ClipEncode {
    let text = Some(format!("nobody reads answer {number}"));
    ClipEncode {
        id: Raw::id(),
        model: "tiny".parse().expect("it is a name"),
        model_digest: None,
        prompts: vec![Prompt { text, ..Prompt::default() }],
        stack: Vec::new(),
        options: EncodeOptions::default(),
        budget_ms: Some(BUDGET_MS),
        no_cache: false,
        requires: Vec::new(),
    }
}

const BUDGET_MS: u32 = 10_000;
