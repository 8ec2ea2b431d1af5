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
mod resumption;
mod sharing;
mod steps;
mod uploads;
mod warming;
