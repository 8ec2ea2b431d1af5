//! Patches that hold every element: a difference that is added, and a value that replaces.

use crate::array::Array;

/// `W += strength · value`, where `W` is a weight or a bias of the value's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    value: Array,
}

/// `W = value` whatever the strength, where `W` is a weight of the value's shape.
///
/// What was patched before is lost; what is patched later applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetWeight {
    value: Array,
}

impl Diff {
    /// The patch that adds `value`.
    pub fn new(value: Array) -> Self {
        Self { value }
    }

    /// What is added.
    pub fn value(&self) -> &Array {
        &self.value
    }
}

impl SetWeight {
    /// The patch that puts `value` in the weight's place.
    pub fn new(value: Array) -> Self {
        Self { value }
    }

    /// What the weight becomes.
    pub fn value(&self) -> &Array {
        &self.value
    }
}
