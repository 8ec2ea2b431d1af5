//! The crate from outside: real files of every spelling, patch objects, the canonical form, and hostile bytes.

#[cfg(test)]
mod canonical;
#[cfg(test)]
mod corpora;
#[cfg(test)]
mod files;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod kinds;
#[cfg(test)]
mod objects;
#[cfg(test)]
mod spellings;
