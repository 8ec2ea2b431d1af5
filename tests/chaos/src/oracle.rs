//! The solo answers: what each entry of the catalogue encodes to on a farm that does nothing else.

use std::time::Duration;

use anyhow::{Context as _, Result};
use luna_client::{AdapterId, Client, Encoding, Tensor};

use crate::catalogue::Catalogue;

/// Knows the right answer to every entry, and the names of the LoRAs.
#[derive(Debug)]
pub(crate) struct Oracle {
    /// By the number of the LoRA.
    pub(crate) adapters: Vec<AdapterId>,
    /// By the number of the entry.
    answers: Vec<Answer>,
}

/// What is compared, bit for bit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    shapes: [Vec<usize>; 2],
    bits: Vec<u32>,
}

impl Oracle {
    /// Asks a quiet farm for everything, one after the other.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn ask(client: &Client, catalogue: &Catalogue) -> Result<Self> {
        let mut adapters = Vec::new();
        for lora in &catalogue.loras {
            let uploaded = client.upload_lora(&lora.path, |_| {}).await;
            adapters.push(uploaded.with_context(|| format!("`{}`", lora.path.display()))?.adapter);
        }
        let mut answers = Vec::new();
        for entry in 0..catalogue.len() {
            let request = catalogue.request(entry, &adapters, PATIENCE, None);
            let encoding = client.encode(request).await;
            answers.push(Answer::of(&encoding.with_context(|| format!("entry {entry}"))?));
        }
        Ok(Self { adapters, answers })
    }

    /// Compares an answer with the solo answer.
    ///
    /// # Errors
    /// A sentence that says how they differ, and whose answer it is if it is another entry's.
    pub(crate) fn check(&self, entry: usize, encoding: &Encoding) -> Result<(), String> {
        let (found, expected) = (Answer::of(encoding), &self.answers[entry]);
        if found == *expected {
            return Ok(());
        }
        let worker = &encoding.receipt.worker;
        let whose = self.answers.iter().position(|answer| *answer == found);
        let how = match whose {
            Some(other) => format!("it is the answer of entry {other}"),
            None => found.difference(expected),
        };
        Err(format!("entry {entry} from `{worker}`: {how}"))
    }
}

impl Answer {
    fn of(encoding: &Encoding) -> Self {
        let first = encoding.conditionings.first();
        let tensors: Vec<&Tensor> = first.iter().flat_map(|it| [&it.cond, &it.pooled]).collect();
        let shape = |index: usize| {
            tensors.get(index).map(|tensor| tensor.shape.clone()).unwrap_or_default()
        };
        let elements = tensors.iter().flat_map(|tensor| &tensor.data);
        Self { shapes: [shape(0), shape(1)], bits: elements.map(|it| it.to_bits()).collect() }
    }

    fn difference(&self, expected: &Self) -> String {
        if self.shapes != expected.shapes {
            return format!("its shapes are {:?} instead of {:?}", self.shapes, expected.shapes);
        }
        let pairs = self.bits.iter().zip(&expected.bits);
        let distances = pairs.map(|(a, b)| (f32::from_bits(*a) - f32::from_bits(*b)).abs());
        let others = self.bits.iter().zip(&expected.bits).filter(|(a, b)| a != b).count();
        let worst = distances.fold(0.0, f32::max);
        format!("{others} of {} elements differ, by up to {worst:e}", self.bits.len())
    }
}

/// For one answer of a quiet farm.
const PATIENCE: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told_in_numbers() {
        let answer = |elements: &[f32]| Answer {
            shapes: [vec![1, 2, 1], vec![1, 1]],
            bits: elements.iter().map(|it| it.to_bits()).collect(),
        };
        let (found, expected) = (answer(&[1.0, 2.5, 3.0]), answer(&[1.0, 2.0, 3.0]));
        assert_eq!(found.difference(&expected), "1 of 3 elements differ, by up to 5e-1");
        let longer = Answer { shapes: [vec![1, 4, 1], vec![1, 1]], ..found };
        assert!(longer.difference(&expected).contains("[[1, 4, 1], [1, 1]] instead of"));
    }
}
