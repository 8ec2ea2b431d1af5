//! Scenarios: what the broker does, told as events and commands.

mod admission;
mod answers;
mod draining;
mod failover;
mod fairness;
mod faults;
mod model_files;
mod models;
mod operations;
mod sharing;
mod uploads;
mod warming;
