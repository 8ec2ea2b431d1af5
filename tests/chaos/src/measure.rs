//! What the faults cost: how soon a killed worker was noticed, and how long a killed broker was
//! missed. Pure: from what happened to numbers.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    log_line::{LogLine, elapsed},
    plan::{BROKER_RESTART, Target},
    timeline::{Incident, What},
};

/// From the SIGKILL of a worker to the broker's log line that says it is lost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Detections {
    /// The times, of kills that could be measured.
    pub(crate) times: Vec<Duration>,
    /// Kills of workers that the broker did not know yet, or no longer.
    pub(crate) unknown: usize,
    /// Kills while the broker itself was stopped, dead or starting.
    pub(crate) during_broker_fault: usize,
    /// Kills that the broker never noticed.
    pub(crate) missed: usize,
}

/// From the SIGKILL of the broker to answers of the new one, the pause before its start left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Gaps {
    /// To the first answer that any client got: one for every kill.
    pub(crate) first: Vec<Duration>,
    /// To each client's first answer: one for every kill and client.
    pub(crate) clients: Vec<Duration>,
    /// Kills after which no answer came at all before the broker was hurt again.
    pub(crate) unanswered: usize,
}

/// A time during which the broker does not work.
#[derive(Debug, Clone, Copy)]
struct Outage {
    from: Duration,
    to: Duration,
}

/// Measures how soon each killed worker was noticed. `name` is what worker `n` is called.
pub(crate) fn detections(
    incidents: &[Incident],
    broker_log: &[LogLine],
    name: impl Fn(usize) -> String,
) -> Detections {
    let outages = outages(incidents);
    let mut detections = Detections::default();
    for incident in incidents.iter().filter(|incident| incident.what == What::Killed) {
        let Target::Worker(number) = incident.target else { continue };
        let (at, name) = (incident.time_of_day, name(number));
        let (before, after): (Vec<_>, Vec<_>) =
            broker_log.iter().partition(|line| elapsed(at, line.time_of_day).is_none());
        if !is_known(&before, &name) {
            detections.unknown += 1;
            continue;
        }
        let lost = after.iter().find(|line| is_about(line, LOST, &name));
        let time = lost.and_then(|line| elapsed(at, line.time_of_day));
        let patience = time.unwrap_or(PATIENCE).min(PATIENCE);
        if outages.iter().any(|outage| outage.meets(at, at + patience)) {
            detections.during_broker_fault += 1;
        } else if let Some(time) = time.filter(|time| *time < PATIENCE) {
            detections.times.push(time);
        } else {
            detections.missed += 1;
        }
    }
    detections
}

/// Measures how long clients missed each killed broker. `answered` says which client was answered
/// when.
pub(crate) fn gaps(incidents: &[Incident], answered: &[(usize, Instant)]) -> Gaps {
    let mut gaps = Gaps::default();
    let of_broker: Vec<_> =
        incidents.iter().filter(|incident| incident.target == Target::Broker).collect();
    for (index, killed) in of_broker.iter().enumerate() {
        if killed.what != What::Killed {
            continue;
        }
        let Some(started) = of_broker.get(index + 1) else { continue };
        let end = of_broker.get(index + 2).map(|next| next.at);
        let mut firsts = BTreeMap::new();
        for (client, at) in answered {
            if *at >= started.at && end.is_none_or(|end| *at < end) {
                let first = firsts.entry(*client).or_insert(*at);
                *first = (*first).min(*at);
            }
        }
        let gap = |at: &Instant| at.duration_since(killed.at).saturating_sub(BROKER_RESTART);
        match firsts.values().min() {
            Some(first) => gaps.first.push(gap(first)),
            None => gaps.unanswered += 1,
        }
        gaps.clients.extend(firsts.values().map(gap));
    }
    gaps
}

/// The value that `percent` of all are at most, by nearest rank; nothing of nothing.
pub(crate) fn percentile(times: &[Duration], percent: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

impl Outage {
    fn meets(&self, from: Duration, to: Duration) -> bool {
        self.from < to && from < self.to
    }
}

/// When the broker does not work: from each blow until some time after it was started or went on.
fn outages(incidents: &[Incident]) -> Vec<Outage> {
    let mut outages = Vec::new();
    let mut from = None;
    for incident in incidents.iter().filter(|incident| incident.target == Target::Broker) {
        match incident.what {
            What::Killed | What::Paused | What::Terminating | What::Failed(_) => {
                from = from.or(Some(incident.time_of_day));
            }
            What::Started | What::Resumed => {
                if let Some(from) = from.take() {
                    outages.push(Outage { from, to: incident.time_of_day + SETTLING });
                }
            }
            What::Terminated => {}
        }
    }
    outages
}

/// Whether the broker's last word about a worker is that it is there.
fn is_known(lines: &[&LogLine], name: &str) -> bool {
    let word = lines.iter().rev().find(|line| {
        line.message == LISTENING
            || is_about(line, READY, name)
            || is_about(line, LOST, name)
            || is_about(line, LEFT, name)
    });
    word.is_some_and(|line| line.message == READY)
}

fn is_about(line: &LogLine, message: &str, name: &str) -> bool {
    line.message == message && line.worker.as_deref() == Some(name)
}

/// What the broker logs.
const LISTENING: &str = "listening";
const READY: &str = "worker ready";
const LOST: &str = "worker lost";
const LEFT: &str = "worker left";

/// A broker that has just been started or has just gone on has other things to do first.
const SETTLING: Duration = Duration::from_millis(100);

/// A kill that was not noticed within this time was missed; silence shows after two seconds.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
