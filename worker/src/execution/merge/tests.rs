//! Merging against an independent reference in f64, over random kinds, shapes, strengths and
//! orders.

mod recipe;
mod reference;

use adapter::Patch;
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use protocol::Dtype;

use self::{
    recipe::{Recipe, SIZES, recipes, values},
    reference::Dense,
};
use super::{super::stack::StackedPatch, check, merged, merged_rows};
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
        let mut expected = Dense::new(size, &weight);
        let mut largest = expected.largest();
        for recipe in &recipes {
            expected = recipe.reference(&expected);
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
        let stacked = stacked(&patches, &recipes);
        let some = Tensor::from_vec(pick(&weight), (rows.len(), size[1]), &Device::Cpu).unwrap();
        let ids: Vec<u32> = rows.iter().map(|row| u32::try_from(*row).unwrap()).collect();
        let ours = merged_rows(&some, &stacked, &ids, Dtype::Float32).unwrap();

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

fn merge(weight: &[f32], size: [usize; 2], recipes: &[Recipe], dtype: Dtype) -> Vec<f32> {
    let patches: Vec<_> = recipes.iter().map(|recipe| recipe.patch(size)).collect();
    for patch in &patches {
        check(patch, &size).unwrap();
    }
    let stacked = stacked(&patches, recipes);
    let weight = Tensor::from_slice(weight, &size, &Device::Cpu).unwrap();
    merged(&weight, &stacked, dtype).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn stacked<'a>(patches: &'a [Patch], recipes: &[Recipe]) -> Vec<StackedPatch<'a>> {
    let stacked = patches.iter().zip(recipes).map(|(patch, recipe)| StackedPatch {
        patch: Some(patch),
        strength_patch: recipe.strength_patch,
        strength_model: recipe.strength_model,
    });
    stacked.collect()
}
