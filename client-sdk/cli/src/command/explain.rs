//! `luna explain`: where a request would go now, and what every worker would mean for it.

use std::process::ExitCode;

use luna_client::{Refusal, WorkerVerdict};

use crate::{
    args::ExplainArgs,
    command::connect,
    output::{print_json, print_line, print_table},
};

/// Asks the broker's routing and shows its verdicts; success means that a worker would be found.
pub(crate) async fn run(args: ExplainArgs) -> anyhow::Result<ExitCode> {
    let client = connect(&args.farm).await?;
    let reply = client.explain(args.model, &args.loras, args.chunks).await?;
    if args.json {
        print_json(&reply)?;
    } else {
        let header = ["worker", "total ms", "queue", "LoRAs", "model", "compute", "verdict"];
        let chosen = reply.chosen.as_ref();
        let rows =
            reply.workers.iter().map(|verdict| row(verdict, chosen == Some(&verdict.worker)));
        print_table(&header, rows);
        if chosen.is_none() {
            print_line(format_args!("no worker would take it now"));
        }
    }
    Ok(if reply.chosen.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(verdict: &WorkerVerdict, is_chosen: bool) -> Vec<String> {
    let WorkerVerdict { worker, refused, score, free } = verdict;
    let times = score.map(|s| [s.total_ms, s.queue_ms, s.load_ms, s.model_ms, s.compute_ms]);
    let times =
        times.map_or([const { String::new() }; 5], |times| times.map(|ms| format!("{ms:.1}")));
    let word = match (refused, is_chosen, free) {
        (Some(refusal), ..) => reason(*refusal),
        (None, true, true) => "chosen",
        (None, true, false) => "chosen: the request waits for it",
        (None, false, true) => "possible",
        (None, false, false) => "possible, full",
    };
    let name = [worker.to_string()];
    name.into_iter().chain(times).chain([word.to_owned()]).collect()
}

fn reason(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::NotServed => "does not serve the model",
        Refusal::Draining => "is draining",
        Refusal::NoSlots => "has no slots",
        Refusal::Ejected => "keeps failing and is left out for a while",
        Refusal::Isolated => "is kept for a request that workers died of",
        Refusal::DiedHere => "was lost with this request before",
        Refusal::LacksAdapter => "lacks a LoRA that the farm does not store",
    }
}

#[cfg(test)]
mod tests {
    use luna_client::Score;

    use super::*;

    #[test]
    fn a_row_tells_the_score_or_the_reason() {
        let score = Score { queue_ms: 1.0, compute_ms: 2.25, total_ms: 3.25, ..Score::default() };
        let worker = "gpu-0".parse().unwrap();
        let able = WorkerVerdict { worker, refused: None, score: Some(score), free: false };
        let expected =
            ["gpu-0", "3.2", "1.0", "0.0", "0.0", "2.2", "chosen: the request waits for it"];
        assert_eq!(row(&able, true), expected);
        let refused = WorkerVerdict { refused: Some(Refusal::Draining), score: None, ..able };
        assert_eq!(row(&refused, false), ["gpu-0", "", "", "", "", "", "is draining"]);
    }
}
