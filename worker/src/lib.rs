//! The worker process: CLIP text models on candle, adapters, executor and event loop.
//!
//! This is the only crate that names candle and NVML. What a worker *decides* (what to run next,
//! what to evict) is in `worker-core`; what it *computes* is here.

pub mod conditioning;
pub mod device;
pub mod embeddings;
pub mod execution;
pub mod model;
pub mod weights;

mod arrival;
mod blob_cache;
mod config;
mod engine;
mod executor;
mod failure;
mod interrupt;
mod journal;
mod models;
mod request;
mod run;
mod service;
#[cfg(test)]
mod testing;

pub use interrupt::Interrupt;
pub use run::main_with_args;
