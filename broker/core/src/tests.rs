//! Scenarios: what the broker does, told as events and commands.

mod admission;
mod answers;
mod failover;
mod fairness;
mod faults;
mod operations;
mod sharing;
mod uploads;
