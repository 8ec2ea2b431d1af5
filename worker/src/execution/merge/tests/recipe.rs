//! Random patches, on slices too, and what each of them means in plain words of f64.

use std::ops::Range;

use adapter::{
    Array, Boft, Diff, Factor, Glora, Hadamard, Kronecker, LowRank, Matrix, ModelAsLora, Oft,
    Patch, PatchError, SetWeight, Slice,
};
use proptest::{prelude::*, sample::select};
use protocol::Dtype;

use super::reference::{Dense, butterfly, rotations};

/// Sizes of weights. The rows take blocks of 2 and 4, the columns factors of 2.
pub(super) const SIZES: [[usize; 2]; 5] = [[4, 2], [8, 8], [8, 6], [12, 4], [16, 10]];

/// Everything that makes a patch but the size of its weight.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    kind: Kind,
    rank: usize,
    alpha: Option<f64>,
    dora: Option<Axis>,
    cut: Cut,
    pub(super) strength_patch: f64,
    pub(super) strength_model: f64,
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    LowRank { mid: bool },
    Hadamard { cores: bool },
    Kronecker { low: [bool; 2], core: bool },
    Glora { old: bool },
    Oft { size: usize },
    Boft { size: usize, stages: usize, rescale: bool },
    Diff,
    Set,
    ModelAsLora,
    Unchanged,
}

/// What a patch acts on.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Whole,
    /// Some of the rows, by fractions of their number: where they start, and how many of the rest.
    Rows([f64; 2]),
    /// The same for columns.
    Columns([f64; 2]),
}

#[derive(Debug, Clone, Copy)]
enum Axis {
    Rows,
    Columns,
}

pub(super) fn recipes(count: Range<usize>) -> impl Strategy<Value = Vec<Recipe>> {
    prop::collection::vec(recipe(), count)
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let strength_patch = prop_oneof![Just(1.0), Just(0.0), -1.5..1.5];
    let strength_model = prop_oneof![3 => Just(1.0), 1 => select(&[0.5, -1.0, 1.25][..])];
    let dora =
        prop_oneof![2 => Just(None), 1 => select(&[Some(Axis::Rows), Some(Axis::Columns)][..])];
    let alpha = prop_oneof![Just(None), Just(Some(0.0)), (0.1..3.0).prop_map(Some)];
    let cut = prop_oneof![
        3 => Just(Cut::Whole),
        1 => prop::array::uniform2(0.0..1.0).prop_map(Cut::Rows),
        1 => prop::array::uniform2(0.0..1.0).prop_map(Cut::Columns),
    ];
    let strengths = (strength_patch, strength_model);
    ((kind(), cut), 1..4usize, alpha, dora, strengths, any::<u64>()).prop_map(
        |((kind, cut), rank, alpha, dora, (strength_patch, strength_model), seed)| Recipe {
            kind,
            cut,
            rank,
            // Without alpha a BOFT patch does nothing, which is not for the algebra.
            alpha: if matches!(kind, Kind::Boft { .. }) { alpha.or(Some(0.5)) } else { alpha },
            dora,
            strength_patch,
            strength_model,
            seed,
        },
    )
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        any::<bool>().prop_map(|mid| Kind::LowRank { mid }),
        any::<bool>().prop_map(|cores| Kind::Hadamard { cores }),
        any::<([bool; 2], bool)>()
            .prop_map(|(low, core)| Kind::Kronecker { low, core: core && low[1] }),
        any::<bool>().prop_map(|old| Kind::Glora { old }),
        select(&[2, 4][..]).prop_map(|size| Kind::Oft { size }),
        (select(&[[2, 1], [2, 2], [4, 1]][..]), any::<bool>())
            .prop_map(|([size, stages], rescale)| Kind::Boft { size, stages, rescale }),
        Just(Kind::Diff),
        Just(Kind::Set),
        Just(Kind::ModelAsLora),
        Just(Kind::Unchanged),
    ]
}

impl Recipe {
    /// The slice of a weight of `size`, whose rows and columns still take every kind.
    pub(super) fn slice(&self, size: [usize; 2]) -> Option<Slice> {
        let (dim, unit, [start, length]) = match self.cut {
            Cut::Whole => return None,
            Cut::Rows(fractions) => (0, 4, fractions),
            Cut::Columns(fractions) => (1, 2, fractions),
        };
        let start = part(size[dim] / unit, start);
        let length = 1 + part(size[dim] / unit - start, length);
        Some(Slice::new(dim, start * unit, length * unit).unwrap())
    }

