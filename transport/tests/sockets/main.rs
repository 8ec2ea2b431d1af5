//! Real sockets over TCP and ipc: everything that `luna-transport` promises to its callers.

#[cfg(test)]
mod binding;
#[cfg(test)]
mod bounds;
#[cfg(test)]
mod exchange;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod reconnect;
#[cfg(test)]
mod support;
