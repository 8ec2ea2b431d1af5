//! The wire as others see it: bytes that are frozen, values that survive, and input that is refused.
//!
//! One test binary: `examples` and `strategies` make messages, the other modules test them.

mod document;
mod examples;
mod golden;
mod robustness;
mod roundtrip;
mod strategies;
