//! End-to-end tests: real processes, real sockets, real models.
//!
//! [`Cluster`] starts a farm of `luna broker` and `luna worker` processes, and [`Launcher`] its
//! processes one by one; [`models`] writes the
//! seeded models that they serve; [`golden`] knows what ComfyUI computes with the same weights;
//! [`WireClient`] says what no SDK would say.
//! The tests themselves are in `tests/tests`.

pub mod binary;
pub mod cluster;
pub mod golden;
pub mod launcher;
pub mod models;
pub mod process;
pub mod wire;

pub use cluster::{Cluster, ClusterPlan};
pub use launcher::Launcher;
pub use process::Process;
pub use wire::WireClient;
