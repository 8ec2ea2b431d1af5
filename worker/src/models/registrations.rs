//! Models that the broker has asked for and that are not answered yet. No thread, no disk and no
//! socket: names of files, and who waits for what.
//!
//! ```text
//! finding files => waiting to be read => being read => answered
//!       |                                     |
//!       `=> failed                            `=> failed
//! ```
//!
//! One model is read at a time, so that models of running requests wait for one at most.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
};

use protocol::{BlobDigest, ErrorCode, ModelName, request::ModelFile, worker::Register};

use super::catalogue::MODELS_MAX;
use crate::{
    failure::WireError,
    model::{InvalidSpec, ModelSpec},
};

/// All of them, by name.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    open: BTreeMap<ModelName, Registration>,
    to_read: VecDeque<ModelName>,
    is_reading: bool,
}

/// One of them.
#[derive(Debug)]
struct Registration {
    asked: Vec<ModelFile>,
    /// The files as the broker names them, and their paths once they are found.
    spec: ModelSpec,
    missing: BTreeSet<ModelFile>,
    tickets: BTreeSet<u64>,
}

/// A registration that is over.
#[derive(Debug, Default)]
pub(crate) struct Closed {
    /// The questions that its answer is for.
    pub(crate) tickets: BTreeSet<u64>,
    /// Files that were still to be stored for it, and for no other registration.
    pub(crate) unwanted: Vec<BlobDigest>,
}

/// Why a registration does not begin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRegistration {
    /// The worker leaves.
    #[error("the worker is draining: another one may serve model `{0}`")]
    Draining(ModelName),
    /// The model is being registered as another one.
    #[error("model `{0}` is being registered with another family or other files: try again later")]
    OtherFiles(ModelName),
    /// Too many are under way.
    #[error("{MODELS_MAX} models are being registered already: try again later")]
    Full,
    /// The files are too many, or none.
    #[error(transparent)]
    Files(#[from] InvalidSpec),
}

impl Registrations {
    /// Begins to register a model, or notes that one more question is about it. Returns the files
    /// to be found.
    pub(crate) fn ask(&mut self, register: Register) -> Result<Vec<ModelFile>, NoRegistration> {
        let Register { ticket, name, family, files } = register;
        if let Some(open) = self.open.get_mut(&name) {
            if open.spec.family != family || open.asked != files {
                return Err(NoRegistration::OtherFiles(name));
            }
            open.tickets.insert(ticket);
            return Ok(Vec::new());
        }
        if self.open.len() >= MODELS_MAX {
            return Err(NoRegistration::Full);
        }
        let path = |file: &ModelFile| match file {
            ModelFile::Path(path) => PathBuf::from(path),
            ModelFile::Blob(blob) => PathBuf::from(blob.to_string()),
        };
        let spec = ModelSpec::new(name.clone(), family, files.iter().map(path).collect())?;
        let missing: BTreeSet<_> = files.iter().cloned().collect();
        let to_find = missing.iter().cloned().collect();
        let tickets = BTreeSet::from([ticket]);
        self.open.insert(name, Registration { asked: files, spec, missing, tickets });
        Ok(to_find)
    }

    /// A file is at `path`.
    pub(crate) fn found(&mut self, file: &ModelFile, path: &PathBuf) {
        for (name, open) in &mut self.open {
            if !open.missing.remove(file) {
                continue;
            }
            for (asked, at) in open.asked.iter().zip(&mut open.spec.files) {
                if asked == file {
                    at.clone_from(path);
                }
            }
            if open.missing.is_empty() {
                self.to_read.push_back(name.clone()); // ## finding files => waiting to be read
            }
        }
    }

    /// Whether a registration waits for `file`.
    pub(crate) fn need(&self, file: &ModelFile) -> bool {
        self.open.values().any(|open| open.missing.contains(file))
    }

    /// The uploaded files that models are to be made of.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = BlobDigest> {
        self.open.values().flat_map(|open| &open.asked).filter_map(|file| match file {
            ModelFile::Blob(blob) => Some(*blob),
            ModelFile::Path(_) => None,
        })
    }

    /// The registrations that wait for `file`.
    pub(crate) fn waiting_for(&self, file: &ModelFile) -> Vec<ModelName> {
        let waiting = self.open.iter().filter(|(_, open)| open.missing.contains(file));
        waiting.map(|(name, _)| name.clone()).collect()
    }

    /// Every model that is not answered.
    pub(crate) fn names(&self) -> Vec<ModelName> {
        self.open.keys().cloned().collect()
    }

    /// The model to read now, if there is one and no other is being read.
    pub(crate) fn next_to_read(&mut self) -> Option<ModelSpec> {
        if self.is_reading {
            return None;
        }
        let name = self.to_read.pop_front()?;
        self.is_reading = true; // ## waiting to be read => being read
        Some(self.open[&name].spec.clone())
    }

    /// The model that was being read is read, for better or worse.
    pub(crate) fn read_ended(&mut self) {
        self.is_reading = false;
    }

    /// Ends the registration of `name`.
    pub(crate) fn close(&mut self, name: &ModelName) -> Closed {
        self.to_read.retain(|waiting| waiting != name);
        let Some(Registration { missing, tickets, .. }) = self.open.remove(name) else {
            return Closed::default();
        };
        let blob = |file| match file {
            ModelFile::Blob(blob) if !self.need(&file) => Some(blob),
            ModelFile::Blob(_) | ModelFile::Path(_) => None,
        };
        let unwanted = missing.into_iter().filter_map(blob).collect();
        Closed { tickets, unwanted } // ## => answered, failed
    }

    /// The connection is a new one, and nobody waits for answers to what was asked on the old one.
    pub(crate) fn handle_reconnect(&mut self) {
        for open in self.open.values_mut() {
            open.tickets.clear();
        }
    }
}

