//! Chaos: a farm of real processes under load, with faults, and every answer checked.
//!
//! One run goes like this:
//!
//! 1. The `catalogue` says what clients ask for, and the `oracle` asks a quiet farm for all of
//!    it: these are the solo answers.
//! 2. A `farm` of supervised `luna` processes starts, and the `load` begins.
//! 3. The `plan`, which follows from the seed, is carried out: processes are killed, paused and
//!    restarted, clients come and go, uploads break off.
//! 4. When all is quiet again the farm must be whole and idle, and must still give the solo answers.
//! 5. The `report` says what was counted in the `ledger` and measured by `measure`.
//!
//! The schedule follows from the seed; what happens between real processes does not.

mod broken_upload;
mod catalogue;
mod farm;
mod ledger;
mod load;
mod log_line;
mod measure;
mod oracle;
mod plan;
mod raw;
mod report;
mod run;
mod slow_reader;
mod supervisor;
mod timeline;

pub use report::Report;
pub use run::{RunSettings, run};
