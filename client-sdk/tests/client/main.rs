//! The client against a farm that answers from a script.

mod encode;
mod farm;
mod model;
mod reconnect;
mod upload;
