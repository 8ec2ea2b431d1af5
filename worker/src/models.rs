//! Which models a worker serves, and where their files may come from.
//!
//! A model is named on the command line, or by a client while the worker runs: then by paths in
//! the directories of [`ModelRoots`], or by the digests of uploaded files, which are kept in the
//! [`ModelDirectory`]. [`ModelFiles`] finds and stores files and [`ModelLoader`] reads models, each
//! on a thread of its own, and the [`Catalogue`] knows every model by name and digest, in memory or
//! not; [`Registrations`] knows those that are not served yet. Nothing here talks to the broker or decides what stays in memory.

mod catalogue;
mod directory;
mod download;
mod files;
mod loader;
mod part;
mod registrations;
mod roots;

pub(crate) use catalogue::Catalogue;
pub(crate) use directory::ModelDirectory;
pub(crate) use files::{FileEvent, FileTask, ModelFiles};
pub(crate) use loader::{LoadTask, ModelLoader, load};
pub(crate) use registrations::{Closed, NoRegistration, Registrations};
pub(crate) use roots::ModelRoots;
