//! Where a worker computes, and which GPUs the machine has.
//!
//! A device that was asked for and cannot be used is an error: nothing here falls back.

use std::{fmt, str::FromStr};

use candle_core::Device;
use nvml_wrapper::{Nvml, error::NvmlError};

/// Names of NVML's library: the one that every driver installs, then the one of developers.
const NVML_LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// A device as an operator names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// `cpu`.
    Cpu,
    /// `cuda:N`, N counting from 0 among the GPUs that the process sees.
    Cuda(usize),
}

/// Why there is no such device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The text names no device.
    #[error("unknown device `{0}`: expected `cpu` or `cuda:N`")]
    Unknown(String),
    /// This build computes on the CPU alone.
    #[error("device `{0}` needs a worker built with CUDA: choose `cpu`, or install that build")]
    NotBuilt(DeviceChoice),
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    /// When this build cannot use it.
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(_) => Err(DeviceError::NotBuilt(self)),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        index.map(Self::Cuda).ok_or_else(|| DeviceError::Unknown(text.to_owned()))
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// One GPU of the machine, whoever uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// NVML's index.
    pub index: u32,
    /// The name that never changes, `GPU-…`.
    pub uuid: String,
    /// What it is sold as.
    pub name: String,
    /// Memory of the card.
    pub memory_bytes_total: u64,
    /// Memory that no process uses.
    pub memory_bytes_free: u64,
}

/// Why the GPUs of the machine are not known.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver, so there is no usable GPU either.
    #[error("NVML is not available: {reason}")]
    NoNvml {
        /// What the loader or the library says.
        reason: String,
    },
    /// The driver is there and did not answer.
    #[error("NVML failed on GPU {index}")]
    Gpu {
        /// The GPU's index.
        index: u32,
        /// What the library says.
        source: NvmlError,
    },
}

/// Lists the GPUs of the machine.
///
/// # Errors
/// [`GpuError::NoNvml`] where there is no driver; the other kind when a GPU does not answer.
pub fn gpus() -> Result<Vec<Gpu>, GpuError> {
    let no_nvml = |error: &NvmlError| GpuError::NoNvml { reason: error.to_string() };
    let nvml = open_nvml().map_err(|error| no_nvml(&error))?;
    let count = nvml.device_count().map_err(|error| no_nvml(&error))?;
    (0..count)
        .map(|index| describe(&nvml, index).map_err(|source| GpuError::Gpu { index, source }))
        .collect()
}

fn open_nvml() -> Result<Nvml, NvmlError> {
    let [first, second] = NVML_LIBRARIES;
    let open = |library: &str| Nvml::builder().lib_path(library.as_ref()).init();
    open(first).or_else(|error| open(second).map_err(|_| error))
}

fn describe(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let memory = device.memory_info()?;
    Ok(Gpu {
        index,
        uuid: device.uuid()?,
        name: device.name()?,
        memory_bytes_total: memory.total,
        memory_bytes_free: memory.free,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reads_back_from_its_name() {
        for text in ["cpu", "cuda:0", "cuda:7"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "CPU"] {
            let error = text.parse::<DeviceChoice>().unwrap_err();
            assert_eq!(error, DeviceError::Unknown(text.to_owned()));
        }
    }

    #[test]
    fn a_gpu_that_this_build_cannot_use_is_an_error_and_not_the_cpu() {
        let error = "cuda:1".parse::<DeviceChoice>().unwrap().open().unwrap_err();
        assert!(error.to_string().contains("`cuda:1` needs a worker built with CUDA"));
        assert!(DeviceChoice::Cpu.open().unwrap().is_cpu());
    }

    #[test]
    fn a_machine_without_nvml_says_why() {
        match gpus() {
            Ok(gpus) => assert!(gpus.iter().all(|gpu| gpu.memory_bytes_total > 0)),
            Err(error) => assert!(error.to_string().starts_with("NVML "), "{error}"),
        }
    }
}
