//! The client as a pure state machine: the table of the requests that await their answer.
//!
//! [`Table`] takes what happened (a request is started or cancelled, the connection stands or is
//! lost, a message came, time passed) and says what to do as [`Action`]s. Whoever drives it owns the
//! socket and the clock: the SDK's thread, or a simulator.
//!
//! ```text
//! caller ── start, cancel ──────▶ ┌───────┐ ── Finish ──────▶ caller
//! socket ── handle_connected, … ▶ │ Table │ ── Send ────────▶ socket
//! clock ─── handle_timeout ─────▶ └───────┘ ── poll_timeout ▶ clock
//! ```
//!
//! **Invariant.** Every request that was started is finished exactly once, by its deadline plus
//! [`GRACE`], whatever the farm and the network do. What is open is sent again after every
//! reconnect; the farm computes encodes without side effects, so an answer that was lost costs time
//! and nothing else.

mod table;

pub use table::{ANSWERED_MAX, Action, Ask, GRACE, OPEN_MAX, Outcome, Start, Table, Unclaimed};
