//! Which models a worker serves, and where their files may come from.
//!
//! A model is named on the command line, or by a client while the worker runs: then by paths in
//! the directories of [`ModelRoots`], or by the digests of uploaded files, which [`ModelDownload`]
//! keeps on disk. A [`Catalogue`] knows every model by name and digest, in memory or not. Nothing
//! here talks to the broker or decides what stays in memory.

pub mod catalogue;
pub mod download;
pub mod failure;
mod part;
pub mod roots;

pub use catalogue::{
    Catalogue, RegisterError, Registration, ReloadError, ServedModel, UnknownModel,
};
pub use download::{DownloadError, ModelDownload};
pub use failure::WireError;
pub use roots::{InvalidRoot, ModelRoots, RefusedPath};