impl WireError for NoRegistration {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Draining(_) | Self::OtherFiles(_) | Self::Full => ErrorCode::Overloaded,
            Self::Files(_) => ErrorCode::InvalidRequest,
        }
    }
}

#[cfg(test)]
mod tests {
    use protocol::Family;

    use super::*;

    #[test]
    fn what_is_asked_twice_is_done_once_and_answered_for_both() {
        let mut registrations = Registrations::default();
        assert_eq!(registrations.ask(register(1, "a", &[path("l")])), Ok(vec![path("l")]));
        assert_eq!(registrations.ask(register(2, "a", &[path("l")])), Ok(vec![]));
        let other = registrations.ask(register(3, "a", &[path("g")]));
        assert_eq!(other, Err(NoRegistration::OtherFiles(name("a"))));

        registrations.found(&path("l"), &"/real/l".into());
        let spec = registrations.next_to_read().unwrap();
        assert_eq!(spec.to_string(), "a=sdxl:/real/l");
        assert_eq!(registrations.next_to_read(), None);
        assert_eq!(registrations.ask(register(4, "a", &[path("l")])), Ok(vec![]));
        registrations.read_ended();
        assert_eq!(registrations.close(&name("a")).tickets, BTreeSet::from([1, 2, 4]));
        assert_eq!(registrations.names(), []);
    }

    #[test]
    fn one_model_is_read_at_a_time_once_all_its_files_are_here() {
        let mut registrations = Registrations::default();
        registrations.ask(register(1, "a", &[path("l"), path("g")])).unwrap();
        registrations.ask(register(2, "b", &[path("l")])).unwrap();
        registrations.ask(register(3, "c", &[path("l"), path("l")])).unwrap();
        registrations.found(&path("l"), &"/real/l".into());
        assert_eq!(registrations.next_to_read().unwrap().name, name("b"));
        registrations.found(&path("g"), &"/real/g".into());
        assert_eq!(registrations.next_to_read(), None, "`b` is being read");
        registrations.read_ended();
        let twice = registrations.next_to_read().unwrap();
        assert_eq!(twice.to_string(), "c=sdxl:/real/l,/real/l");
        registrations.read_ended();
        assert_eq!(registrations.next_to_read().unwrap().to_string(), "a=sdxl:/real/l,/real/g");
    }

    #[test]
    fn a_registration_that_fails_takes_along_only_what_it_alone_waits_for() {
        let mut registrations = Registrations::default();
        let [own, shared, here] = [b"own", b"two", b"old"].map(|it| BlobDigest::of(it));
        let blob = |digest: &BlobDigest| ModelFile::Blob(*digest);
        registrations.ask(register(1, "a", &[blob(&own), blob(&shared)])).unwrap();
        registrations.ask(register(2, "b", &[blob(&shared), blob(&here)])).unwrap();
        registrations.found(&blob(&here), &"/real/here".into());
        assert_eq!(registrations.waiting_for(&blob(&shared)), [name("a"), name("b")]);
        assert_eq!(registrations.close(&name("a")).unwanted, [own]);
        assert!(!registrations.need(&blob(&own)) && registrations.need(&blob(&shared)));
        assert_eq!(registrations.close(&name("b")).unwanted, [shared]);
        assert!(registrations.close(&name("b")).tickets.is_empty());
    }

    #[test]
    fn too_many_files_or_registrations_are_refused() {
        let mut registrations = Registrations::default();
        for files in [&[][..], &[path("1"), path("2"), path("3")]] {
            let refused = registrations.ask(register(1, "a", files)).unwrap_err();
            assert_eq!(refused.code(), ErrorCode::InvalidRequest, "{refused}");
        }
        for index in 0..MODELS_MAX {
            registrations.ask(register(1, &format!("m{index}"), &[path("l")])).unwrap();
        }
        let full = registrations.ask(register(1, "more", &[path("l")])).unwrap_err();
        assert_eq!(full.code(), ErrorCode::Overloaded);
        registrations.handle_reconnect();
        assert!(registrations.close(&name("m7")).tickets.is_empty());
    }

    fn register(ticket: u64, model: &str, files: &[ModelFile]) -> Register {
        Register { ticket, name: name(model), family: Family::Sdxl, files: files.to_vec() }
    }

    fn path(text: &str) -> ModelFile {
        ModelFile::Path(text.to_owned())
    }

    fn name(text: &str) -> ModelName {
        text.parse().unwrap()
    }
}
