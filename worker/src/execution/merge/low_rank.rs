//! `LoRA`: a product of two thin matrices.

use adapter::LowRank;
use candle_core::{Device, Result};

use super::change::{Change, matrix};

/// `up · mid · down`.
pub(super) fn change<'a>(patch: &'a LowRank, device: &Device) -> Result<Change<'a>> {
    let mut down = matrix(patch.down(), device)?;
    if let Some(mid) = patch.mid() {
        down = matrix(mid, device)?.matmul(&down)?;
    }
    let delta = matrix(patch.up(), device)?.matmul(&down)?;
    Ok(Change { delta, scale: patch.scale(), dora_scale: patch.dora_scale() })
}
