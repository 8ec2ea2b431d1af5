//! Small histories and what is measured in them.

use super::*;

#[test]
fn a_killed_worker_is_noticed_when_the_broker_says_so() {
    let history = History::new().worker(1_000, 0, What::Killed);
    let log = [ready(500, 0), line(1_010, LOST, Some("cpu-1")), line(1_030, LOST, Some("cpu-0"))];
    let expected = Detections { times: vec![ms(30)], ..Detections::default() };
    assert_eq!(detections(&history.0, &log, name), expected);
}

#[test]
fn a_worker_that_the_broker_did_not_know_cannot_be_missed() {
    let history = History::new().worker(1_000, 0, What::Killed);
    for log in [
        vec![],
        vec![ready(500, 1)],
        vec![ready(500, 0), line(600, LEFT, Some("cpu-0"))],
        vec![ready(500, 0), line(700, LISTENING, None)],
    ] {
        let expected = Detections { unknown: 1, ..Detections::default() };
        assert_eq!(detections(&history.0, &log, name), expected);
    }
}

#[test]
fn a_kill_during_a_fault_of_the_broker_is_not_measured() {
    let history = History::new()
        .broker(900, What::Paused)
        .worker(1_000, 0, What::Killed)
        .broker(1_500, What::Resumed);
    let log = [ready(500, 0), line(1_501, LOST, Some("cpu-0"))];
    let expected = Detections { during_broker_fault: 1, ..Detections::default() };
    assert_eq!(detections(&history.0, &log, name), expected);
}

#[test]
fn a_kill_that_is_never_noticed_is_missed() {
    let history = History::new().worker(1_000, 0, What::Killed);
    let expected = Detections { missed: 1, ..Detections::default() };
    assert_eq!(detections(&history.0, &[ready(500, 0)], name), expected);
    assert_eq!(
        detections(&history.0, &[ready(500, 0), line(9_000, LOST, Some("cpu-0"))], name),
        expected
    );
}

#[test]
fn the_gap_of_a_broker_ends_with_the_first_answer_of_the_new_one() {
    let history = History::new()
        .broker(1_000, What::Killed)
        .broker(1_100, What::Started)
        .broker(5_000, What::Killed)
        .broker(5_100, What::Started)
        .broker(5_200, What::Paused);
    let at = |millis| history.1 + ms(millis);
    let answered = [
        (0, at(999)),
        (0, at(1_050)),
        (0, at(1_140)),
        (1, at(1_300)),
        (0, at(1_400)),
        (0, at(5_300)),
    ];
    let expected = Gaps { first: vec![ms(40)], clients: vec![ms(40), ms(200)], unanswered: 1 };
    assert_eq!(gaps(&history.0, &answered), expected);
}

#[test]
fn percentiles_are_by_nearest_rank() {
    let times: Vec<_> = (1..=200).rev().map(ms).collect();
    assert_eq!(percentile(&times, 50), Some(ms(100)));
    assert_eq!(percentile(&times, 99), Some(ms(198)));
    assert_eq!(percentile(&times[..1], 99), Some(ms(200)));
    assert_eq!(percentile(&[], 99), None);
}

/// Incidents, and the moment that their times count from.
struct History(Vec<Incident>, Instant);

impl History {
    fn new() -> Self {
        Self(Vec::new(), Instant::now())
    }

    fn worker(self, millis: u64, number: usize, what: What) -> Self {
        self.push(millis, Target::Worker(number), what)
    }

    fn broker(self, millis: u64, what: What) -> Self {
        self.push(millis, Target::Broker, what)
    }

    fn push(mut self, millis: u64, target: Target, what: What) -> Self {
        let (at, time_of_day) = (self.1 + ms(millis), ms(millis));
        self.0.push(Incident { at, time_of_day, target, what });
        self
    }
}

fn ready(millis: u64, number: usize) -> LogLine {
    line(millis, READY, Some(&name(number)))
}

fn line(millis: u64, message: &str, worker: Option<&str>) -> LogLine {
    LogLine {
        time_of_day: ms(millis),
        level: "INFO".to_owned(),
        message: message.to_owned(),
        worker: worker.map(str::to_owned),
    }
}

fn name(number: usize) -> String {
    format!("cpu-{number}")
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
