//! Exit codes of Luna's processes, named as in sysexits.h.
//!
//! A process that fails in a way that a restart may cure ends with 1. Whoever supervises it does
//! not start it again after one of [`HOPELESS`].

/// Wrong arguments.
pub const USAGE: u8 = 64;

/// A file that cannot be used, for example a model that cannot be read.
pub const DATA: u8 = 65;

/// A device that is not there.
pub const UNAVAILABLE: u8 = 69;

/// Another process uses the store or the endpoint, and has to be stopped first.
pub const IN_USE: u8 = 75;

/// A permission is missing.
pub const NO_PERMISSION: u8 = 77;

/// Wrong settings.
pub const CONFIG: u8 = 78;

/// Codes after which starting again cannot help.
pub const HOPELESS: [u8; 6] = [USAGE, DATA, UNAVAILABLE, IN_USE, NO_PERMISSION, CONFIG];
