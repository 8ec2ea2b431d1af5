//! The layers of settings, before anybody asks for a value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::path::Path;

use crate::file::{FileLayer, Text};
use crate::mistake::{Mistake, Origin};
use crate::reader::Reader;

/// Everything that was written, from every source. A source that cannot be read is a mistake like
/// any other, reported by [`Reader::finish`].
#[derive(Clone, Debug)]
pub struct Settings {
    sections: Vec<String>,
    files: Vec<FileLayer>,
    env_prefix: String,
    env: BTreeMap<String, String>,
    command_line: BTreeMap<String, String>,
    mistakes: Vec<Mistake>,
}

impl Settings {
    /// Starts with no source. `sections` are the tables that a file may have for any process;
    /// of these, a [`Reader`] checks the keys of those from which it is asked something.
    pub fn new(sections: &[&str]) -> Self {
        Self {
            sections: sections.iter().map(|&section| section.to_owned()).collect(),
            files: Vec::new(),
            env_prefix: String::new(),
            env: BTreeMap::new(),
            command_line: BTreeMap::new(),
            mistakes: Vec::new(),
        }
    }

    /// Adds the TOML file at `path`, which must exist. It overrides the files added before.
    #[must_use]
    pub fn file(mut self, path: &Path) -> Self {
        match FileLayer::read(path) {
            Ok(layer) => self.files.push(layer),
            Err(reason) => {
                let origin = Origin::File(path.to_owned());
                self.mistakes.push(Mistake { key: None, value: None, origin, reason });
            }
        }
        self
    }

    /// Takes the variables that begin with `prefix` and an underscore, as from
    /// [`std::env::vars_os`]. Empty ones count as absent.
    #[must_use]
    pub fn env(
        mut self,
        prefix: &str,
        vars: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Self {
        prefix.clone_into(&mut self.env_prefix);
        for (name, value) in vars {
            let name = name.to_string_lossy().into_owned();
            let is_ours = name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('_'));
            if !is_ours || value.is_empty() {
                continue;
            }
            match value.into_string() {
                Ok(value) => drop(self.env.insert(name, value)),
                Err(value) => self.mistakes.push(Mistake {
                    key: None,
                    value: Some(value.to_string_lossy().into_owned()),
                    origin: Origin::Environment(name),
                    reason: "not UTF-8".to_owned(),
                }),
            }
        }
        self
    }

    /// Sets `key` as the command line does.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Display) -> Self {
        self.command_line.insert(key.to_owned(), value.to_string());
        self
    }

    /// Sets `key` as the command line does, if the flag was given.
    #[must_use]
    pub fn set_if(self, key: &str, value: Option<impl Display>) -> Self {
        match value {
            Some(value) => self.set(key, value),
            None => self,
        }
    }

    /// Starts to read.
    pub fn reader(self) -> Reader {
        Reader::new(self)
    }

    /// Returns the names of all sections.
    pub(crate) fn sections(&self) -> impl Iterator<Item = &str> {
        self.sections.iter().map(String::as_str)
    }

    /// Gives up the mistakes found so far.
    pub(crate) fn take_mistakes(&mut self) -> Vec<Mistake> {
        std::mem::take(&mut self.mistakes)
    }

    /// Returns the environment variable that sets `key`: `broker.port` becomes `LUNA_BROKER_PORT`.
    pub(crate) fn variable(&self, key: &str) -> String {
        format!("{}_{}", self.env_prefix, key.replace(['.', '-'], "_")).to_ascii_uppercase()
    }

    /// Returns the value that wins for `key`, and where it came from.
    pub(crate) fn lookup(&self, key: &str) -> Option<(Text, Origin)> {
        if let Some(text) = self.command_line.get(key) {
            return Some((Text::One(text.clone()), Origin::CommandLine));
        }
        let variable = self.variable(key);
        if let Some(text) = self.env.get(&variable) {
            return Some((Text::One(text.clone()), Origin::Environment(variable)));
        }
        let found = |layer: &FileLayer| {
            let text = layer.values.get(key)?.clone();
            Some((text, Origin::File(layer.path.clone())))
        };
        self.files.iter().rev().find_map(found)
    }

    /// Returns the values that win for the keys right under `table`, which only files can have.
    pub(crate) fn rows(&self, table: &str) -> BTreeMap<String, (Text, Origin)> {
        let mut rows = BTreeMap::new();
        for layer in &self.files {
            for (key, text) in &layer.values {
                let name = key.strip_prefix(table).and_then(|rest| rest.strip_prefix('.'));
                if let Some(name) = name {
                    let row = (text.clone(), Origin::File(layer.path.clone()));
                    rows.insert(name.to_owned(), row);
                }
            }
        }
        rows
    }

    /// Lists every key that a file or the command line wrote, with its value and source.
    pub(crate) fn written_keys(&self) -> impl Iterator<Item = (&str, String, Origin)> {
        let in_files = self.files.iter().flat_map(|layer| {
            let origin = Origin::File(layer.path.clone());
            layer.values.iter().map(move |(key, text)| (key.as_str(), text.show(), origin.clone()))
        });
        let on_command_line = self.command_line.iter();
        let on_command_line =
            on_command_line.map(|(key, text)| (key.as_str(), text.clone(), Origin::CommandLine));
        in_files.chain(on_command_line)
    }

    /// Lists every environment variable with the prefix, and its value.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}
