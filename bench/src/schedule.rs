//! Open-loop arrivals: when each request is due, fixed before the first one is sent.
//!
//! Latency counts from the time that a request was due, not from when it was sent. So a broker that
//! stalls cannot hide the requests that would have come meanwhile (coordinated omission).

use std::time::Duration;

/// Several streams of evenly spaced requests, merged in the order in which they are due.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Schedule {
    arrivals: Vec<Arrival>,
}

/// One request that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival {
    /// Since the start.
    pub(crate) due: Duration,
    /// Whose it is: the index of its stream.
    pub(crate) stream: usize,
}

impl Schedule {
    /// Arrivals for `duration`, with one stream for each of `rates` (requests per second, more
    /// than 0). Streams of equal rates are spread over one interval, so that they do not march in
    /// step.
    pub(crate) fn new(rates: &[f64], duration: Duration) -> Self {
        let mut arrivals = Vec::new();
        for (stream, rate) in rates.iter().enumerate() {
            let phase = ratio(stream, rates.len());
            let due = |number: u32| Duration::from_secs_f64((f64::from(number) + phase) / rate);
            let stream_arrivals = (0..).map(due).take_while(|due| *due < duration);
            arrivals.extend(stream_arrivals.map(|due| Arrival { due, stream }));
        }
        arrivals.sort_unstable();
        Self { arrivals }
    }

    /// The requests in the order in which they are due.
    pub(crate) fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }
}

#[expect(clippy::cast_precision_loss, reason = "there are far fewer streams than 2^52")]
fn ratio(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stream_has_its_rate_and_a_phase_of_its_own() {
        let schedule = Schedule::new(&[100.0, 100.0, 50.0], Duration::from_secs(2));
        let of = |stream| {
            let arrivals = schedule.arrivals().iter().filter(move |a| a.stream == stream);
            arrivals.map(|arrival| arrival.due).collect::<Vec<_>>()
        };
        assert_eq!((of(0).len(), of(1).len(), of(2).len()), (200, 200, 100));
        assert_eq!(of(0)[..2], [Duration::ZERO, Duration::from_millis(10)]);
        assert!(of(0).iter().all(|due| !of(1).contains(due)), "they do not march in step");
        for pair in of(2).windows(2) {
            let gap = pair[1].saturating_sub(pair[0]);
            assert!(gap.abs_diff(Duration::from_millis(20)) < Duration::from_micros(1));
        }
    }

    #[test]
    fn requests_are_due_in_order_and_within_the_duration() {
        let schedule = Schedule::new(&[7.0, 333.0, 11.5], Duration::from_secs(3));
        assert!(schedule.arrivals().is_sorted_by_key(|arrival| arrival.due));
        let last = schedule.arrivals().last().unwrap();
        assert!(last.due < Duration::from_secs(3) && last.due > Duration::from_millis(2_990));
        assert_eq!(Schedule::new(&[], Duration::from_secs(1)).arrivals(), []);
    }
}
