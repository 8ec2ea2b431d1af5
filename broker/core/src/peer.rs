//! Connections as the core knows them: numbers that the shell gives out.
//!
//! A number stands for one connection and is never given out again, so a peer that left cannot be
//! taken for one that came later. Clients and workers have types of their own: the two sockets
//! cannot be confused.

use std::fmt;

/// One connection of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientPeer(u64);

/// One connection of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerPeer(u64);

impl ClientPeer {
    /// The connection with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
}

impl WorkerPeer {
    /// The connection with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for ClientPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client-{}", self.0)
    }
}

impl fmt::Display for WorkerPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker-{}", self.0)
    }
}
