//! The MLP's activation as one pass over memory, where candle's own operations take three.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, cpu::erf::erf_f32};

use rayon::prelude::*;

use super::config::Activation;

/// Elements that are worth the hand-over to another thread.
const ELEMENTS_PER_TASK_MIN: usize = 1 << 14;

/// Applies `activation` to every element.
pub(super) fn activate(activation: Activation, input: &Tensor) -> Result<Tensor> {
    input.contiguous()?.apply_op1_no_bwd(&Activate(activation))
}

struct Activate(Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("activate needs a contiguous tensor");
        };
        let input = &storage.as_slice::<f32>()?[start..end];
        let input = input.par_iter().with_min_len(ELEMENTS_PER_TASK_MIN);
        let output = match self.0 {
            Activation::QuickGelu => input.map(|&x| quick_gelu(x)).collect(),
            Activation::Gelu => input.map(|&x| gelu(x)).collect(),
        };
        Ok((CpuStorage::F32(output), layout.shape().clone()))
    }
}

/// `x · sigmoid(1.702 x)`.
fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + (-1.702 * x).exp())
}

/// `x · Φ(x)`, with Φ the cumulative distribution of the normal distribution.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn activations_match_candles_own() {
        let input = Tensor::arange(-6f32, 6f32, &Device::Cpu).unwrap();
        let input = (input * 0.7).unwrap();

        let quick = activate(Activation::QuickGelu, &input).unwrap();
        let sigmoid = candle_nn::ops::sigmoid(&(&input * 1.702).unwrap()).unwrap();
        assert_close(&quick, &(&input * sigmoid).unwrap());

        let exact = activate(Activation::Gelu, &input).unwrap();
        assert_close(&exact, &input.gelu_erf().unwrap());
    }

    fn assert_close(left: &Tensor, right: &Tensor) {
        let distance = (left - right).unwrap().abs().unwrap().max_all().unwrap();
        assert!(distance.to_scalar::<f32>().unwrap() < 1e-6);
    }
}
