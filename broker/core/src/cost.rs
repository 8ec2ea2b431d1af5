//! What requests and loads cost, learned from what workers report.
//!
//! Compute time is learned for every model by the number of chunks and by whether a stack is
//! applied; bandwidth is learned for every place that bytes come from. Until something was
//! observed, priors of the right order of magnitude stand in, so that routing and admission work
//! from the first request on. All of it is an estimate: a wrong one costs time, never a result.

use std::collections::BTreeMap;

use protocol::ModelName;

/// Models that costs are known of; further ones have the prior.
const MODELS_MAX: usize = 1024;

/// Weight of a new observation in the moving averages: the last ten or so count.
const ALPHA: f64 = 0.2;

/// Sizes of requests that are told apart: 1, 2, up to 4, ..., up to 64, and more chunks.
const SIZES: usize = 8;

/// Compute time of a request before anything was observed.
const PRIOR_REQUEST_US: f64 = 4_000.0;
const PRIOR_CHUNK_US: f64 = 1_000.0;

/// Observations of compute beyond these bounds are measuring errors.
const COMPUTE_US_MIN: f64 = 1.0;
const COMPUTE_US_MAX: f64 = 600e6;

/// Where an adapter's bytes come from when a worker needs it, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// The worker's device: nothing is loaded.
    Device,
    /// The worker's main memory.
    Host,
    /// The worker's cache on disk.
    Disk,
    /// The broker's blob store.
    Broker,
}

/// What decides how long a request computes, apart from the worker's speed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// The model's name.
    pub model: ModelName,
    /// Chunks of all prompts and components together.
    pub chunks: u32,
    /// Whether adapters are applied.
    pub stack: bool,
}

/// Learned costs. Times are in microseconds.
#[derive(Debug, Default)]
pub struct CostModel {
    models: BTreeMap<ModelName, [[Average; 2]; SIZES]>,
    /// Bytes per microsecond by [`Tier`]; the device's is not used.
    bandwidths: [Average; 4],
}

/// An exponentially weighted moving average.
#[derive(Debug, Clone, Copy, Default)]
struct Average(Option<f64>);

impl CostModel {
    /// The estimated time of a request on a device of average speed.
    pub fn compute_us(&self, shape: &Shape) -> u64 {
        let chunks = f64::from(shape.chunks.max(1));
        let learned = self.models.get(&shape.model).and_then(|sizes| nearest(sizes, shape));
        let us = learned.unwrap_or(PRIOR_REQUEST_US + PRIOR_CHUNK_US * chunks);
        whole_us(us)
    }

    /// The average of such requests, if there were any.
    pub fn observed_us(&self, shape: &Shape) -> Option<u64> {
        let sizes = self.models.get(&shape.model)?;
        sizes[size_of(shape.chunks)][usize::from(shape.stack)].0.map(whole_us)
    }

    /// The estimated time to load `bytes` from `tier`.
    pub fn load_us(&self, tier: Tier, bytes: u64) -> u64 {
        if tier == Tier::Device {
            return 0;
        }
        let (fixed_us, prior) = load_prior(tier);
        let bandwidth = self.bandwidths[tier as usize].0.unwrap_or(prior);
        fixed_us.saturating_add(whole_us(as_f64(bytes) / bandwidth))
    }

    /// Learns from a request that computed for `us`.
    pub fn observe_compute(&mut self, shape: &Shape, us: f64) {
        if !(COMPUTE_US_MIN..=COMPUTE_US_MAX).contains(&us) {
            return;
        }
        if self.models.len() >= MODELS_MAX && !self.models.contains_key(&shape.model) {
            return;
        }
        let sizes = self.models.entry(shape.model.clone()).or_default();
        sizes[size_of(shape.chunks)][usize::from(shape.stack)].observe(us);
    }

    /// Learns from `bytes` that were loaded from `tier` within `us`.
    pub fn observe_load(&mut self, tier: Tier, bytes: u64, us: f64) {
        // A few bytes tell of latency, not of bandwidth.
        if tier == Tier::Device || bytes < 64 << 10 || !us.is_finite() {
            return;
        }
        let (fixed_us, _) = load_prior(tier);
        let transfer_us = (us - as_f64(fixed_us)).max(us / 10.0).max(1.0);
        self.bandwidths[tier as usize].observe(as_f64(bytes) / transfer_us);
    }
}

impl Average {
    /// The first observation counts in full, later ones by [`ALPHA`].
    fn observe(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + ALPHA * (value - old)));
    }
}

/// The learned cost of the shape, or else of the nearest size, scaled by the number of chunks.
fn nearest(sizes: &[[Average; 2]; SIZES], shape: &Shape) -> Option<f64> {
    let size = size_of(shape.chunks);
    let of = |stack: bool, size: usize| sizes[size][usize::from(stack)].0;
    for stack in [shape.stack, !shape.stack] {
        if let Some(us) = of(stack, size) {
            return Some(us);
        }
        for distance in 1..SIZES {
            let smaller = size.checked_sub(distance);
            let larger = Some(size + distance).filter(|&larger| larger < SIZES);
            for other in [smaller, larger].into_iter().flatten() {
                if let Some(us) = of(stack, other) {
                    return Some(us * chunks_of(size) / chunks_of(other));
                }
            }
        }
    }
    None
}

