//! Patches that hold every element: a difference that is added, a value that replaces, and the
//! weight of another model.

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

/// `W += strength · (value - O)`, where `O` is the model's own value of the weight or bias: without
/// any patch, also of those that were applied before.
///
/// No LoRA file has it; ComfyUI makes it for a whole model that is used like a `LoRA`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelAsLora {
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

impl ModelAsLora {
    /// The patch that goes from the model's own value to `value`, the other model's.
    pub fn new(value: Array) -> Self {
        Self { value }
    }

    /// What the weight or bias is in the other model.
    pub fn value(&self) -> &Array {
        &self.value
    }
}
