//! Scenarios: what the broker does, told as events and commands.

mod admission;
mod answers;
mod failover;
mod model_files;
mod models;
mod operations;
mod resumption;
mod steps;
mod uploads;
