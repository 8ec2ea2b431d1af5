//! Merging against an independent reference in f64, over random kinds, shapes, strengths and
//! orders.

mod recipe;
mod reference;

use std::cell::Cell;

use adapter::{Patch, Slice};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use protocol::Dtype;

use self::{
    recipe::{Recipe, SIZES, recipes, values},
    reference::Dense,
};
use super::{super::stack::StackedPatch, Weight, check, merged, merged_rows, shape_of};
use crate::weights::round;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn merged_weights_are_those_of_the_reference(
        recipes in recipes(1..4),
        size in prop::sample::select(&SIZES[..]),
        seed in any::<u64>(),
    ) {
        let weight = values(seed, size[0] * size[1]);
        let original = Dense::new(size, &original(size));
        let mut expected = Dense::new(size, &weight);
        let mut largest = expected.largest();
        for recipe in &recipes {
            expected = recipe.reference(&expected, &original);
            largest = largest.max(expected.largest());
        }
        let ours = merge(&weight, size, &recipes, Dtype::Float32);
        let distance = expected.distance(&ours);
        prop_assert!(distance <= 2e-5 * largest.max(1.0), "{distance} of {largest}");
    }

    #[test]
    fn the_sum_is_rounded_once_at_the_end(
        recipes in recipes(1..4),
        size in prop::sample::select(&SIZES[..]),
        dtype in prop::sample::select(&[Dtype::Float16, Dtype::Bfloat16][..]),
        seed in any::<u64>(),
    ) {
        let weight = values(seed, size[0] * size[1]);
        let mut expected = merge(&weight, size, &recipes, Dtype::Float32);
        round(dtype, &mut expected);
        prop_assert_eq!(merge(&weight, size, &recipes, dtype), expected);
    }
}

proptest! {
    #[test]
    fn rows_merged_alone_are_those_of_the_whole(
        recipes in recipes(1..4),
        size in prop::sample::select(&SIZES[..]),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..9),
        seed in any::<u64>(),
    ) {
        let rows: Vec<usize> = picks.iter().map(|pick| pick.index(size[0])).collect();
        let pick = |elements: &[f32]| -> Vec<f32> {
            rows.iter().flat_map(|row| elements[row * size[1]..][..size[1]].to_vec()).collect()
        };
        let weight = values(seed, size[0] * size[1]);
        let patches: Vec<_> = recipes.iter().map(|recipe| recipe.patch(size)).collect();
        let stacked = stacked(size, &patches, &recipes);
        let tensor = |elements: &[f32]| {
            Tensor::from_vec(pick(elements), (rows.len(), size[1]), &Device::Cpu).unwrap()
        };
        let (some, original) = (tensor(&weight), || Ok(tensor(&original(size))));
        let some = Weight { patched: &some, original: &original, watch: &|| Ok(()) };
        let ids: Vec<u32> = rows.iter().map(|row| u32::try_from(*row).unwrap()).collect();
        let ours = merged_rows(some, &stacked, &ids, Dtype::Float32).unwrap();

        let is_alone = |recipe: &Recipe| recipe.changes_rows_alone();
        prop_assert_eq!(ours.is_some(), recipes.iter().all(is_alone));
        if let Some(ours) = ours {
            let expected = pick(&merge(&weight, size, &recipes, Dtype::Float32));
            let expected = Dense::new([rows.len(), size[1]], &expected);
            let distance = expected.distance(&ours.flatten_all().unwrap().to_vec1().unwrap());
            prop_assert!(distance <= 1e-5 * expected.largest().max(1.0), "{}", distance);
        }
    }
}

#[test]
fn merging_ends_between_two_patches_when_the_watch_says_so() {
    let size = [4, 4];
    let weight = Tensor::zeros(&size, DType::F32, &Device::Cpu).unwrap();
    let asked = Cell::new(0);
    let watch = || {
        asked.set(asked.get() + 1);
        if asked.get() == 3 {
            candle_core::bail!("interrupted");
        }
        Ok(())
    };
    let original = || Ok(weight.clone());
    let watched = Weight { patched: &weight, original: &original, watch: &watch };
    let slice = Some(Slice::new(0, 0, 1).unwrap());
    let scaled = StackedPatch { patch: None, slice, strength_patch: 0.0, strength_model: 0.5 };
    let error = merged(watched, &[scaled; 5], Dtype::Float32).unwrap_err();
    assert!(error.to_string().contains("interrupted"), "{error}");
    assert_eq!(asked.get(), 3, "the third patch is not applied");
}

#[test]
fn a_slice_beyond_the_weight_is_a_misfit() {
    let shape = |dim, start, length| {
        let slice = Slice::new(dim, start, length).unwrap();
        shape_of(Some(slice), &[8, 6]).map_err(|misfit| misfit.to_string())
    };
    assert_eq!(shape(0, 2, 6), Ok(vec![6, 6]));
    assert_eq!(shape(1, 0, 1), Ok(vec![8, 1]));
    assert_eq!(shape(0, 3, 6).unwrap_err(), "the weight is [8, 6], which has no slice [0:3:6]");
    assert!(shape(2, 0, 1).is_err());
    assert_eq!(shape_of(None, &[8, 6]), Ok(vec![8, 6]));
}

fn merge(weight: &[f32], size: [usize; 2], recipes: &[Recipe], dtype: Dtype) -> Vec<f32> {
    let patches: Vec<_> = recipes.iter().map(|recipe| recipe.patch(size)).collect();
    for (patch, recipe) in patches.iter().zip(recipes) {
        assert_eq!(shape_of(recipe.slice(size), &size), Ok(recipe.sliced(size).to_vec()));
        check(patch, &recipe.sliced(size)).unwrap();
    }
    let stacked = stacked(size, &patches, recipes);
    let tensor = |elements: &[f32]| Tensor::from_slice(elements, &size, &Device::Cpu);
    let original = || tensor(&original(size));
    let weight = tensor(weight).unwrap();
    let weight = Weight { patched: &weight, original: &original, watch: &|| Ok(()) };
    merged(weight, &stacked, dtype).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// What the model has; another weight than the one that is patched, as after an earlier stage.
fn original(size: [usize; 2]) -> Vec<f32> {
    values(4711, size[0] * size[1])
}

fn stacked<'a>(
    size: [usize; 2],
    patches: &'a [Patch],
    recipes: &[Recipe],
) -> Vec<StackedPatch<'a>> {
    let stacked = patches.iter().zip(recipes).map(|(patch, recipe)| StackedPatch {
        patch: Some(patch),
        slice: recipe.slice(size),
        strength_patch: recipe.strength_patch,
        strength_model: recipe.strength_model,
    });
    stacked.collect()
}
