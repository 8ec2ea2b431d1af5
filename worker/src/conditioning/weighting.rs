//! Prompt weights: every position is moved away from, or towards, the empty prompt's encoding.

use protocol::Chunk;

use super::Part;

/// `z + (z - empty) · (w - 1)` as ComfyUI computes it, `(z - empty) · w + empty` in f32, at every
/// position whose weight is not 1. `empty` is the encoding of the empty prompt: one row, so it tells how long
/// a row is.
#[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32")]
#[expect(clippy::float_cmp, reason = "the rule is exact inequality with 1")]
pub(super) fn apply(mut part: Part, chunks: &[Chunk], empty: &[f32]) -> Part {
    let width = part.width;
    let rows = part.hidden.chunks_exact_mut(empty.len());
    for (row, chunk) in rows.zip(chunks) {
        let positions = row.chunks_exact_mut(width).zip(empty.chunks_exact(width));
        for ((states, empty), &weight) in positions.zip(&chunk.weights) {
            if weight == 1.0 {
                continue;
            }
            let weight = weight as f32;
            for (state, empty) in states.iter_mut().zip(empty) {
                *state = (*state - empty) * weight + empty;
            }
        }
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_zero_is_the_empty_prompt_and_weight_two_moves_away_from_it() {
        for length in [77, 248] {
            let part = Part { hidden: vec![3.0; 2 * length], width: 1, pooled: None };
            let empty = vec![1.0; length];
            let mut weights = vec![1.0; length];
            (weights[1], weights[2], weights[3]) = (0.0, 2.0, -1.0);
            let chunk = Chunk { weights, ..Chunk::default() };

            let weighted = apply(part, &[Chunk::default(), chunk], &empty).hidden;
            assert_eq!(weighted[..length], vec![3.0; length]);
            assert_eq!(weighted[length..length + 5], [3.0, 1.0, 5.0, -1.0, 3.0]);
        }
    }
}
