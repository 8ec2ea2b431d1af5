//! Measures a broker from outside, as `luna bench` does.
//!
//! A real broker process stands between workers that answer at once, or after a fixed time, and
//! clients that only send and receive frames; both are real DEALER sockets of `transport` that speak
//! the wire protocol. No SDK, no model and no tensor is involved, so what is measured is the broker
//! and its sockets. The numbers are those of the machine they were taken on, which also runs the
//! load; a libzmq proxy under the same load (`site`) says what the machine can do.
//!
//! [`broker::run`] finds throughput, latency, CPU time and memory; [`overload::run`] finds what is
//! left of them when more is asked for than can be done. Nothing here judges the numbers.

pub mod broker;
mod closed_loop;
mod idle;
mod latency;
mod open_loop;
pub mod overload;
mod proc_stat;
mod schedule;
mod site;
mod subject;
mod traffic;
mod worker;

pub use broker::{BrokerPlan, BrokerReport, Cell, Measurement, Sizes};
pub use idle::IdleReport;
pub use latency::LatencySummary;
pub use overload::{LoadReport, OverloadPlan, OverloadReport};
