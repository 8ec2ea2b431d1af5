//! The part of a parameter that a patch acts on, where it is not the whole: ComfyUI's offset.

use std::{fmt, str::FromStr};

use crate::error::clip;

/// Dimensions are counted 0 to 3: no parameter has more than four.
const DIM_MAX: usize = 3;

/// Where a slice ends at the latest. No parameter is that large, and sums of two do not overflow.
const END_MAX: usize = u32::MAX as usize;

/// `length` indices from `start` on, of dimension `dim`; all of every other dimension.
///
/// Displayed as, and parsed from, `[dim:start:length]`: `[0:768:768]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slice {
    dim: usize,
    start: usize,
    length: usize,
}

/// Numbers or a text that are no slice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a slice of a parameter: expected `[dim:start:length]` with dim at most {DIM_MAX}, length at least 1, and start and length together at most {END_MAX}"
)]
pub struct InvalidSlice {
    /// The slice as it would be written, cut to a length fit for a message.
    pub text: String,
}

impl Slice {
    /// The slice of `length` indices of dimension `dim` that begins with index `start`.
    ///
    /// # Errors
    ///
    /// The dimension is above 3, the length is 0, or the end is above `u32::MAX`.
    pub fn new(dim: usize, start: usize, length: usize) -> Result<Self, InvalidSlice> {
        let end = start.checked_add(length);
        if dim <= DIM_MAX && length > 0 && end.is_some_and(|end| end <= END_MAX) {
            return Ok(Self { dim, start, length });
        }
        Err(InvalidSlice { text: format!("[{dim}:{start}:{length}]") })
    }

    /// The dimension that is cut, 0 to 3.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The first index.
    pub fn start(&self) -> usize {
        self.start
    }

    /// How many indices, at least 1.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The index after the last.
    pub fn end(&self) -> usize {
        self.start + self.length
    }

    /// Whether an element can be in both slices of one parameter. Slices of different dimensions
    /// always have one in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.dim != other.dim || (self.start < other.end() && other.start < self.end())
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}:{}:{}]", self.dim, self.start, self.length)
    }
}

impl FromStr for Slice {
    type Err = InvalidSlice;

    fn from_str(text: &str) -> Result<Self, InvalidSlice> {
        let slice = || {
            let mut numbers = text.strip_prefix('[')?.strip_suffix(']')?.split(':');
            let mut next = || numbers.next().and_then(number);
            let (dim, start, length) = (next()?, next()?, next()?);
            if numbers.next().is_some() { None } else { Self::new(dim, start, length).ok() }
        };
        slice().ok_or_else(|| InvalidSlice { text: clip(text) })
    }
}

/// A number as it is printed: digits without sign and leading zero.
pub(crate) fn number(text: &str) -> Option<usize> {
    let number = text.parse::<usize>().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_reads_back_from_its_text() {
        for text in ["[0:768:768]", "[3:0:1]", "[1:4294967294:1]", "[0:0:4294967295]"] {
            assert_eq!(text.parse::<Slice>().unwrap().to_string(), text);
        }
        let slice: Slice = "[1:2:3]".parse().unwrap();
        assert_eq!([slice.dim(), slice.start(), slice.length(), slice.end()], [1, 2, 3, 5]);
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        for text in [
            "",
            "[]",
            "0:1:2",
            "[0:1]",
            "[0:1:2:3]",
            "[0:1:2",
            "[[0:1:2]]",
            "[0:01:2]",
            "[0:+1:2]",
            "[0:-1:2]",
            "[0: 1:2]",
            "[0:1:0]",
            "[4:0:1]",
            "[0:1:4294967295]",
            "[0:18446744073709551615:18446744073709551615]",
            "[0:18446744073709551616:1]",
        ] {
            let error = text.parse::<Slice>().unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{text}` is not a slice")), "{error}");
        }
        assert!(Slice::new(0, usize::MAX, 1).is_err());
    }

    #[test]
    fn slices_overlap_where_they_share_an_index_or_cross() {
        let overlap = |one: &str, other: &str| {
            let [one, other] = [one, other].map(|text| text.parse::<Slice>().unwrap());
            assert_eq!(one.overlaps(&other), other.overlaps(&one));
            one.overlaps(&other)
        };
        assert!(!overlap("[0:0:4]", "[0:4:4]"));
        assert!(!overlap("[1:8:1]", "[1:0:8]"));
        assert!(overlap("[0:0:5]", "[0:4:4]"));
        assert!(overlap("[0:0:9]", "[0:4:1]"));
        assert!(overlap("[0:0:1]", "[1:7:1]"));
    }
}
