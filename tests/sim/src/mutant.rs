//! Bugs on purpose, in the wiring of the simulator and never in the cores: they show that the
//! invariants would find the real ones.

use std::str::FromStr;

/// One bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The broker believes that a worker holds whatever it was ever sent, so that a dispatch that
    /// got lost is never given to another. Breaks I6.
    LostDispatch,
    /// A client does not send again what was open when the connection was lost. Breaks I6.
    NoResend,
    /// A worker computes with the stack of the request before. Breaks I2.
    PreviousStack,
    /// A worker lets go of an adapter's tensors at an `evict` although a request has them pinned.
    /// Breaks I2.
    EvictsPinned,
    /// The broker's news of what workers hold never arrive after the first. Breaks I7.
    StaleResidency,
    /// A worker's journal never says what it was busy with. Breaks I4.
    EmptyJournal,
}

impl Mutant {
    /// Every mutant with its name on the command line.
    pub const ALL: [(&'static str, Self); 6] = [
        ("lost-dispatch", Self::LostDispatch),
        ("no-resend", Self::NoResend),
        ("previous-stack", Self::PreviousStack),
        ("evicts-pinned", Self::EvictsPinned),
        ("stale-residency", Self::StaleResidency),
        ("empty-journal", Self::EmptyJournal),
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, mutant)| *mutant == self);
        found.map_or("unnamed", |(name, _)| name)
    }
}

impl FromStr for Mutant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|&(_, mutant)| mutant).ok_or_else(|| {
            let known = Self::ALL.map(|(name, _)| name).join(", ");
            format!("unknown mutant `{text}`: expected one of {known}")
        })
    }
}