    /// The size of what the patch acts on.
    pub(super) fn sliced(&self, mut size: [usize; 2]) -> [usize; 2] {
        if let Some(slice) = self.slice(size) {
            size[slice.dim()] = slice.length();
        }
        size
    }

    /// The patch of a weight of `size`.
    pub(super) fn patch(&self, size: [usize; 2]) -> Patch {
        let size = self.sliced(size);
        let scale = self.dora_scale(size);
        match self.kind {
            Kind::LowRank { mid } => {
                Patch::LowRank(with(scale, self.low_rank(size, mid), LowRank::with_dora_scale))
            }
            Kind::Hadamard { cores } => {
                Patch::Hadamard(with(scale, self.hadamard(size, cores), Hadamard::with_dora_scale))
            }
            Kind::Kronecker { low, core } => {
                let patch = self.kronecker(size, low, core);
                Patch::Kronecker(with(scale, patch, Kronecker::with_dora_scale))
            }
            Kind::Glora { old } => {
                Patch::Glora(with(scale, self.glora(size, old), Glora::with_dora_scale))
            }
            Kind::Oft { size: block } => {
                let blocks = self.array(0, &[size[0] / block, block, block]);
                let patch = Oft::new(blocks, None, self.alpha).unwrap();
                Patch::Oft(with(scale, patch, Oft::with_dora_scale))
            }
            Kind::Boft { size: block, stages, rescale } => {
                let blocks = self.array(0, &[stages, size[0] / block, block, block]);
                let rescale = rescale.then(|| self.array(1, &[size[0], 1]));
                let patch = Boft::new(blocks, rescale, self.alpha).unwrap();
                Patch::Boft(with(scale, patch, Boft::with_dora_scale))
            }
            Kind::Diff => Patch::Diff(Diff::new(self.array(0, &size))),
            Kind::Set => Patch::Set(SetWeight::new(self.array(0, &size))),
            Kind::ModelAsLora => Patch::ModelAsLora(ModelAsLora::new(self.array(0, &size))),
            Kind::Unchanged => Patch::Unchanged,
        }
    }

    fn low_rank(&self, size: [usize; 2], mid: bool) -> LowRank {
        let mid = mid.then(|| self.matrix(2, [self.rank; 2]));
        let [up, down] = self.factors(0, size, false);
        LowRank::new(up, down, mid, self.alpha).unwrap()
    }

    fn hadamard(&self, size: [usize; 2], cores: bool) -> Hadamard {
        let [w1, w2] = [0, 3].map(|part| self.factors(part, size, cores));
        Hadamard::new(w1, w2, cores.then(|| [2, 5].map(|part| self.core(part))), self.alpha)
            .unwrap()
    }

    fn kronecker(&self, [rows, cols]: [usize; 2], low: [bool; 2], core: bool) -> Kronecker {
        let factor = |part, size, low, turned| {
            if low {
                let [a, b] = self.factors(part, size, turned);
                Factor::LowRank { a, b }
            } else {
                Factor::Full(self.matrix(part, size))
            }
        };
        let w1 = factor(0, [2, 2], low[0], false);
        let w2 = factor(2, [rows / 2, cols / 2], low[1], core);
        Kronecker::new(w1, w2, core.then(|| self.core(4)), self.alpha).unwrap()
    }

    fn glora(&self, [rows, cols]: [usize; 2], old: bool) -> Glora {
        let mut a = self.factors(0, [cols, cols], false);
        let mut b = self.factors(2, [rows, cols], false);
        if old {
            a.reverse();
            b.reverse();
        }
        Glora::new(a, b, self.alpha).unwrap()
    }

    /// What the patch makes of `weight`, which the model has as `original`.
    pub(super) fn reference(&self, weight: &Dense, original: &Dense) -> Dense {
        let Some(slice) = self.slice(weight.size()) else {
            return self.changed(weight, original);
        };
        let range = slice.start()..slice.end();
        let cut = |dense: &Dense| dense.cut(slice.dim(), range.clone());
        weight.with_cut(slice.dim(), slice.start(), &self.changed(&cut(weight), &cut(original)))
    }