/// Which of the [`SIZES`] a number of chunks belongs to.
fn size_of(chunks: u32) -> usize {
    let size = (0..SIZES).find(|&size| chunks <= 1 << size);
    size.unwrap_or(SIZES - 1)
}

/// The largest number of chunks of a size.
fn chunks_of(size: usize) -> f64 {
    as_f64(1 << size)
}

/// Latency in microseconds and bandwidth in bytes per microsecond before anything was observed:
/// main memory over a bus, a solid-state disk, a network between 1 and 10 Gbit/s.
const fn load_prior(tier: Tier) -> (u64, f64) {
    match tier {
        Tier::Device => (0, f64::INFINITY),
        Tier::Host => (200, 8_000.0),
        Tier::Disk => (1_000, 1_000.0),
        Tier::Broker => (3_000, 300.0),
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate: 53 bits are plenty")]
const fn as_f64(number: u64) -> f64 {
    number as f64
}

/// Microseconds as the tables have them; more than a day is a day.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to what fits; NaN becomes 0"
)]
fn whole_us(us: f64) -> u64 {
    us.clamp(0.0, 86_400e6).round() as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_observations_the_prior_grows_with_the_size() {
        let costs = CostModel::default();
        assert_eq!(costs.compute_us(&shape(1, false)), 5_000);
        assert_eq!(costs.compute_us(&shape(4, true)), 8_000);
        assert!(costs.load_us(Tier::Disk, 1 << 20) < costs.load_us(Tier::Broker, 1 << 20));
        assert!(costs.load_us(Tier::Host, 1 << 20) < costs.load_us(Tier::Disk, 1 << 20));
        assert_eq!(costs.load_us(Tier::Device, 1 << 40), 0);
    }

    #[test]
    fn what_was_observed_replaces_the_prior_and_follows_change() {
        let mut costs = CostModel::default();
        costs.observe_compute(&shape(1, false), 100_000.0);
        assert_eq!(costs.compute_us(&shape(1, false)), 100_000);
        for _ in 0..50 {
            costs.observe_compute(&shape(1, false), 2_000.0);
        }
        assert!((2_000..2_100).contains(&costs.compute_us(&shape(1, false))));
    }

    #[test]
    fn an_unseen_size_is_scaled_from_the_nearest_one() {
        let mut costs = CostModel::default();
        costs.observe_compute(&shape(2, false), 10_000.0);
        assert_eq!(costs.compute_us(&shape(8, false)), 40_000);
        assert_eq!(costs.compute_us(&shape(1, false)), 5_000);
        assert_eq!(costs.compute_us(&shape(2, true)), 10_000, "a stack costs as much until seen");
        let other = Shape { model: "other".parse().unwrap(), ..shape(2, false) };
        assert_eq!(costs.compute_us(&other), 6_000, "models are told apart");
    }

    #[test]
    fn bandwidth_is_learned_by_tier() {
        let mut costs = CostModel::default();
        costs.observe_load(Tier::Broker, 100 << 20, 103_000.0);
        let us = costs.load_us(Tier::Broker, 100 << 20);
        assert!((102_000..104_000).contains(&us), "{us}");
        costs.observe_load(Tier::Broker, 10, 1e6);
        assert_eq!(costs.load_us(Tier::Broker, 100 << 20), us, "a few bytes tell nothing");
    }

    #[test]
    fn the_table_of_models_is_bounded() {
        let mut costs = CostModel::default();
        for number in 0..2 * MODELS_MAX {
            let model = format!("model-{number}").parse().unwrap();
            costs.observe_compute(&Shape { model, ..shape(1, false) }, 10.0);
        }
        assert_eq!(costs.models.len(), MODELS_MAX);
    }

    proptest! {
        #[test]
        fn whatever_is_observed_estimates_stay_sane(
            observed in prop::collection::vec((any::<u32>(), any::<bool>(), any::<f64>()), 0..20),
            chunks: u32,
            bytes: u64,
        ) {
            let mut costs = CostModel::default();
            for (chunks, stack, us) in observed {
                costs.observe_compute(&shape(chunks, stack), us);
                costs.observe_load(Tier::Disk, u64::from(chunks), us);
            }
            prop_assert!(costs.compute_us(&shape(chunks, true)) <= 86_400_000_000);
            prop_assert!(costs.load_us(Tier::Disk, bytes) <= 86_400_001_000);
        }
    }

    fn shape(chunks: u32, stack: bool) -> Shape {
        Shape { model: "sd15".parse().unwrap(), chunks, stack }
    }
}
