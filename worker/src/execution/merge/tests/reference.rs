//! Matrices of f64 by the book: slow, and nothing shared with what is tested.

use std::ops::Range;

/// A matrix.
#[derive(Debug, Clone)]
pub(super) struct Dense {
    size: [usize; 2],
    elements: Vec<f64>,
}

impl Dense {
    pub(super) fn new(size: [usize; 2], elements: &[f32]) -> Self {
        assert_eq!(elements.len(), size[0] * size[1]);
        Self { size, elements: elements.iter().copied().map(f64::from).collect() }
    }

    pub(super) fn size(&self) -> [usize; 2] {
        self.size
    }

    pub(super) fn at(&self, row: usize, col: usize) -> f64 {
        self.elements[row * self.size[1] + col]
    }

    pub(super) fn set(&mut self, row: usize, col: usize, value: f64) {
        self.elements[row * self.size[1] + col] = value;
    }

    pub(super) fn map(&self, value: impl Fn(usize, usize, f64) -> f64) -> Self {
        Self::from_fn(self.size, |row, col| value(row, col, self.at(row, col)))
    }

    pub(super) fn times(&self, factor: f64) -> Self {
        self.map(|_, _, value| value * factor)
    }

    pub(super) fn plus(&self, other: &Self) -> Self {
        self.map(|row, col, value| value + other.at(row, col))
    }

    pub(super) fn turned(&self) -> Self {
        Self::from_fn([self.size[1], self.size[0]], |row, col| self.at(col, row))
    }

    pub(super) fn dot(&self, other: &Self) -> Self {
        Self::from_fn([self.size[0], other.size[1]], |row, col| {
            (0..self.size[1]).map(|inner| self.at(row, inner) * other.at(inner, col)).sum()
        })
    }

    /// The rows (`dim` 0) or columns (`dim` 1) of `range`.
    pub(super) fn cut(&self, dim: usize, range: Range<usize>) -> Self {
        let mut size = self.size;
        size[dim] = range.len();
        Self::from_fn(size, |row, col| {
            if dim == 0 { self.at(row + range.start, col) } else { self.at(row, col + range.start) }
        })
    }

    /// `cut` in place of the rows or columns from `start` on.
    pub(super) fn with_cut(&self, dim: usize, start: usize, cut: &Self) -> Self {
        let range = start..start + cut.size[dim];
        self.map(|row, col, value| match dim {
            0 if range.contains(&row) => cut.at(row - start, col),
            1 if range.contains(&col) => cut.at(row, col - start),
            _ => value,
        })
    }

    pub(super) fn row_length(&self, row: usize) -> f64 {
        (0..self.size[1]).map(|col| self.at(row, col).powi(2)).sum::<f64>().sqrt()
    }

    pub(super) fn column_length(&self, col: usize) -> f64 {
        (0..self.size[0]).map(|row| self.at(row, col).powi(2)).sum::<f64>().sqrt()
    }

    pub(super) fn largest(&self) -> f64 {
        self.elements.iter().fold(0.0, |largest, value| value.abs().max(largest))
    }

    pub(super) fn distance(&self, other: &[f32]) -> f64 {
        assert_eq!(self.elements.len(), other.len());
        let distances = self.elements.iter().zip(other).map(|(a, b)| (a - f64::from(*b)).abs());
        distances.fold(
            0.0,
            |worst, distance| if distance.is_nan() { f64::NAN } else { distance.max(worst) },
        )
    }

    fn from_fn(size: [usize; 2], value: impl Fn(usize, usize) -> f64) -> Self {
        let places = (0..size[0]).flat_map(|row| (0..size[1]).map(move |col| (row, col)));
        Self { size, elements: places.map(|(row, col)| value(row, col)).collect() }
    }

    fn identity(size: usize) -> Self {
        Self::from_fn([size, size], |row, col| f64::from(u8::from(row == col)))
    }

    /// The inverse, by Cramer's rule: no elimination, so no mistake in common.
    fn inverse(&self) -> Self {
        let determinant = self.determinant();
        self.map(|row, col, _| {
            let sign = if (row + col).is_multiple_of(2) { 1.0 } else { -1.0 };
            sign * self.without(col, row).determinant() / determinant
        })
    }

    fn determinant(&self) -> f64 {
        if self.size[0] == 0 {
            return 1.0;
        }
        let cofactor = |col: usize| {
            let sign = if col.is_multiple_of(2) { 1.0 } else { -1.0 };
            sign * self.at(0, col) * self.without(0, col).determinant()
        };
        (0..self.size[1]).map(cofactor).sum()
    }

    fn without(&self, row: usize, col: usize) -> Self {
        let skip = |at: usize, gap: usize| if at < gap { at } else { at + 1 };
        Self::from_fn([self.size[0] - 1, self.size[1] - 1], |r, c| {
            self.at(skip(r, row), skip(c, col))
        })
    }
}

/// `(I + Q) (I − Q)⁻¹` of every block, Q being B − Bᵀ, all of them scaled down where they are longer
/// than a positive `constraint`.
pub(super) fn rotations(blocks: &[f32], size: usize, constraint: f64) -> Vec<Dense> {
    let blocks = blocks.chunks(size * size).map(|block| Dense::new([size, size], block));
    let skews: Vec<Dense> = blocks.map(|block| block.plus(&block.turned().times(-1.0))).collect();
    let squares = skews.iter().flat_map(|skew| &skew.elements).map(|q| q * q);
    let length = squares.sum::<f64>().sqrt() + 1e-8;
    let factor = if constraint > 0.0 && length > constraint { constraint / length } else { 1.0 };
    let one = Dense::identity(size);
    let turn = |skew: &Dense| {
        let skew = skew.times(factor);
        one.plus(&skew).dot(&one.plus(&skew.times(-1.0)).inverse())
    };
    skews.iter().map(turn).collect()
}

/// For every place of the order in which blocks are taken, the row that stands there: partners
/// `half` rows apart become neighbours.
pub(super) fn butterfly(rows: usize, half: usize) -> Vec<usize> {
    let groups = (0..rows / (2 * half)).map(|group| group * 2 * half);
    groups.flat_map(|start| (start..start + half).flat_map(move |row| [row, row + half])).collect()
}
