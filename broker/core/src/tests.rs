//! Scenarios: what the broker does, told as events and commands.

mod admission;
mod answers;
mod failover;
mod operations;
mod uploads;