    fn changed(&self, weight: &Dense, original: &Dense) -> Dense {
        let weight = &weight.times(self.strength_model);
        let strength = self.strength_patch;
        if matches!(self.kind, Kind::Set) {
            return self.dense(0, weight.size());
        }
        if matches!(self.kind, Kind::ModelAsLora) {
            let delta = self.dense(0, weight.size()).plus(&original.times(-1.0));
            return weight.plus(&delta.times(strength));
        }
        if matches!(self.kind, Kind::Unchanged) {
            return weight.clone();
        }
        let (delta, scale) = self.delta(weight);
        let Some(wanted) = self.dora_scale(weight.size()) else {
            return weight.plus(&delta.times(strength * scale));
        };
        // Before the lengths are set, ComfyUI multiplies a rotation's change with alpha.
        let scale = match self.kind {
            Kind::Oft { .. } | Kind::Boft { .. } => self.alpha.unwrap_or(0.0),
            Kind::LowRank { .. }
            | Kind::Hadamard { .. }
            | Kind::Kronecker { .. }
            | Kind::Glora { .. }
            | Kind::Diff
            | Kind::Set
            | Kind::ModelAsLora
            | Kind::Unchanged => scale,
        };
        let changed = weight.plus(&delta.times(scale));
        let epsilon = f64::from(f32::EPSILON);
        let wanted = wanted.to_f32();
        let by_rows = matches!(self.dora, Some(Axis::Rows));
        let resized = changed.map(|row, col, value| {
            let (length, wanted) = if by_rows {
                (weight.row_length(row), wanted[row])
            } else {
                (changed.column_length(col), wanted[col])
            };
            value * f64::from(wanted) / (length + epsilon)
        });
        weight.plus(&resized.plus(&weight.times(-1.0)).times(strength))
    }

    /// Whether every row of the result depends on the same row of the weight alone.
    pub(super) fn changes_rows_alone(&self) -> bool {
        let is_whole = matches!(self.cut, Cut::Whole);
        is_whole
            && match self.kind {
                Kind::LowRank { .. } => !matches!(self.dora, Some(Axis::Columns)),
                Kind::Diff | Kind::Set | Kind::ModelAsLora | Kind::Unchanged => true,
                Kind::Hadamard { .. }
                | Kind::Kronecker { .. }
                | Kind::Glora { .. }
                | Kind::Oft { .. }
                | Kind::Boft { .. } => false,
            }
    }

    /// What is added, and the factor on it beside the strength.
    fn delta(&self, weight: &Dense) -> (Dense, f64) {
        let ([rows, cols], rank) = (weight.size(), self.rank);
        let low = |part, [rows, cols]: [usize; 2]| {
            self.dense(part, [rows, rank]).dot(&self.dense(part + 1, [rank, cols]))
        };
        let cored = |part, core, [rows, cols]: [usize; 2]| {
            let turned = self.dense(part, [rank, rows]).turned();
            turned.dot(&self.dense(core, [rank, rank])).dot(&self.dense(part + 1, [rank, cols]))
        };
        #[expect(clippy::cast_precision_loss, reason = "ranks are small")]
        let by_rank = self.alpha.map_or(1.0, |alpha| alpha / rank as f64);
        match self.kind {
            Kind::LowRank { mid: false } => (low(0, [rows, cols]), by_rank),
            Kind::LowRank { mid: true } => {
                let down = self.dense(2, [rank, rank]).dot(&self.dense(1, [rank, cols]));
                (self.dense(0, [rows, rank]).dot(&down), by_rank)
            }
            Kind::Hadamard { cores } => {
                let side = |part| {
                    if cores {
                        cored(part, part + 2, [rows, cols])
                    } else {
                        low(part, [rows, cols])
                    }
                };
                let right = side(3);
                (side(0).map(|row, col, value| value * right.at(row, col)), by_rank)
            }
            Kind::Kronecker { low: [low1, low2], core } => {
                let (size1, size2) = ([2, 2], [rows / 2, cols / 2]);
                let w1 = if low1 { low(0, size1) } else { self.dense(0, size1) };
                let w2 = match (low2, core) {
                    (true, true) => cored(2, 4, size2),
                    (true, false) => low(2, size2),
                    (false, _) => self.dense(2, size2),
                };
                let delta = weight.map(|row, col, _| {
                    let at1 = w1.at(row / size2[0], col / size2[1]);
                    at1 * w2.at(row % size2[0], col % size2[1])
                });
                (delta, if low1 || low2 { by_rank } else { 1.0 })
            }
            Kind::Glora { .. } => {
                (weight.dot(&low(0, [cols, cols])).plus(&low(2, [rows, cols])), by_rank)
            }
            Kind::Oft { size } => {
                let turns = self.turns(rows / size, size);
                (self.turned_once(weight, &turns, size), 1.0)
            }
            Kind::Boft { size, stages, rescale } => {
                (self.turned_often(weight, [size, stages], rescale), 1.0)
            }
            Kind::Diff | Kind::Set | Kind::ModelAsLora | Kind::Unchanged => {
                (self.dense(0, [rows, cols]), 1.0)
            }
        }
    }

    fn turns(&self, count: usize, size: usize) -> Vec<Dense> {
        let blocks = values(self.seed, count * size * size);
        rotations(&blocks, size, self.alpha.unwrap_or(0.0))
    }

    fn turned_once(&self, weight: &Dense, turns: &[Dense], size: usize) -> Dense {
        weight.map(|row, col, _| {
            let (block, at) = (row / size, row % size);
            let sum = (0..size).map(|from| {
                let identity = f64::from(u8::from(from == at));
                (turns[block].at(from, at) - identity) * weight.at(block * size + from, col)
            });
            self.strength_patch * sum.sum::<f64>()
        })
    }

    fn turned_often(&self, weight: &Dense, [size, stages]: [usize; 2], rescale: bool) -> Dense {
        let rows = weight.size()[0];
        let count = rows / size;
        let turns = self.turns(stages * count, size);
        let mut turned = weight.clone();
        for stage in 0..stages {
            let places = butterfly(rows, (1 << stage) * size / 2);
            let mut next = turned.clone();
            for (place, &row) in places.iter().enumerate() {
                let (block, at) = (place / size, place % size);
                for col in 0..weight.size()[1] {
                    let sum = (0..size).map(|from| {
                        let identity = f64::from(u8::from(from == at));
                        let turn = turns[stage * count + block].at(at, from);
                        let mixed =
                            self.strength_patch * turn + (1.0 - self.strength_patch) * identity;
                        mixed * turned.at(places[block * size + from], col)
                    });
                    next.set(row, col, sum.sum());
                }
            }
            turned = next;
        }
        if rescale {
            let factors = values(self.seed.wrapping_add(1), rows);
            turned = turned.map(|row, _, value| value * f64::from(factors[row]));
        }
        turned.plus(&weight.times(-1.0))
    }

    fn dora_scale(&self, [rows, cols]: [usize; 2]) -> Option<Matrix> {
        let is_factored =
            !matches!(self.kind, Kind::Diff | Kind::Set | Kind::ModelAsLora | Kind::Unchanged);
        match self.dora.filter(|_| is_factored)? {
            Axis::Rows => Some(self.matrix(9, [rows, 1])),
            Axis::Columns => Some(self.matrix(9, [1, cols])),
        }
    }

    /// Two matrices whose product has `size`, the first one `turned` or not.
    fn factors(&self, part: u64, [rows, cols]: [usize; 2], turned: bool) -> [Matrix; 2] {
        let first = if turned { [self.rank, rows] } else { [rows, self.rank] };
        [self.matrix(part, first), self.matrix(part + 1, [self.rank, cols])]
    }

    fn core(&self, part: u64) -> Array {
        self.array(part, &[self.rank, self.rank, 1, 1])
    }

    fn dense(&self, part: u64, size: [usize; 2]) -> Dense {
        Dense::new(size, &values(self.seed.wrapping_add(part), size[0] * size[1]))
    }

    fn matrix(&self, part: u64, [rows, cols]: [usize; 2]) -> Matrix {
        Matrix::new(Dtype::Float32, rows, cols, self.bytes(part, rows * cols)).unwrap()
    }

    fn array(&self, part: u64, shape: &[usize]) -> Array {
        Array::new(Dtype::Float32, shape, self.bytes(part, shape.iter().product())).unwrap()
    }

    fn bytes(&self, part: u64, count: usize) -> Vec<u8> {
        let values = values(self.seed.wrapping_add(part), count);
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

/// A number below `count`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes are small, and fractions are not negative"
)]
fn part(count: usize, fraction: f64) -> usize {
    (count as f64 * fraction) as usize
}

/// `patch` with the scale, if there is one.
fn with<T>(
    scale: Option<Matrix>,
    patch: T,
    add: impl FnOnce(T, Matrix) -> Result<T, PatchError>,
) -> T {
    match scale {
        Some(scale) => add(patch, scale).unwrap(),
        None => patch,
    }
}

/// Numbers from -1 to 1 that depend on `seed` alone.
#[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
pub(super) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}
